"""What the entries of the rowconv engine share: SPS, right and wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from effops._sps import SPS
from effops.testing._info import Maker, Sizes

FIELDS = ("active", "passive", "index_map", "roi", "xy")

#: Sizes of an SPS by name, each of which may be 0, for OpInfo.size_ranges.
SPS_RANGES = {"R": range(4), "H": range(6), "W": range(6), "NA": range(30), "NP": range(30)}


def make_sps(make: Maker, sizes: Sizes, features: int, wide: bool = False) -> SPS:
    """A random SPS of R maps of H x W cells with NA active rows in random order and NP passive rows.

    A passive row stands in a random number of cells, maybe in none. There are at most as many active rows
    as cells, and just as many if there are no passive rows for the rest.
    """
    maps, height, width = sizes["R"], sizes["H"], sizes["W"]
    cells = maps * height * width
    actives = cells if sizes["NP"] == 0 else min(sizes["NA"], cells)
    where = make.permutation(cells)[:actives]
    ids = actives + make.integers(cells, high=sizes["NP"])
    ids[where] = torch.arange(actives, device=make.device)
    y, x = where // max(width, 1) % max(height, 1), where % max(width, 1)
    return SPS(
        make.normal(actives, features),
        make.normal(sizes["NP"], features),
        ids.view(maps, height, width).to(torch.int64 if wide else torch.int32),
        (where // max(height * width, 1)).int(),
        torch.stack([x, y], dim=1).int(),
    )


def fields_of(sps: SPS) -> tuple[Tensor, ...]:
    """The arguments that stand for an SPS in torch.ops, and in sps_conv2d."""
    return sps.active, sps.passive, sps.index_map, sps.roi, sps.xy


Change = tuple[str, type[Exception], str, dict[str, Any]]  # name, error, blamed, fields


def wrong_fields(good: SPS) -> Iterator[Change]:
    """Fields that every op refuses by their metadata, starting from F >= 2 features and NA >= 2 rows."""
    for field in FIELDS:
        tensor: Tensor = getattr(good, field)
        # Whoever shows a size second is blamed.
        features, rows = ("passive" if field == "active" else field), ("roi" if field == "active" else field)
        yield f"{field}_rank_low", ValueError, field, {field: tensor[0]}
        yield f"{field}_rank_high", ValueError, field, {field: tensor[None]}
        if field in ("active", "passive"):
            yield f"{field}_of_fewer_features", ValueError, features, {field: tensor[:, 1:]}
            yield f"{field}_without_features", ValueError, features, {field: tensor[:, :0]}
        if field in ("active", "roi", "xy"):
            yield f"{field}_short", ValueError, rows, {field: tensor[1:]}
            yield f"{field}_none", ValueError, rows, {field: tensor[:0]}
        blamed = "passive" if field == "active" else field
        yield f"{field}_on_meta", ValueError, blamed, {field: tensor.to("meta")}
        yield f"{field}_complex", TypeError, field, {field: tensor.to(torch.complex64)}
        yield f"{field}_bool", TypeError, field, {field: tensor.bool()}
        yield f"{field}_missing", TypeError, field, {field: None}
        yield f"{field}_a_list", TypeError, field, {field: tensor.tolist()}
    yield "xy_of_three", ValueError, "xy", {"xy": good.xy.new_zeros(len(good.xy), 3)}
    yield "active_float64", TypeError, "passive", {"active": good.active.double()}
    yield "passive_bfloat16", TypeError, "passive", {"passive": good.passive.bfloat16()}
    both = {"active": good.active.long(), "passive": good.passive.long()}
    yield "features_int64", TypeError, "active", both
    yield "index_map_int16", TypeError, "index_map", {"index_map": good.index_map.short()}
    yield "index_map_float", TypeError, "index_map", {"index_map": good.index_map.float()}
    yield "roi_int64", TypeError, "roi", {"roi": good.roi.long()}
    yield "xy_int64", TypeError, "xy", {"xy": good.xy.long()}


def wrong_ids(good: SPS) -> Iterator[Change]:
    """Ids that belong to no row, seen by their values only, and a map too wide."""
    rows = len(good.active) + len(good.passive)
    for value in (-1, rows, 2**31 - 1, -(2**31)):
        ids = good.index_map.clone()
        ids[-1, -1, -1] = value
        yield f"id_{value}", ValueError, "index_map", {"index_map": ids}
    for value in (rows + 2**32, -(2**63)):
        ids = good.index_map.long()
        ids[0, 0, 0] = value
        yield f"wide_id_{value}", ValueError, "index_map", {"index_map": ids}
    none = {"active": good.active[:0], "roi": good.roi[:0], "xy": good.xy[:0], "passive": good.passive[:0]}
    wide = good.index_map[:1, :1, :1].expand(1, 1, 2**31)  # fake kernels don't look: sides stay dynamic
    yield "too_wide", ValueError, "index_map", {"index_map": wide}
    yield "no_rows", ValueError, "index_map", none


def wrong_cells(good: SPS) -> Iterator[Change]:
    """Active cells outside the maps, seen by their values only."""
    maps, height, width = good.index_map.shape
    for value in (-1, maps, 2**31 - 1):
        roi = good.roi.clone()
        roi[-1] = value
        yield f"roi_{value}", ValueError, "roi", {"roi": roi}
    for column, end in ((0, width), (1, height)):
        for value in (-1, end, -(2**31)):
            xy = good.xy.clone()
            xy[-1, column] = value
            yield f"{'xy'[column]}_{value}", ValueError, "xy", {"xy": xy}
    yield "no_maps", ValueError, "roi", {"index_map": good.index_map[:0]}
