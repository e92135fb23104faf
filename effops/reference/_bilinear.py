"""Bilinear reads at computed points, on one map or on every map of a pyramid.

Pixel (column i, row j) of a map has its centre at x = i, y = j; normalised coordinates are turned
into pixels with align_corners=False:  x = loc_x * W - 0.5,  y = loc_y * H - 0.5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Pyramid(NamedTuple):
    """A list of maps as one table of pixels: pixel (x, y) of map l is row start[l] + y * width[l] + x."""

    rows: Tensor  # [B, S + 1, C], S = sum(H_l * W_l); the last row is 0, to read where a map has no pixels
    height: Tensor  # [L] int64
    width: Tensor  # [L] int64
    start: Tensor  # [L] int64


def to_pixels(xy: Tensor, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised coordinates [..., 2] to pixel coordinates x and y, each [...]."""
    return xy[..., 0] * width - 0.5, xy[..., 1] * height - 0.5


def is_active(x: Tensor, y: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Whether a point has a corner inside the map: -1 < x < W and -1 < y < H. NaN and Inf do not."""
    return (x > -1) & (x < width) & (y > -1) & (y < height)


def sample(
    read: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    height: Tensor,
    width: Tensor,
    active: Tensor,
) -> Tensor:
    """Bilinear interpolation; corners outside the map read as 0, and so does every inactive point.

    v(x, y) = (1-fx)(1-fy) v[y0, x0] + fx(1-fy) v[y0, x0+1] + (1-fx)fy v[y0+1, x0] + fx fy v[y0+1, x0+1]

    with x0 = floor(x), fx = x - x0 and the same in y. What is not read is masked before any product,
    so that its NaN or Inf reaches neither the result nor a gradient.

    Args:
        read: the vectors [..., C] at pixels y * width + x, an int64 tensor [...] of pixels in the map.
        x, y: pixel coordinates; they, height, width and active broadcast to the shape [...] of points.
        height, width: int64, size of the map of each point.
        active: bool; where False, x and y may be anything.

    Returns:
        [..., C]
    """
    x = torch.where(active, x, 0.0)
    y = torch.where(active, y, 0.0)
    x0 = x.detach().floor().long()
    y0 = y.detach().floor().long()
    fx, fy = x - x0, y - y0

    def corner(column: Tensor, row: Tensor, weight: Tensor) -> Tensor:
        inside = active & (column >= 0) & (column < width) & (row >= 0) & (row < height)
        pixel = torch.where(inside, row * width + column, 0)
        return weight[..., None] * torch.where(inside[..., None], read(pixel), 0.0)

    return (
        corner(x0, y0, (1 - fx) * (1 - fy))
        + corner(x0 + 1, y0, fx * (1 - fy))
        + corner(x0, y0 + 1, (1 - fx) * fy)
        + corner(x0 + 1, y0 + 1, fx * fy)
    )


def flatten_pyramid(op: str, pyramid: Sequence[Tensor], dtype: torch.dtype) -> Pyramid:
    """Check the maps [B, C, H_l, W_l] of a pyramid and lay them out as one table, in `dtype`."""
    check_pyramid(op, pyramid)
    sizes = torch.tensor([feature.shape[2:] for feature in pyramid], device=pyramid[0].device)
    height, width = sizes.unbind(1)
    area = height * width
    maps = [feature.to(dtype).flatten(2) for feature in pyramid]
    rows = torch.cat([*maps, maps[0].new_zeros(*maps[0].shape[:2], 1)], dim=2)
    return Pyramid(rows.transpose(1, 2), height, width, area.cumsum(0) - area)


def check_pyramid(op: str, pyramid: Sequence[Tensor]) -> None:
    """At least one map; all of one batch size, channel count and floating dtype."""
    if len(pyramid) == 0:
        raise ValueError(f"{op}: expected at least one map in pyramid, got none")
    for index, feature in enumerate(pyramid):
        name = f"pyramid[{index}]"
        check_floating(op, name, feature)
        check_shape(op, name, feature, "BCHW", (*pyramid[0].shape[:2], None, None))
        if feature.dtype != pyramid[0].dtype:
            raise TypeError(f"{op}: expected {name} of dtype {pyramid[0].dtype}, got {feature.dtype}")


def check_ids(op: str, name: str, ids: Tensor, end: int) -> None:
    """Ids must be int64 in [0, end)."""
    if ids.dtype != torch.int64:
        raise TypeError(f"{op}: expected {name} of dtype torch.int64, got {ids.dtype}")
    wrong = ids[(ids < 0) | (ids >= end)]
    if wrong.numel() > 0:
        raise ValueError(f"{op}: expected {name} in [0, {end}), got {int(wrong[0])}")


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: expected {name} of a floating-point dtype, got {tensor.dtype}")


def check_shape(op: str, name: str, tensor: Tensor, letters: str, sizes: Sequence[int | None]) -> None:
    """One letter and one size per dimension; None matches any size."""
    shape = list(tensor.shape)
    fits = len(shape) == len(sizes) and all(
        want is None or got == want for got, want in zip(shape, sizes, strict=True)
    )
    if not fits:
        pairs = zip(letters, sizes, strict=True)
        expected = ", ".join(letter if size is None else f"{letter}={size}" for letter, size in pairs)
        raise ValueError(f"{op}: expected {name} of shape [{expected}], got {shape}")


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: the promoted dtype of the inputs, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
