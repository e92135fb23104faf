"""RoIAlign on a pyramid: the definition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from effops.reference._bilinear import (
    Pyramid,
    check_floating,
    check_ids,
    check_shape,
    compute_dtype,
    flatten_pyramid,
    sample,
)

_OP = "roi_align"


class _Axis(NamedTuple):
    """Where the bins and samples of every RoI lie on one axis of its map, in pixels."""

    side: Tensor  # [R] int64, pixels of the map
    first: Tensor  # [R], where the first bin begins
    bin: Tensor  # [R], length of a bin
    samples: list[int]  # [R], per bin


def roi_align(
    pyramid: Sequence[Tensor],
    rois: Tensor,
    level: Tensor,
    output_size: int | tuple[int, int],
    sampling_ratio: int = 0,
    aligned: bool = True,
    *,
    strides: Sequence[float],
) -> Tensor:
    """Average of bilinear samples in each bin of a box, each box on its own map.

        out[r, :, i, j] = 1 / (n_y n_x) * sum over a < n_y, b < n_x of  v(x_jb, y_ia)
        y_ia = y1 + i bin + (a + 0.5) bin / n_y,    bin = (y2 - y1) / h,    the same in x

    where (x1, y1, x2, y2) is the box divided by the stride of its map, minus 0.5. With aligned=False
    nothing is subtracted and each side (y2 - y1, x2 - x1) is made at least 1.

    Border rule: v(x, y) = 0 if y < -1 or y > H (the same in x); otherwise x and y are clamped to
    [0, W - 1] and [0, H - 1] and the map is interpolated bilinearly.

    Samples per bin and axis: n = sampling_ratio if that is > 0, otherwise adaptive,

        n = min(ceil(bin), 2 * side + 2)  if bin > 0,  else 0        (side: H for y, W for x)

    which is torchvision's ceil(bin) for every box at most h * (2 H + 2) pixels of its map high and
    w * (2 W + 2) wide; a larger bin lies for the greater part outside the map, and its samples are
    spread further than a pixel apart. A bin without samples gives 0: adaptive sampling of an empty or
    inverted box, and any RoI with a NaN or infinite coordinate.

    There is no gradient to the boxes.

    Args:
        pyramid: L >= 1 maps [B, C, H_l, W_l] of one dtype.
        rois: [R, 5], (batch, x1, y1, x2, y2), the box in pixels of the image; batch is truncated to an
            integer.
        level: [R] int64, the map of each RoI.
        output_size: (h, w), or one number for both.
        sampling_ratio: samples per bin and axis; 0 or less: adaptive.
        aligned: whether pixel centres lie at half-integer image coordinates.
        strides: image pixels per pixel of each map, one number per map.

    Returns:
        [R, C, h, w], dtype of the maps. Computed in the promoted dtype of maps and rois, at least
        float32 (float32 boxes beside half maps lose nothing), and rounded once.

    Raises:
        ValueError: shapes that do not fit together, ids out of range, an output
            size below 1, a stride that is not positive and finite.
        TypeError: maps or rois that are not floating point, levels that are not int64.

    Source: He et al., Mask R-CNN, ICCV 2017; border rule and aligned as in torchvision.
    """
    height, width = (output_size, output_size) if isinstance(output_size, int) else output_size
    if height < 1 or width < 1:
        raise ValueError(f"{_OP}: expected output_size of at least 1, got {output_size}")
    check_floating(_OP, "rois", rois)
    check_shape(_OP, "rois", rois, "RX", (None, 5))
    check_shape(_OP, "level", level, "R", (len(rois),))
    dtype = compute_dtype(*pyramid, rois)
    maps = flatten_pyramid(_OP, pyramid, dtype)
    _check_strides(strides, len(pyramid))
    check_ids(_OP, "level", level, len(pyramid))
    batch = _batch_ids(rois[:, 0], len(maps.rows))

    stride = torch.tensor(strides, dtype=dtype, device=rois.device)[level]
    corners = rois[:, 1:].detach().to(dtype) / stride[:, None]
    if aligned:
        corners = corners - 0.5
    x1, y1, x2, y2 = corners.unbind(1)
    x_axis = _axis(x1, x2, maps.width[level], width, sampling_ratio, aligned)
    y_axis = _axis(y1, y2, maps.height[level], height, sampling_ratio, aligned)

    out = [maps.rows[:0, 0, :, None, None].expand(-1, -1, height, width)]  # R = 0 has a gradient too
    for roi, (image, start) in enumerate(zip(batch, maps.start[level].tolist(), strict=True)):
        x = _sample_positions(x_axis, roi, width)
        y = _sample_positions(y_axis, roi, height)
        out.append(_align(maps, image, start, x, y, x_axis.side[roi], y_axis.side[roi])[None])
    return torch.cat(out).to(pyramid[0].dtype)


def _axis(first: Tensor, last: Tensor, side: Tensor, bins: int, sampling_ratio: int, aligned: bool) -> _Axis:
    size = last - first if aligned else (last - first).clamp(min=1)
    bin_size = size / bins
    if sampling_ratio > 0:
        count = torch.full_like(side, sampling_ratio)
    else:
        most = (2 * side + 2).to(bin_size)
        count = torch.where(bin_size > 0, torch.minimum(bin_size.ceil(), most), 0).long()
    return _Axis(side, first, bin_size, count.tolist())


def _sample_positions(axis: _Axis, roi: int, bins: int) -> Tensor:
    """Coordinates [bins, n] of the samples of a RoI on one axis."""
    step = axis.bin[roi]
    count = axis.samples[roi]
    i = torch.arange(bins, dtype=step.dtype, device=step.device)[:, None]
    a = torch.arange(count, dtype=step.dtype, device=step.device)
    return axis.first[roi] + i * step + (a + 0.5) * step / count


def _align(
    maps: Pyramid, image: int, start: int, x: Tensor, y: Tensor, width: Tensor, height: Tensor
) -> Tensor:
    """One RoI, [C, h, w], from the sample positions x [w, n_x] and y [h, n_y]."""
    samples = max(x.shape[1] * y.shape[1], 1)
    y = y[:, :, None, None]  # the samples have shape [h, n_y, w, n_x]
    active = (x >= -1) & (x <= width) & (y >= -1) & (y <= height)
    x = torch.minimum(x.clamp(min=0), width - 1)
    y = torch.minimum(y.clamp(min=0), height - 1)
    sampled = sample(lambda pixel: maps.rows[image, start + pixel], x, y, height, width, active)
    return (sampled.sum((1, 3)) / samples).permute(2, 0, 1)


def _batch_ids(column: Tensor, batch: int) -> list[int]:
    wrong = column[~((column >= 0) & (column < batch))]
    if wrong.numel() > 0:
        raise ValueError(f"{_OP}: expected rois[:, 0] in [0, {batch}), got {float(wrong[0])}")
    return [int(image) for image in column.tolist()]


def _check_strides(strides: Sequence[float], levels: int) -> None:
    if len(strides) != levels:
        raise ValueError(f"{_OP}: expected strides of length {levels}, one per map, got {len(strides)}")
    if not all(stride > 0 and math.isfinite(stride) for stride in strides):
        raise ValueError(f"{_OP}: expected strides that are positive and finite, got {tuple(strides)}")
