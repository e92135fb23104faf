"""Bilinear samples of a pyramid at single points: the definition."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from effops.reference._bilinear import (
    check_floating,
    check_ids,
    check_shape,
    compute_dtype,
    flatten_pyramid,
    is_active,
    sample,
    to_pixels,
)

_OP = "point_sample"


def point_sample(pyramid: Sequence[Tensor], batch: Tensor, level: Tensor, xy: Tensor) -> Tensor:
    """One bilinear sample per point, each from its own image and map.

        out[n] = v(x, y),  x = xy[n, 0] * W - 0.5,  y = xy[n, 1] * H - 0.5

    v interpolates the map pyramid[level[n]][batch[n]] of size H x W bilinearly, with 0 outside the map
    (align_corners=False). A point is active iff -1 < x < W and -1 < y < H. Any other point, among them
    those with a NaN or infinite coordinate, gives 0 with gradient 0.

    Args:
        pyramid: L >= 1 maps [B, C, H_l, W_l] of one dtype.
        batch: [N] int64, the image of each point.
        level: [N] int64, the map of each point.
        xy: [N, 2], (x, y), 0 and 1 being the outer edges of the map.

    Returns:
        [N, C], dtype of the maps. Computed in the promoted dtype of maps and xy, at least float32
        (float32 coordinates beside half maps lose nothing), and rounded once.

    Raises:
        ValueError: shapes that do not fit together, ids out of range.
        TypeError: maps or xy that are not floating point, ids that are not int64.

    Source: Kirillov et al., PointRend, CVPR 2020.
    """
    check_floating(_OP, "xy", xy)
    check_shape(_OP, "xy", xy, "NX", (None, 2))
    check_shape(_OP, "batch", batch, "N", (len(xy),))
    check_shape(_OP, "level", level, "N", (len(xy),))
    dtype = compute_dtype(*pyramid, xy)
    maps = flatten_pyramid(_OP, pyramid, dtype)
    check_ids(_OP, "batch", batch, len(maps.rows))
    check_ids(_OP, "level", level, len(pyramid))

    height, width, start = maps.height[level], maps.width[level], maps.start[level]  # each [N]
    x, y = to_pixels(xy.to(dtype), height, width)
    active = is_active(x, y, height, width)
    sampled = sample(lambda pixel: maps.rows[batch, start + pixel], x, y, height, width, active)
    return sampled.to(pyramid[0].dtype)
