"""One of several convolutions for each pixel."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effops.ops import _autocast, _autograd, _maps, _rowconv, _vmap
from effops.ops._checks import FLOAT_DTYPES, ShapeChecker, check_backend, check_integer, explain

_NAME = "select_conv2d"
_op = torch.ops.effops.select_conv2d.default
_backward_op = torch.ops.effops.select_conv2d_backward.default


def select_conv2d(
    x: Tensor,  # [N, Ci, H, W]
    weights: Tensor,  # [P, Co, Ci, k, k]
    choice: Tensor,  # [N, H, W]
    dilations: Sequence[int],
    bias: Tensor | None = None,  # [P, Co]
) -> Tensor:  # [N, Co, H, W]
    r"""Each pixel takes the result of the convolution that it chooses; the others are not computed.

    .. math::
        out[n, :, y, x] = conv2d(x, weights[p], bias[p], dilation=dilations[p])[n, :, y, x], \qquad
        p = choice[n, y, x]

    with the padding that keeps the size. A branch of dilation 0 is the identity, a copy of x without weight
    and bias; the choice -1 gives 0. What no tap of the chosen branches reads has no influence, and the
    padding is never multiplied.

    Args:
        x: [N, Ci, H, W]. float32, float64, bfloat16 or float16. channels_last is faster.
        weights: Those of P branches, [P, Co, Ci, k, k], k odd; the entry of an identity branch is ignored
            and gets gradient 0.
        choice: The branch of each pixel, or -1, [N, H, W] int32 or int64.
        dilations: P numbers, 0 or more; 0, the identity, needs Co = Ci.
        bias: [P, Co].

    Returns:
        [N, Co, H, W] in the dtype of ``x``; channels_last if ``x`` is channels_last and not contiguous at
        the same time (so is the gradient of ``x``), else contiguous. Computed in float32 (float64 for
        float64) and rounded once.

    Raises:
        ValueError: wrong ranks or sizes, an even k, a negative dilation, an identity branch between
            different numbers of channels, tensors on different devices, and on the CPU a choice out of
            range. CUDA kernels give 0 for it (the host never waits for them).
        TypeError: wrong dtypes, or an argument of another kind.
        RuntimeError: no kernels for the device in this installation.

    Differentiable in ``x``, ``weights`` and ``bias``, once. Deterministic on the CPU for any number of
    threads; on CUDA under ``torch.use_deterministic_algorithms(True)``. vmap may batch every tensor (with
    weights or biases of their own, a loop over its members). ``torch.func.grad`` is not supported.

    Source: S. Kong, PhD thesis, section 4.3.4 (MultiPool of pixel-wise attentional gating).
    """
    if not isinstance(dilations, (list, tuple)):
        kind = type(dilations).__name__
        raise TypeError(f"{_NAME}: expected dilations to be a list of ints, got {kind}")
    numbers = list(dilations)
    try:
        return _op(x, weights, choice, bias, numbers)
    except (RuntimeError, TypeError) as error:
        return explain(_NAME, error, lambda: _check(x, weights, choice, bias, numbers))


def _check(
    x: Tensor, weights: Tensor, choice: Tensor, bias: Tensor | None, dilations: Sequence[int]
) -> ShapeChecker:
    """The metadata checks of csrc/rowconv/select_conv2d.h."""
    check = ShapeChecker(_NAME)
    check.match("x", x, "NCHW")
    check.match("weights", weights, "POCKK")
    check.match("choice", choice, "NHW")
    check.dtype("x", x, *FLOAT_DTYPES)
    check.dtype("weights", weights, x.dtype)
    check.dtype("choice", choice, torch.int32, torch.int64)
    check.device("weights", weights, "x", x)
    check.device("choice", choice, "x", x)
    if bias is not None:
        check.match("bias", bias, "PO")
        check.dtype("bias", bias, x.dtype)
        check.device("bias", bias, "x", x)
    sizes = check.sizes
    if sizes["K"] % 2 == 0:
        shape = list(weights.shape)
        raise ValueError(f"{_NAME}: expected weights with an odd kernel size, got {shape}")
    if len(dilations) != sizes["P"]:
        raise ValueError(
            f"{_NAME}: expected dilations of length {sizes['P']}, one per branch, got {len(dilations)}"
        )
    for dilation in dilations:
        check_integer(_NAME, "dilations", dilation)
        _rowconv.check_dilation(_NAME, "dilations", dilation, sizes["K"], least=0)
        if dilation == 0 and sizes["O"] != sizes["C"]:
            raise ValueError(
                f"{_NAME}: expected dilations > 0 (0, the identity, needs as many output as input channels), "
                f"got 0 with {list(weights.shape)}"
            )
    check_backend(_NAME, x)
    return check


# ------------------------------------------------------------------------------------------ fake


@torch.library.register_fake("effops::select_conv2d")
def _fake(
    x: Tensor, weights: Tensor, choice: Tensor, bias: Tensor | None, dilations: Sequence[int]
) -> Tensor:
    sizes = _check(x, weights, choice, bias, dilations).sizes
    return _maps.new_maps(x, (sizes["N"], sizes["O"], sizes["H"], sizes["W"]))


@torch.library.register_fake("effops::select_conv2d_backward")
def _fake_backward(
    grad_output: Tensor,
    x: Tensor,
    weights: Tensor,
    choice: Tensor,
    dilations: Sequence[int],
    need_x: bool,
    need_weights: bool,
    need_bias: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _maps.gradient_of(x, need_x),
        weights.new_empty(weights.shape if need_weights else (0,)),
        weights.new_empty(weights.shape[:2] if need_bias else (0,)),
    )


# ------------------------------------------------------------------------------------------ autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, choice, _, ctx.dilations = inputs
    ctx.save_for_backward(x, weights, choice)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_weights, _, need_bias, _ = ctx.needs_input_grad
    deterministic = torch.are_deterministic_algorithms_enabled()
    grad_x, grad_weights, grad_bias = _backward_op(
        grad_output, *ctx.saved_tensors, ctx.dilations, need_x, need_weights, need_bias, deterministic
    )
    return (
        grad_x if need_x else None,
        grad_weights if need_weights else None,
        None,
        grad_bias if need_bias else None,
        None,
    )


_autograd.install(_NAME, _save, _backward, differentiable=(0, 1, 3))
_autograd.refuse_second_derivatives(_NAME, differentiable=(0, 1, 2))

# ------------------------------------------------------------------------------------------ autocast

_autocast.install(_NAME, (_autocast.CAST, _autocast.CAST, _autocast.KEEP, _autocast.CAST, _autocast.KEEP))

# ------------------------------------------------------------------------------------------ vmap


@torch.library.register_vmap("effops::select_conv2d")
def _vmap_rule(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
    size = info.batch_size
    x, weights, choice, bias, dilations = inputs
    if _vmap.must_loop(size, in_dims[1], in_dims[3]):
        return _vmap.loop(_op, inputs, in_dims, size)
    folded = _vmap.fold(x, in_dims[0], size), weights, _vmap.fold(choice, in_dims[2], size)
    return _vmap.unfold(_op(*folded, bias, dilations), size), 0


@torch.library.register_vmap("effops::select_conv2d_backward")
def _vmap_backward_rule(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
    size = info.batch_size
    grad_output, x, weights, choice, *settings = inputs
    _, need_x, need_weights, need_bias, _ = settings
    if need_weights or need_bias or _vmap.must_loop(size, in_dims[2]):
        return _vmap.loop(_backward_op, inputs, in_dims, size)
    grad = _vmap.fold(grad_output, in_dims[0], size)
    folded = _vmap.fold(x, in_dims[1], size), weights, _vmap.fold(choice, in_dims[3], size)
    grad_x, *unneeded = _backward_op(grad, *folded, *settings)
    return (_vmap.unfold(grad_x, size), *unneeded), (0, None, None)


# ------------------------------------------------------------------------------------------ FLOPs


@register_flop_formula(torch.ops.effops.select_conv2d)
def _flops(x: Any, weights: Any, choice: Any, *args: Any, out_shape: Any = None, **_: Any) -> int:
    """A multiply-add per pixel and element of one branch's weight, though identities and -1 cost nothing."""
    images, height, width = choice
    return _rowconv.product_flops(weights[1:], images * height * width)


@register_flop_formula(torch.ops.effops.select_conv2d_backward)
def _backward_flops(
    grad_output: Any,
    x: Any,
    weights: Any,
    choice: Any,
    dilations: Any,
    need_x: bool,
    need_weights: bool,
    *args: Any,
    **_: Any,
) -> int:
    """The same for x, and again for the weights."""
    images, height, width = choice
    products = int(need_x) + int(need_weights)
    return products * _rowconv.product_flops(weights[1:], images * height * width)
