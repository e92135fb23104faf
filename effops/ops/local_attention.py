"""Softmax attention of every pixel to the window around it."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effops.ops import _autocast, _autograd, _localfilter, _maps
from effops.ops._checks import FLOAT_DTYPES, ShapeChecker, check_backend, check_type, explain, number_of

_NAME = "local_attention"
_op = torch.ops.effops.local_attention.default
_backward_op = torch.ops.effops.local_attention_backward.default


def local_attention(
    q: Tensor,  # [N, C, H, W]
    k: Tensor,  # [N, C, H, W]
    v: Tensor,  # [N, Cv, H, W]
    window: int,
    dilation: int = 1,
    scale: float | None = None,
    border: str = "mask",
) -> Tensor:  # [N, Cv, H, W]
    r"""Softmax attention of every pixel to the K x K window around it.

    .. math::
        out[n, :, p] = \sum_t a_t \, v[n, :, p + o_t], \qquad
        a = softmax_t \big( scale \; q[n, :, p] \cdot k[n, :, p + o_t] \big)

    where tap :math:`t = i K + j` lies at the offset
    :math:`o_t = (i - \lfloor K / 2 \rfloor, j - \lfloor K / 2 \rfloor) \, dilation` (rows, columns). Taps
    outside the image, by ``border``:

    - ``"mask"``: they take no part. With a window of at least 2 max(H, W) - 1 this is dense attention.
    - ``"zero"``: their similarity is 0 and takes part in the softmax; their value adds nothing.

    Neither the windows of k and v nor the similarities are ever stored. Heads are a part of the batch:
    ``q.unflatten(1, (heads, -1)).flatten(0, 1)``.

    Args:
        q: Queries, [N, C, H, W]. float32, float64, bfloat16 or float16; C may be 0.
        k: Keys, [N, C, H, W], of the same dtype.
        v: Values, [N, Cv, H, W], of the same dtype.
        window: K, 1 or more; an even K has K / 2 taps before the pixel and K / 2 - 1 behind it.
        dilation: Pixels from tap to tap, 1 or more.
        scale: Multiplies the similarities. None: C ** -0.5.
        border: ``"mask"`` or ``"zero"``.

    Returns:
        [N, Cv, H, W] in the dtype of the inputs; channels_last if ``q`` is channels_last and not contiguous
        at the same time, else contiguous; so is each gradient, by its own input. Computed in float32 (float64
        for float64) and rounded once.

    Raises:
        ValueError: wrong ranks or sizes, a window or dilation out of range, an unknown border, tensors on
            different devices.
        TypeError: wrong dtypes, or an argument of another kind.
        RuntimeError: no kernels for the device in this installation.

    Differentiable in ``q``, ``k`` and ``v``, once; the gradients of ``q`` and ``k`` read the rounded result.
    Deterministic, on the CPU for any number of threads. vmap may batch every tensor. ``torch.func.grad`` is
    not supported.

    Source: Brüggemann et al., "Exploring Relational Context for Multi-Task Dense Prediction", ICCV 2021,
    eq. 4 (``"mask"``) and its code (``"zero"``).
    """
    number = number_of(_NAME, "border", _localfilter.BORDERS, border)
    factor = _default_scale(q) if scale is None else scale
    try:
        return _op(q, k, v, window, dilation, factor, number)[0]
    except (RuntimeError, TypeError) as error:
        return explain(_NAME, error, lambda: _check(q, k, v, window, dilation, factor, number))


def _default_scale(q: Tensor) -> float:
    """That of anything else than maps does not matter: the op refuses it."""
    channels = int(q.shape[1]) if isinstance(q, Tensor) and q.dim() == 4 else 1
    return max(channels, 1) ** -0.5


def _check(
    q: Tensor, k: Tensor, v: Tensor, window: int, dilation: int, scale: float, border: int
) -> ShapeChecker:
    """The metadata checks of csrc/localfilter/local_attention.h."""
    check = ShapeChecker(_NAME)
    check.match("q", q, "NCHW")
    check.match("k", k, "NCHW")
    check.match("v", v, "NVHW")
    check.dtype("q", q, *FLOAT_DTYPES)
    check.dtype("k", k, q.dtype)
    check.dtype("v", v, q.dtype)
    check.device("k", k, "q", q)
    check.device("v", v, "q", q)
    _localfilter.check_window(_NAME, window, dilation)
    check_type(_NAME, "scale", scale, "float", float, int, torch.SymFloat, torch.SymInt)
    check_backend(_NAME, q)
    return check


# ------------------------------------------------------------------------------------------ fake


@torch.library.register_fake("effops::local_attention")
def _fake(
    q: Tensor, k: Tensor, v: Tensor, window: int, dilation: int, scale: float, border: int
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, window, dilation, scale, border)
    batch, _, height, width = q.shape
    return (
        _maps.new_maps(q, v.shape),
        q.new_empty((batch, height, width), dtype=_localfilter.accumulator_dtype(q)),
    )


@torch.library.register_fake("effops::local_attention_backward")
def _fake_backward(
    grad_output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    window: int,
    dilation: int,
    scale: float,
    border: int,
    need_q: bool,
    need_k: bool,
    need_v: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _maps.gradient_of(q, need_q), _maps.gradient_of(k, need_k), _maps.gradient_of(v, need_v)


# ------------------------------------------------------------------------------------------ autograd


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.settings = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(outputs[1])
    ctx.save_for_backward(q, k, v, *outputs)


def _backward(ctx: Any, grad_output: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 7
    needs = ctx.needs_input_grad[:3]
    found = _backward_op(grad_output, *ctx.saved_tensors, *ctx.settings, *needs)
    gradients = (gradient if need else None for gradient, need in zip(found, needs, strict=True))
    return *gradients, *(None,) * 4


_autograd.install(_NAME, _save, _backward, differentiable=(0, 1, 2))
_autograd.refuse_second_derivatives(_NAME, differentiable=(0, 1, 2, 3, 4, 5))

# ------------------------------------------------------------------------------------------ autocast

_autocast.install(_NAME, (*(_autocast.CAST,) * 3, *(_autocast.KEEP,) * 4))

# ------------------------------------------------------------------------------------------ vmap

_localfilter.install_vmap(_NAME)

# ------------------------------------------------------------------------------------------ FLOPs


@register_flop_formula(torch.ops.effops.local_attention)
def _flops(q: Any, k: Any, v: Any, window: int, *settings: Any, out_shape: Any = None, **_: Any) -> int:
    """A multiply-add per pixel, tap and channel of q and v; taps outside the image are counted."""
    return _localfilter.window_flops(q, window, q[1] + v[1])


@register_flop_formula(torch.ops.effops.local_attention_backward)
def _backward_flops(
    grad_output: Any,
    q: Any,
    k: Any,
    v: Any,
    output: Any,
    log_sum_exp: Any,
    window: int,
    *others: Any,
    **_: Any,
) -> int:
    """The similarities again, their gradients unless v alone has one, and a product for each gradient."""
    need_q, need_k, need_v = others[3:]
    similarities = q[1] + (v[1] if need_q or need_k else 0)
    gradients = (int(need_q) + int(need_k)) * q[1] + int(need_v) * v[1]
    return _localfilter.window_flops(q, window, similarities + gradients)
