"""What the ops on an SPS share: its five tensors, their checks, and the members of vmap as one SPS."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effops._sps import SPS
from effops.ops import _autocast, _vmap
from effops.ops._checks import FLOAT_DTYPES, ShapeChecker

#: active, passive, index_map, roi, xy
Fields = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

AUTOCAST = (_autocast.CAST, _autocast.CAST, _autocast.KEEP, _autocast.KEEP, _autocast.KEEP)


def fields_of(op: str, sps: SPS) -> Fields:
    """The tensors in the order of the ops' arguments; raises TypeError for anything but an SPS."""
    if not isinstance(sps, SPS):
        raise TypeError(f"{op}: expected sps to be an SPS, got {type(sps).__name__}")
    return sps.active, sps.passive, sps.index_map, sps.roi, sps.xy


def need_int64(rows: int) -> bool:
    """Whether the ids of so many rows need int64.

    Under ``torch.compile`` a number that varies is taken for one of fewer than 2^31: a guard on it would be
    one on a product of sizes, which torch.export refuses.
    """
    if isinstance(rows, int):
        return rows > 2**31 - 1
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

    return statically_known_true(rows > 2**31 - 1)


def check_sps(
    check: ShapeChecker, active: Tensor, passive: Tensor, index_map: Tensor, roi: Tensor, xy: Tensor
) -> None:
    """The metadata checks of csrc/rowconv/sps.h; puts A, P, F, R, H and W into ``check.sizes``.

    The sides of the map, which must be below 2^31, are left to the kernel, so that they stay dynamic.
    """
    check.match("active", active, "AF")
    check.match("passive", passive, "PF")
    check.match("index_map", index_map, "RHW")
    check.match("roi", roi, "A")
    check.match("xy", xy, "A2")
    check.dtype("active", active, *FLOAT_DTYPES)
    check.dtype("passive", passive, active.dtype)
    check.dtype("index_map", index_map, torch.int32, torch.int64)
    check.dtype("roi", roi, torch.int32)
    check.dtype("xy", xy, torch.int32)
    for argument, tensor in (("passive", passive), ("index_map", index_map), ("roi", roi), ("xy", xy)):
        check.device(argument, tensor, "active", active)


# ------------------------------------------------------------------------------------------ vmap


def fold_sps(fields: Sequence[Tensor], in_dims: Sequence[int | None], size: int) -> Fields:
    """The members of vmap as one SPS: the maps of all, the active rows of all, the passive rows of all.

    Ids and maps that are out of range in their member would be those of another; they become -1.
    """
    active, passive, index_map, roi, xy = (
        _vmap.move_to_front(tensor, in_dim, size) for tensor, in_dim in zip(fields, in_dims, strict=True)
    )
    actives, rows = active.shape[1], active.shape[1] + passive.shape[1]
    member = torch.arange(size, device=active.device)
    of_map = member[:, None, None, None]
    new_active = index_map + of_map * actives
    new_passive = index_map + ((size - 1) * actives + of_map * (rows - actives))
    ids = torch.where(index_map < actives, new_active, new_passive)
    ids = torch.where((index_map >= 0) & (index_map < rows), ids, -1)
    id_dtype = torch.int64 if need_int64(size * rows) else index_map.dtype
    maps = index_map.shape[1]
    map_ids = torch.where((roi >= 0) & (roi < maps), roi + member[:, None] * maps, -1)
    return (
        active.flatten(0, 1),
        passive.flatten(0, 1),
        ids.to(id_dtype).flatten(0, 1),
        map_ids.to(torch.int32).flatten(),
        xy.flatten(0, 1),
    )


def unfold_gradients(gradients: Sequence[Tensor], needed: Sequence[bool], size: int) -> tuple[Any, Any]:
    """Gradients of an SPS made by :func:`fold_sps`, [size * rows, F], as those of each member."""
    unfolded = tuple(
        _vmap.unfold(gradient, size) if need else gradient
        for gradient, need in zip(gradients, needed, strict=True)
    )
    return unfolded, tuple(0 if need else None for need in needed)
