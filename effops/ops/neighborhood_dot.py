"""Products of every pixel with the window around it."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effops.ops import _autocast, _autograd, _localfilter, _maps
from effops.ops._checks import FLOAT_DTYPES, ShapeChecker, check_backend, explain

_NAME = "neighborhood_dot"
_op = torch.ops.effops.neighborhood_dot.default
_backward_op = torch.ops.effops.neighborhood_dot_backward.default


def neighborhood_dot(
    q: Tensor,  # [N, C, H, W]
    k: Tensor,  # [N, C, H, W]
    window: int,
    dilation: int = 1,
) -> Tensor:  # [N, K * K, H, W]
    r"""Products of every pixel with the K x K pixels around it: a correlation volume of small displacements.

    .. math::
        out[n, t, p] = \sum_c q[n, c, p] \, k[n, c, p + o_t]

    where tap :math:`t = i K + j` lies at the offset
    :math:`o_t = (i - \lfloor K / 2 \rfloor, j - \lfloor K / 2 \rfloor) \, dilation` (rows, columns). For taps
    outside the image it is 0; the padding is never multiplied.

    Args:
        q: [N, C, H, W]. float32, float64, bfloat16 or float16; C may be 0.
        k: [N, C, H, W], of the same dtype.
        window: K, 1 or more; an even K has K / 2 taps before the pixel and K / 2 - 1 behind it.
        dilation: Pixels from tap to tap, 1 or more.

    Returns:
        [N, K * K, H, W] in the dtype of ``q``; channels_last if ``q`` is channels_last and not contiguous at
        the same time, else contiguous; so is each gradient, by its own input. Computed in float32 (float64
        for float64) and rounded once.

    Raises:
        ValueError: wrong ranks or sizes, a window or dilation out of range, tensors on different devices.
        TypeError: wrong dtypes, or an argument of another kind.
        RuntimeError: no kernels for the device in this installation.

    Differentiable in ``q`` and ``k``, once. Deterministic, on the CPU for any number of threads. vmap may
    batch both tensors. ``torch.func.grad`` is not supported.

    Source: Brüggemann et al., "Exploring Relational Context for Multi-Task Dense Prediction", ICCV 2021
    (one half of its local attention); the correlation of FlowNet.
    """
    try:
        return _op(q, k, window, dilation)
    except (RuntimeError, TypeError) as error:
        return explain(_NAME, error, lambda: _check(q, k, window, dilation))


def _check(q: Tensor, k: Tensor, window: int, dilation: int) -> None:
    """The metadata checks of csrc/localfilter/neighborhood.h."""
    check = ShapeChecker(_NAME)
    check.match("q", q, "NCHW")
    check.match("k", k, "NCHW")
    check.dtype("q", q, *FLOAT_DTYPES)
    check.dtype("k", k, q.dtype)
    check.device("k", k, "q", q)
    _localfilter.check_window(_NAME, window, dilation)
    check_backend(_NAME, q)


# ------------------------------------------------------------------------------------------ fake


@torch.library.register_fake("effops::neighborhood_dot")
def _fake(q: Tensor, k: Tensor, window: int, dilation: int) -> Tensor:
    _check(q, k, window, dilation)
    batch, _, height, width = q.shape
    return _maps.new_maps(q, (batch, window * window, height, width))


@torch.library.register_fake("effops::neighborhood_dot_backward")
def _fake_backward(
    grad_output: Tensor, q: Tensor, k: Tensor, window: int, dilation: int, need_q: bool, need_k: bool
) -> tuple[Tensor, Tensor]:
    return _maps.gradient_of(q, need_q), _maps.gradient_of(k, need_k)


# ------------------------------------------------------------------------------------------ autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, *ctx.settings = inputs
    ctx.save_for_backward(q, k)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    need_q, need_k = ctx.needs_input_grad[:2]
    grad_q, grad_k = _backward_op(grad_output, *ctx.saved_tensors, *ctx.settings, need_q, need_k)
    return grad_q if need_q else None, grad_k if need_k else None, None, None


_autograd.install(_NAME, _save, _backward, differentiable=(0, 1))
_autograd.refuse_second_derivatives(_NAME, differentiable=(0, 1, 2))

# ------------------------------------------------------------------------------------------ autocast

_autocast.install(_NAME, (_autocast.CAST, _autocast.CAST, _autocast.KEEP, _autocast.KEEP))

# ------------------------------------------------------------------------------------------ vmap

_localfilter.install_vmap(_NAME)

# ------------------------------------------------------------------------------------------ FLOPs


@register_flop_formula(torch.ops.effops.neighborhood_dot)
def _flops(q: Any, k: Any, window: int, dilation: int, out_shape: Any = None, **_: Any) -> int:
    """A multiply-add per pixel, tap and channel; taps outside the image are counted."""
    return _localfilter.window_flops(q, window, q[1])


@register_flop_formula(torch.ops.effops.neighborhood_dot_backward)
def _backward_flops(
    grad_output: Any, q: Any, k: Any, window: int, dilation: int, need_q: bool, need_k: bool, **_: Any
) -> int:
    """The same for each gradient."""
    return (int(need_q) + int(need_k)) * _localfilter.window_flops(q, window, q[1])
