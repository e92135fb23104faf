"""Convolution at single cells of maps whose features are rows of a table, found through a map of ids."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from effops._sps import SPS, check_ranges
from effops.reference._bilinear import check_floating, check_shape
from effops.reference._maps import in_format_of


class Cells(NamedTuple):
    """Some cells (x, y), each of one map; they may lie outside it."""

    map: Tensor  # [n] int64
    y: Tensor  # [n] int64
    x: Tensor  # [n] int64


def convolve(
    rows: Tensor,  # [M, F]
    ids: Tensor,  # [R, H, W]
    first: Cells,
    weight: Tensor,  # [O, F / groups, kh, kw]
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:  # [n, O]
    """Cross-correlation of the maps rows[ids] with a kernel whose tap (0, 0) lies at the cells `first`.

        out[i] = sum over taps (u, v) with (y_i + u d_y, x_i + v d_x) in the map of
                 weight[:, :, u, v] rows[ids[map_i, y_i + u d_y, x_i + v d_x]]

    A tap outside the map is left out of the sum: nothing is multiplied by a padding of 0, which would make
    NaN of an infinite weight, in the result or in a gradient.
    """
    out_channels, _, kernel_height, kernel_width = weight.shape
    height, width = ids.shape[1:]
    group_rows = rows.unflatten(1, (groups, weight.shape[1]))  # [M, groups, F / groups]
    group_weight = weight.unflatten(0, (groups, out_channels // groups))
    out = rows.new_zeros(len(first.map), groups, out_channels // groups)
    for u in range(kernel_height):
        for v in range(kernel_width):
            y, x = first.y + u * dilation[0], first.x + v * dilation[1]
            inside = ((y >= 0) & (y < height) & (x >= 0) & (x < width)).nonzero()[:, 0]
            read = group_rows[ids[first.map[inside], y[inside], x[inside]].long()]
            product = torch.einsum("ngf,gof->ngo", read, group_weight[..., u, v])
            out = out.index_add(0, inside, product)
    return out.flatten(1)


class DenseMap(NamedTuple):
    """Maps [N, C, H, W] as rows; every cell has a row of its own."""

    rows: Tensor  # [N * H * W, C]
    ids: Tensor  # [N, H, W] int64


def dense_map(x: Tensor, dtype: torch.dtype) -> DenseMap:
    batch, _, height, width = x.shape
    ids = torch.arange(batch * height * width, device=x.device).view(batch, height, width)
    return DenseMap(x.to(dtype).permute(0, 2, 3, 1).flatten(0, 2), ids)


def to_map(rows: Tensor, like: Tensor, height: int, width: int) -> Tensor:
    """Rows [N * H * W, C] as maps [N, C, H, W], in the dtype of the maps `like`.

    Channels_last if `like` is channels_last and not contiguous at the same time.
    """
    maps = rows.unflatten(0, (len(like), height, width)).permute(0, 3, 1, 2)
    return in_format_of(maps.to(like.dtype), like)


def cells_of(positions: Tensor, height: int, width: int) -> Cells:
    """The cells of flat positions map * H * W + y * W + x."""
    return Cells(positions // (height * width), positions // width % height, positions % width)


def table(sps: SPS, dtype: torch.dtype) -> Tensor:
    """The features of all ids, [NA + NP, F]."""
    return torch.cat([sps.active, sps.passive]).to(dtype)


def id_dtype(index_map: Tensor, count: int) -> torch.dtype:
    """The dtype of a map of ids < count that comes from another map."""
    return torch.int64 if count >= 2**31 else index_map.dtype


def check_sps(op: str, sps: SPS) -> None:
    """Shapes, dtypes and ranges; not that index_map, roi and xy agree, which no op relies on."""
    check_shape(op, "active", sps.active, "AF", (None, None))
    active, features = sps.active.shape
    check_shape(op, "passive", sps.passive, "PF", (None, features))
    check_shape(op, "index_map", sps.index_map, "RHW", (None, None, None))
    check_shape(op, "roi", sps.roi, "A", (active,))
    check_shape(op, "xy", sps.xy, "AX", (active, 2))
    check_floating(op, "active", sps.active)
    check_dtype(op, "passive", sps.passive, sps.active.dtype)
    check_dtype(op, "index_map", sps.index_map, torch.int32, torch.int64)
    check_dtype(op, "roi", sps.roi, torch.int32)
    check_dtype(op, "xy", sps.xy, torch.int32)
    check_ranges(op, sps.active, sps.passive, sps.index_map, sps.roi, sps.xy)


def check_dtype(op: str, name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    if tensor.dtype not in allowed:
        names = " or ".join(map(str, allowed))
        raise TypeError(f"{op}: expected {name} of dtype {names}, got {tensor.dtype}")


def check_groups(op: str, groups: int, in_channels: int, out_channels: int) -> None:
    if groups < 1 or in_channels % groups != 0 or out_channels % groups != 0:
        raise ValueError(
            f"{op}: expected groups >= 1 that divides {in_channels} input and {out_channels} output "
            f"channels, got {groups}"
        )


def check_at_least(op: str, name: str, values: tuple[int, ...], least: int) -> None:
    if min(values, default=least) < least:
        raise ValueError(f"{op}: expected {name} >= {least}, got {min(values)}")
