"""Weighted sums of the windows around every pixel."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effops.ops import _autocast, _autograd, _localfilter, _maps
from effops.ops._checks import FLOAT_DTYPES, ShapeChecker, check_backend, explain

_NAME = "neighborhood_mix"
_op = torch.ops.effops.neighborhood_mix.default
_backward_op = torch.ops.effops.neighborhood_mix_backward.default


def neighborhood_mix(
    weights: Tensor,  # [N, K * K, H, W]
    v: Tensor,  # [N, C, H, W]
    dilation: int = 1,
) -> Tensor:  # [N, C, H, W]
    r"""Sums of the K x K pixels around every pixel, with weights of its own; the adjoint of
    :func:`neighborhood_dot`.

    .. math::
        out[n, :, p] = \sum_t weights[n, t, p] \, v[n, :, p + o_t]

    where tap :math:`t = i K + j` lies at the offset
    :math:`o_t = (i - \lfloor K / 2 \rfloor, j - \lfloor K / 2 \rfloor) \, dilation` (rows, columns). Taps
    outside the image add nothing; the padding is never multiplied. :func:`filter_flow` with
    ``normalize="none"`` computes the same, and has more settings.

    Args:
        weights: [N, K * K, H, W], any K >= 1; an even K has K / 2 taps before the pixel and K / 2 - 1 behind
            it. float32, float64, bfloat16 or float16.
        v: [N, C, H, W], of the same dtype; C may be 0.
        dilation: Pixels from tap to tap, 1 or more.

    Returns:
        [N, C, H, W] in the dtype of ``v``; channels_last if ``v`` is channels_last and not contiguous at the
        same time, else contiguous; so is each gradient, by its own input. Computed in float32 (float64 for
        float64) and rounded once.

    Raises:
        ValueError: wrong ranks or sizes, channels of ``weights`` that are not K * K, a dilation out of range,
            tensors on different devices.
        TypeError: wrong dtypes, or an argument of another kind.
        RuntimeError: no kernels for the device in this installation.

    Differentiable in ``weights`` and ``v``, once. Deterministic, on the CPU for any number of threads. vmap
    may batch both tensors. ``torch.func.grad`` is not supported.

    Source: Brüggemann et al., "Exploring Relational Context for Multi-Task Dense Prediction", ICCV 2021
    (the other half of its local attention).
    """
    try:
        return _op(weights, v, dilation)
    except (RuntimeError, TypeError) as error:
        return explain(_NAME, error, lambda: _check(weights, v, dilation))


def _check(weights: Tensor, v: Tensor, dilation: int) -> None:
    """The metadata checks of csrc/localfilter/neighborhood.h."""
    check = ShapeChecker(_NAME)
    check.match("weights", weights, "NKHW")
    check.match("v", v, "NCHW")
    check.dtype("weights", weights, *FLOAT_DTYPES)
    check.dtype("v", v, weights.dtype)
    check.device("v", v, "weights", weights)
    kernel = _localfilter.kernel_of(_NAME, "weights", weights, 1)
    _localfilter.check_dilation(_NAME, dilation, kernel)
    check_backend(_NAME, v)


# ------------------------------------------------------------------------------------------ fake


@torch.library.register_fake("effops::neighborhood_mix")
def _fake(weights: Tensor, v: Tensor, dilation: int) -> Tensor:
    _check(weights, v, dilation)
    return _maps.new_maps(v, v.shape)


@torch.library.register_fake("effops::neighborhood_mix_backward")
def _fake_backward(
    grad_output: Tensor, weights: Tensor, v: Tensor, dilation: int, need_weights: bool, need_v: bool
) -> tuple[Tensor, Tensor]:
    return _maps.gradient_of(weights, need_weights), _maps.gradient_of(v, need_v)


# ------------------------------------------------------------------------------------------ autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, v, ctx.dilation = inputs
    ctx.save_for_backward(weights, v)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    need_weights, need_v = ctx.needs_input_grad[:2]
    grad_weights, grad_v = _backward_op(grad_output, *ctx.saved_tensors, ctx.dilation, need_weights, need_v)
    return grad_weights if need_weights else None, grad_v if need_v else None, None


_autograd.install(_NAME, _save, _backward, differentiable=(0, 1))
_autograd.refuse_second_derivatives(_NAME, differentiable=(0, 1, 2))

# ------------------------------------------------------------------------------------------ autocast

_autocast.install(_NAME, (_autocast.CAST, _autocast.CAST, _autocast.KEEP))

# ------------------------------------------------------------------------------------------ vmap

_localfilter.install_vmap(_NAME)

# ------------------------------------------------------------------------------------------ FLOPs


@register_flop_formula(torch.ops.effops.neighborhood_mix)
def _flops(weights: Any, v: Any, dilation: int, out_shape: Any = None, **_: Any) -> int:
    """A multiply-add per pixel, tap and channel; taps outside the image are counted."""
    return _localfilter.tap_flops(weights, v[1])


@register_flop_formula(torch.ops.effops.neighborhood_mix_backward)
def _backward_flops(
    grad_output: Any, weights: Any, v: Any, dilation: int, need_weights: bool, need_v: bool, **_: Any
) -> int:
    """The same for each gradient."""
    return (int(need_weights) + int(need_v)) * _localfilter.tap_flops(weights, v[1])
