"""Convolution at the output positions that a mask keeps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effops._mask_plan import MaskPlan
from effops.ops import _autocast, _autograd, _maps, _rowconv, _vmap
from effops.ops._checks import FLOAT_DTYPES, ShapeChecker, check_backend, explain

_NAME = "perforated_conv2d"
_op = torch.ops.effops.perforated_conv2d.default
_backward_op = torch.ops.effops.perforated_conv2d_backward.default

_FILLS = {"zero": 0, "keep": 1, "nearest": 2}  # the schema's numbers


def perforated_conv2d(
    x: Tensor,  # [N, Ci, H, W]
    weight: Tensor,  # [Co, Ci / groups, kh, kw]
    mask: Tensor | MaskPlan,  # [N, Ho, Wo]
    bias: Tensor | None = None,  # [Co]
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    fill: str = "zero",
    base: Tensor | None = None,  # [N, Co, Ho, Wo]
) -> Tensor:  # [N, Co, Ho, Wo]
    r"""A convolution that is computed only at the output positions that a mask keeps.

    .. math::
        out[n, :, y, x] = mask[n, y, x] \; \big(conv2d(x, weight)[n, :, y, x] + bias\big)
        \qquad \text{where } mask[n, y, x] \ne 0

    with 1 for True, and everything else as in :func:`torch.nn.functional.conv2d`. At the other positions, by
    ``fill``:

    - ``"zero"``: 0.
    - ``"keep"``: ``base[n, :, y, x]``, such as the result for the video frame before.
    - ``"nearest"``: the result at the nearest kept position of the same image (Euclidean distance, ties to
      the lowest y, then the lowest x); 0 in an image without any. This is PerforatedCNNs' interpolation.

    What no tap of a kept position reads is left out: a NaN there reaches neither the result nor a gradient,
    and the padding is never multiplied. Where the mask keeps so much that choosing does not pay (a share that
    depends on the channels, see csrc/rowconv/README.md; on CUDA only with a plan, which knows it), torch's
    own convolution computes all positions, in backward only where all are kept. Infinite weights beside the
    border and the order of the sums are then those of :func:`torch.nn.functional.conv2d`, which may depend on
    the number of threads; ``torch.use_deterministic_algorithms(True)`` excludes that path.

    Gradients: with dy(p) the gradient that reaches the result at a kept position p (with ``"nearest"`` that
    of all its copies, too), x, weight and bias get what a dense convolution gives for mask dy;
    a floating-point mask gets :math:`\sum_c (conv2d + bias) \, dy` where it is not 0, else 0; ``base`` gets
    its gradient where the mask is 0, else 0.

    Args:
        x: [N, Ci, H, W]. float32, float64, bfloat16 or float16. channels_last is faster.
        weight: [Co, Ci / groups, kh, kw].
        mask: [N, Ho, Wo], bool, float32 or of the dtype of ``x``; or a plan of it (:func:`plan_mask`), which
            layers share. A NaN is kept.
        bias: [Co].
        stride, padding, dilation: One number or a pair (vertical, horizontal); at least 1, 0 and 1.
        groups: Blocks of channels that are convolved separately; divides Ci and Co.
        fill: ``"zero"``, ``"keep"`` or ``"nearest"``.
        base: [N, Co, Ho, Wo], with ``fill="keep"`` only.

    Returns:
        [N, Co, Ho, Wo] in the dtype of ``x``; channels_last if ``x`` is channels_last and not contiguous at
        the same time (so is the gradient of ``x``), else contiguous. Computed in float32 (float64 for
        float64) and rounded once.

    Raises:
        ValueError: wrong ranks or sizes, a stride, padding or dilation out of range, a kernel larger than
            the padded ``x``, a mask that does not fit the output, an unknown fill, ``base`` missing or
            unused, tensors on different devices, and on the CPU positions of a plan out of range.
            CUDA kernels skip those (the host never waits for them).
        TypeError: wrong dtypes, or an argument of another kind.
        RuntimeError: no kernels for the device in this installation.

    Differentiable in ``x``, ``weight``, ``bias``, ``base`` and a floating-point mask, once. Deterministic, on
    the CPU for any number of threads, under ``torch.use_deterministic_algorithms(True)``. vmap may
    batch every tensor (with weights or biases of their own, a loop over its members). ``torch.func.grad`` is
    not supported.

    Source: Figurnov et al., "PerforatedCNNs", NIPS 2016; S. Kong, PhD thesis, chapter 4.
    """
    kept = (mask.mask, mask.positions, mask.rows) if isinstance(mask, MaskPlan) else (mask, None, None)
    numbers = (_pair("stride", stride), _pair("padding", padding), _pair("dilation", dilation), groups)
    settings = (*numbers, _fill_number(fill), *kept[1:])
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        return _op(x, weight, kept[0], bias, base, *settings, deterministic)
    except (RuntimeError, TypeError) as error:
        return explain(_NAME, error, lambda: _check(x, weight, kept[0], bias, base, *settings))


def _pair(argument: str, value: int | tuple[int, int]) -> list[int]:
    if isinstance(value, (int, torch.SymInt)):
        return [value, value]
    if not isinstance(value, (tuple, list)):
        kind = type(value).__name__
        raise TypeError(f"{_NAME}: expected {argument} to be an int or a pair of them, got {kind}")
    return list(value)


def _fill_number(fill: str) -> int:
    number = _FILLS.get(fill) if isinstance(fill, str) else None
    if number is None:
        raise ValueError(f'{_NAME}: expected fill "zero", "keep" or "nearest", got {fill!r}')
    return number


def _check(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    base: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    fill: int,
    positions: Tensor | None,
    rows: Tensor | None,
) -> tuple[int, int, int, int]:
    """The metadata checks of csrc/rowconv/perforated_conv2d.h; the shape of the output."""
    check = ShapeChecker(_NAME)
    check.match("x", x, "NCHW")
    check.tensor("weight", weight)
    if weight.dim() != 4:
        raise ValueError(
            f"{_NAME}: expected weight of shape [O, C / groups, kh, kw], got {list(weight.shape)}"
        )
    check.dtype("x", x, *FLOAT_DTYPES)
    check.dtype("weight", weight, x.dtype)
    check.device("weight", weight, "x", x)
    _rowconv.check_groups(_NAME, groups, x.shape[1], weight.shape[0])
    if weight.shape[1] != x.shape[1] // groups:
        expected = f"[O, C / groups={x.shape[1] // groups}, kh, kw]"
        raise ValueError(f"{_NAME}: expected weight of shape {expected}, got {list(weight.shape)}")
    height, width = _output_sides(x, weight, stride, padding, dilation)
    shape = (x.shape[0], weight.shape[0], height, width)
    _check_mask(check, x, mask, shape, positions, rows)
    if bias is not None:
        check.sizes["O"] = weight.shape[0]
        check.match("bias", bias, "O")
        check.dtype("bias", bias, x.dtype)
        check.device("bias", bias, "x", x)
    _check_base(check, x, base, shape, fill)
    check_backend(_NAME, x)
    return shape


def _output_sides(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """As F.conv2d has them."""
    _rowconv.check_pair(_NAME, "stride", stride, 1)
    _rowconv.check_pair(_NAME, "padding", padding, 0)
    _rowconv.check_pair(_NAME, "dilation", dilation, 1)
    sides = []
    for axis, name in enumerate(("rows", "columns")):
        kernel = weight.shape[2 + axis]
        if kernel < 1:
            shape = list(weight.shape)
            raise ValueError(f"{_NAME}: expected weight with a kernel of at least 1 x 1, got {shape}")
        _rowconv.check_dilation(_NAME, "dilation", dilation[axis], kernel, least=1)
        needed = (kernel - 1) * dilation[axis] + 1 - 2 * padding[axis]
        if x.shape[2 + axis] < needed:
            raise ValueError(
                f"{_NAME}: expected x of at least {needed} {name} under this kernel, padding and dilation, "
                f"got {list(x.shape)}"
            )
        sides.append((x.shape[2 + axis] - needed) // stride[axis] + 1)
    return sides[0], sides[1]


def _check_mask(
    check: ShapeChecker,
    x: Tensor,
    mask: Tensor,
    shape: tuple[int, int, int, int],
    positions: Tensor | None,
    rows: Tensor | None,
) -> None:
    check.tensor("mask", mask)
    images, _, height, width = shape
    if mask.dim() != 3 or mask.shape[0] != images or mask.shape[1] != height or mask.shape[2] != width:
        expected = f"[N={images}, Ho={height}, Wo={width}]"
        raise ValueError(f"{_NAME}: expected mask of shape {expected}, got {list(mask.shape)}")
    check.dtype("mask", mask, torch.bool, torch.float32, x.dtype)
    check.device("mask", mask, "x", x)
    if (positions is None) != (rows is None):
        got = "rows" if positions is None else "positions"
        raise ValueError(f"{_NAME}: expected positions and rows of one plan, got only {got}")
    if positions is None or rows is None:
        return
    plan = ShapeChecker(_NAME)
    plan.match("mask", mask, "NYX")
    plan.match("positions", positions, "K")
    plan.match("rows", rows, "NYX")
    for argument, tensor in (("positions", positions), ("rows", rows)):
        check.dtype(argument, tensor, torch.int64)
        check.device(argument, tensor, "x", x)


def _check_base(
    check: ShapeChecker, x: Tensor, base: Tensor | None, shape: tuple[int, int, int, int], fill: int
) -> None:
    if (base is not None) != (fill == _FILLS["keep"]):
        got = "none" if base is None else "one"
        raise ValueError(f'{_NAME}: expected base exactly with fill "keep", got {got}')
    if base is None:
        return
    check.tensor("base", base)
    if base.dim() != 4 or any(size != wanted for size, wanted in zip(base.shape, shape, strict=True)):
        raise ValueError(f"{_NAME}: expected base of shape {list(shape)}, got {list(base.shape)}")
    check.dtype("base", base, x.dtype)
    check.device("base", base, "x", x)


# ------------------------------------------------------------------------------------------ fake


@torch.library.register_fake("effops::perforated_conv2d")
def _fake(x: Tensor, *arguments: Any) -> Tensor:
    return _maps.new_maps(x, _check(x, *arguments[:-1]))  # but whether it is deterministic


@torch.library.register_fake("effops::perforated_conv2d_backward")
def _fake_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    fill: int,
    positions: Tensor | None,
    rows: Tensor | None,
    need_x: bool,
    need_weight: bool,
    need_mask: bool,
    need_bias: bool,
    need_base: bool,
    deterministic: bool,
) -> tuple[Tensor, ...]:
    return (
        _maps.gradient_of(x, need_x),
        weight.new_empty(weight.shape if need_weight else (0,)),
        mask.new_empty(mask.shape if need_mask else (0,)),
        x.new_empty((weight.shape[0],) if need_bias else (0,)),
        _maps.new_maps(x, grad_output.shape) if need_base else x.new_empty((0,)),
    )


# ------------------------------------------------------------------------------------------ autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, mask, bias, _, *ctx.settings, positions, rows, _ = inputs
    ctx.save_for_backward(x, weight, mask, bias, positions, rows)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, positions, rows = ctx.saved_tensors
    need_x, need_weight, need_mask, need_bias, need_base, *_ = ctx.needs_input_grad
    needs = (need_x, need_weight, need_mask, need_bias, need_base)
    deterministic = torch.are_deterministic_algorithms_enabled()
    found = _backward_op(grad_output, *tensors, *ctx.settings, positions, rows, *needs, deterministic)
    gradients = (gradient if need else None for gradient, need in zip(found, needs, strict=True))
    return *gradients, *(None,) * 8


_autograd.install(_NAME, _save, _backward, differentiable=(0, 1, 2, 3, 4))
_autograd.refuse_second_derivatives(_NAME, differentiable=(0, 1, 2, 3, 4))

# ------------------------------------------------------------------------------------------ autocast

# A plan keeps what is not 0: a mask that a cast would round to 0 stays float32.
_CAST, _KEEP = _autocast.CAST, _autocast.KEEP
_autocast.install(_NAME, (_CAST, _CAST, _autocast.FLOAT32, _CAST, _CAST, *(_KEEP,) * 8))

# ------------------------------------------------------------------------------------------ vmap


def _fold(tensor: Tensor | None, in_dim: int | None, size: int) -> Tensor | None:
    return None if tensor is None else _vmap.fold(tensor, in_dim, size)


def _fold_plan(
    positions: Tensor | None, rows: Tensor | None, in_dims: Sequence[int | None], size: int
) -> tuple[Tensor | None, Tensor | None]:
    """Plans of the members of vmap, which keep the same number of positions, as one.

    What is out of range in its member would be of another; it becomes out of range of all.
    """
    if positions is None or rows is None:
        return None, None
    positions = _vmap.move_to_front(positions, in_dims[0], size)
    rows = _vmap.move_to_front(rows, in_dims[1], size)
    cells, count = rows[0].numel(), positions.shape[1]
    member = torch.arange(size, device=rows.device)
    is_cell = (positions >= 0) & (positions < cells)
    positions = torch.where(is_cell, positions + member[:, None] * cells, -1)
    is_row = (rows >= 0) & (rows < count)
    shifted = torch.where(is_row, rows + member[:, None, None, None] * count, size * count)
    return positions.flatten(), torch.where(rows == -1, rows, shifted).flatten(0, 1)


@torch.library.register_vmap("effops::perforated_conv2d")
def _vmap_rule(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
    size = info.batch_size
    x, weight, mask, bias, base, *settings, positions, rows, deterministic = inputs
    if _vmap.must_loop(size, in_dims[1], in_dims[3]):
        return _vmap.loop(_op, inputs, in_dims, size)
    output = _op(
        _vmap.fold(x, in_dims[0], size),
        weight,
        _vmap.fold(mask, in_dims[2], size),
        bias,
        _fold(base, in_dims[4], size),
        *settings,
        *_fold_plan(positions, rows, in_dims[-3:-1], size),
        deterministic,
    )
    return _vmap.unfold(output, size), 0


@torch.library.register_vmap("effops::perforated_conv2d_backward")
def _vmap_backward_rule(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
    size = info.batch_size
    grad_output, x, weight, mask, bias, *settings = inputs[:10]
    positions, rows, *flags = inputs[10:]
    need_x, need_weight, need_mask, need_bias, need_base, _ = flags
    if need_weight or need_bias or _vmap.must_loop(size, in_dims[2], in_dims[4]):
        return _vmap.loop(_backward_op, inputs, in_dims, size)
    gradients = _backward_op(
        _vmap.fold(grad_output, in_dims[0], size),
        _vmap.fold(x, in_dims[1], size),
        weight,
        _vmap.fold(mask, in_dims[3], size),
        bias,
        *settings,
        *_fold_plan(positions, rows, in_dims[10:12], size),
        *flags,
    )
    needs = (need_x, False, need_mask, False, need_base)
    unfolded = tuple(
        _vmap.unfold(gradient, size) if need else gradient
        for gradient, need in zip(gradients, needs, strict=True)
    )
    return unfolded, tuple(0 if need else None for need in needs)


# ------------------------------------------------------------------------------------------ FLOPs


@register_flop_formula(torch.ops.effops.perforated_conv2d)
def _flops(
    x: Any, weight: Any, mask: Any, bias: Any, base: Any, *settings: Any, out_shape: Any = None, **_: Any
) -> int:
    """A multiply-add per kept position and element of the weight.

    What a mask keeps depends on its values: without a plan, whose length tells, all positions are counted.
    """
    return _rowconv.product_flops(weight, _positions(mask, settings[5]))


@register_flop_formula(torch.ops.effops.perforated_conv2d_backward)
def _backward_flops(
    grad_output: Any, x: Any, weight: Any, mask: Any, bias: Any, *settings: Any, **_: Any
) -> int:
    """The same for each of x, the weight and the mask, whose gradient needs the results again."""
    need_x, need_weight, need_mask = settings[7:10]
    products = int(need_x) + int(need_weight) + int(need_mask)
    return products * _rowconv.product_flops(weight, _positions(mask, settings[5]))


def _positions(mask: Any, positions: Any) -> int:
    if positions is not None:
        return positions[0]
    images, height, width = mask
    return images * height * width
