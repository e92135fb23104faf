"""Convolution at the positions that a mask keeps: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from effops._mask_plan import MaskPlan
from effops.reference._bilinear import check_floating, check_shape, compute_dtype
from effops.reference._rowconv import (
    Cells,
    cells_of,
    check_at_least,
    check_dtype,
    check_groups,
    convolve,
    dense_map,
    to_map,
)
from effops.reference.plan_mask import check_mask, plan_mask

_OP = "perforated_conv2d"


def perforated_conv2d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | MaskPlan,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    fill: str = "zero",
    base: Tensor | None = None,
) -> Tensor:
    """A convolution that computes only the output positions that a mask keeps, those where it is not 0.

        out[n, :, y, x] = mask[n, y, x] (conv2d(x, weight)[n, :, y, x] + bias)    where mask[n, y, x] != 0

    with 1 for True. Elsewhere, by the fill,

        "zero"      0
        "keep"      base[n, :, y, x]
        "nearest"   the result at the kept position of the same image that has the smallest Euclidean
                    distance, ties going to the lowest y, then the lowest x; 0 in an image without any

    What no tap of a kept position reads is not touched: its NaN or Inf reaches neither the result nor a
    gradient. Nor are pixels of the padding, which are left out of the sums, not multiplied.

    Gradients: the result at a kept position receives its own gradient and, with "nearest", that of all its
    copies. A floating-point mask gets the sum over the channels of that gradient times (conv2d + bias) where
    it is not 0, and 0 elsewhere; base gets its gradient where the mask is 0.

    Args:
        x: [N, Ci, H, W].
        weight: [Co, Ci / groups, kh, kw].
        mask: [N, Ho, Wo], bool, float32 or of the dtype of x; or the plan of one (:func:`plan_mask`).
        bias: [Co].
        stride, padding, dilation: one number, or (vertical, horizontal); as in
            :func:`torch.nn.functional.conv2d`.
        groups: blocks of channels that are convolved separately.
        fill: "zero", "keep" or "nearest".
        base: [N, Co, Ho, Wo], with the fill "keep" only.

    Returns:
        [N, Co, Ho, Wo], dtype of x; channels_last if x is channels_last and not contiguous at the same time.
        Computed in the promoted dtype of x and a floating-point mask, at least float32, and rounded once.

    Raises:
        ValueError: shapes that do not fit together, a stride, padding or dilation too small, a fill that does
            not exist or does not go with base.
        TypeError: wrong dtypes.

    Source: Figurnov et al., PerforatedCNNs, NIPS 2016 ("nearest"); S. Kong, PhD thesis, chapter 4.
    """
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    check_at_least(_OP, "stride", stride, 1)
    check_at_least(_OP, "padding", padding, 0)
    check_at_least(_OP, "dilation", dilation, 1)
    height, width = _check_tensors(x, weight, bias, stride, padding, dilation, groups)
    plan = mask if isinstance(mask, MaskPlan) else plan_mask(_checked_mask(mask))
    _check_plan(plan, x, height, width)
    _check_fill(fill, base, x, (len(x), len(weight), height, width))

    is_float = plan.mask.is_floating_point()
    dtype = compute_dtype(x, plan.mask) if is_float else compute_dtype(x)
    rows, ids = dense_map(x, dtype)
    cells = cells_of(plan.positions, height, width)
    first = Cells(cells.map, cells.y * stride[0] - padding[0], cells.x * stride[1] - padding[1])
    kept = convolve(rows, ids, first, weight.to(dtype), dilation, groups)
    if bias is not None:
        kept = kept + bias.to(dtype)
    if is_float:
        kept = kept * plan.mask.flatten()[plan.positions].to(dtype)[:, None]

    if fill == "nearest":
        source = _nearest(plan.positions, len(x), height, width)
        out = torch.cat([kept, kept.new_zeros(1, len(weight))])[source]  # -1 is the last row
    elif base is not None:
        out = base.to(dtype).permute(0, 2, 3, 1).flatten(0, 2).index_copy(0, plan.positions, kept)
    else:
        out = kept.new_zeros(len(x) * height * width, len(weight)).index_copy(0, plan.positions, kept)
    return to_map(out, x, height, width)


def _nearest(positions: Tensor, batch: int, height: int, width: int) -> Tensor:
    """For each position the row of the nearest of the kept ones in its image, or -1, [N * H * W]."""
    kept = cells_of(positions, height, width)
    cells = cells_of(torch.arange(height * width, device=positions.device), height, width)
    nearest = torch.full((batch, height * width), -1, device=positions.device)
    for image in range(batch):
        rows = (kept.map == image).nonzero()[:, 0]
        if len(rows) > 0:
            dy, dx = cells.y[:, None] - kept.y[rows], cells.x[:, None] - kept.x[rows]
            nearest[image] = rows[(dy**2 + dx**2).argmin(dim=1)]  # the first of equal ones
    return nearest.flatten()


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else value
    return first, second


def _check_tensors(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> tuple[int, int]:
    """The sides of the output."""
    check_shape(_OP, "x", x, "NCHW", (None, None, None, None))
    check_shape(_OP, "weight", weight, "OCkk", (None, None, None, None))
    check_groups(_OP, groups, x.shape[1], len(weight))
    check_shape(_OP, "weight", weight, "OCkk", (None, x.shape[1] // groups, None, None))
    check_floating(_OP, "x", x)
    check_dtype(_OP, "weight", weight, x.dtype)
    if bias is not None:
        check_shape(_OP, "bias", bias, "O", (len(weight),))
        check_dtype(_OP, "bias", bias, x.dtype)
    sides = []
    for axis in (0, 1):
        kernel = weight.shape[2 + axis]
        least = (kernel - 1) * dilation[axis] + 1 - 2 * padding[axis]
        if kernel < 1 or x.shape[2 + axis] < least:
            raise ValueError(
                f"{_OP}: expected a kernel of at least 1 x 1 that fits into the padded x, "
                f"got weight {list(weight.shape)} and x {list(x.shape)}"
            )
        sides.append((x.shape[2 + axis] - least) // stride[axis] + 1)
    return sides[0], sides[1]


def _checked_mask(mask: Tensor) -> Tensor:
    check_mask(_OP, mask)
    return mask


def _check_plan(plan: MaskPlan, x: Tensor, height: int, width: int) -> None:
    check_mask(_OP, plan.mask)
    check_shape(_OP, "mask", plan.mask, "NHW", (len(x), height, width))
    check_dtype(_OP, "mask", plan.mask, torch.bool, torch.float32, x.dtype)


def _check_fill(fill: str, base: Tensor | None, x: Tensor, shape: tuple[int, ...]) -> None:
    if fill not in ("zero", "keep", "nearest"):
        raise ValueError(f'{_OP}: expected fill "zero", "keep" or "nearest", got {fill!r}')
    if (base is not None) != (fill == "keep"):
        got = "none" if base is None else "one"
        raise ValueError(f'{_OP}: expected base exactly with the fill "keep", got {got} with {fill!r}')
    if base is not None:
        check_shape(_OP, "base", base, "NOHW", shape)
        check_dtype(_OP, "base", base, x.dtype)
