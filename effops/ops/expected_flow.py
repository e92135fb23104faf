"""The mean displacement that per-pixel filters stand for."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effops.ops import _autocast, _autograd, _localfilter, _maps
from effops.ops._checks import FLOAT_DTYPES, ShapeChecker, check_backend, check_integer, explain, number_of

_NAME = "expected_flow"
_op = torch.ops.effops.expected_flow.default
_backward_op = torch.ops.effops.expected_flow_backward.default


def expected_flow(
    filters: Tensor,  # [N, groups * K * K, H, W]
    normalize: str = "softmax",
    *,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:  # [N, 2 * groups, H, W]
    r"""The mean displacement of what per-pixel filters read: a flow for backward warping.

    .. math::
        flow[n, :, y, x] = \sum_{i, j = 0}^{K - 1} T[n, i K + j, y, x] \;
            (j - \lfloor K / 2 \rfloor,\; i - \lfloor K / 2 \rfloor) \, dilation

    with the weights T of :func:`filter_flow`: by ``normalize`` the softmax of the K * K filters of a pixel,
    the filters as given (``"none"``), or divided by their sum (``"sum"``). All taps count, also those that
    would lie outside an image.

    Args:
        filters: [N, groups * K * K, H, W], taps in row-major order (dy slow, dx fast), any K >= 1. float32,
            float64, bfloat16 or float16.
        normalize: ``"softmax"``, ``"none"`` or ``"sum"``.
        dilation: Pixels from tap to tap, 1 or more.
        groups: Sets of filters per pixel, each of which has a flow.

    Returns:
        [N, 2 * groups, H, W], (dx, dy) in pixels, group by group, in float32 (float64 for float64);
        channels_last if ``filters`` are channels_last and not contiguous at the same time (so is their
        gradient), else contiguous.

    Raises:
        ValueError: wrong ranks, channels that are not groups * K * K, a dilation out of range, an unknown
            option.
        TypeError: wrong dtypes, or an argument of another kind.
        RuntimeError: no kernels for the device in this installation.

    Differentiable in ``filters``, once. Deterministic, on the CPU for any number of threads. vmap may batch
    ``filters``. ``torch.func.grad`` is not supported.

    Source: S. Kong, PhD thesis, chapters 6 and 7 (predictive filter flow).
    """
    number = number_of(_NAME, "normalize", _localfilter.NORMALIZE, normalize)
    try:
        flow, _ = _op(filters, number, dilation, groups)
    except (RuntimeError, TypeError) as error:
        return explain(_NAME, error, lambda: _check(filters, number, dilation, groups))
    return flow


def _check(filters: Tensor, normalize: int, dilation: int, groups: int) -> None:
    """The metadata checks of csrc/localfilter/filter_flow.h."""
    check = ShapeChecker(_NAME)
    _localfilter.check_rank(check, "filters", filters, "[N, G * K * K, H, W]")
    check.dtype("filters", filters, *FLOAT_DTYPES)
    check_integer(_NAME, "groups", groups)
    if groups < 1:
        raise ValueError(f"{_NAME}: expected groups >= 1, got {groups}")
    kernel = _localfilter.kernel_of(_NAME, "filters", filters, groups)
    _localfilter.check_dilation(_NAME, dilation, kernel)
    check_backend(_NAME, filters)


# ------------------------------------------------------------------------------------------ fake


@torch.library.register_fake("effops::expected_flow")
def _fake(filters: Tensor, normalize: int, dilation: int, groups: int) -> tuple[Tensor, Tensor]:
    _check(filters, normalize, dilation, groups)
    batch, _, height, width = filters.shape
    dtype = _localfilter.accumulator_dtype(filters)
    return (
        _maps.new_maps(filters, (batch, 2 * groups, height, width), dtype),
        _localfilter.new_normalizer(filters, groups, normalize),
    )


@torch.library.register_fake("effops::expected_flow_backward")
def _fake_backward(
    grad_flow: Tensor,
    filters: Tensor,
    flow: Tensor,
    normalizer: Tensor,
    normalize: int,
    dilation: int,
    groups: int,
) -> Tensor:
    return _maps.gradient_of(filters, True)


# ------------------------------------------------------------------------------------------ autograd


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    filters, *ctx.settings = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(outputs[1])
    ctx.save_for_backward(filters, *outputs)


def _backward(ctx: Any, grad_flow: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_flow is None:
        return (None,) * 4
    return _backward_op(grad_flow, *ctx.saved_tensors, *ctx.settings), None, None, None


_autograd.install(_NAME, _save, _backward, differentiable=(0,))
_autograd.refuse_second_derivatives(_NAME, differentiable=(0, 1, 2, 3))

# ------------------------------------------------------------------------------------------ autocast

_autocast.install(_NAME, (_autocast.FLOAT32, *(_autocast.KEEP,) * 3))

# ------------------------------------------------------------------------------------------ vmap

_localfilter.install_vmap(_NAME)

# ------------------------------------------------------------------------------------------ FLOPs


@register_flop_formula(torch.ops.effops.expected_flow)
def _flops(filters: Any, *settings: Any, out_shape: Any = None, **_: Any) -> int:
    """A multiply-add per tap for each of dx and dy."""
    return _localfilter.tap_flops(filters, 2)


@register_flop_formula(torch.ops.effops.expected_flow_backward)
def _backward_flops(grad_flow: Any, filters: Any, *others: Any, **_: Any) -> int:
    """The same, and the difference from the mean, weighted."""
    return _localfilter.tap_flops(filters, 3)
