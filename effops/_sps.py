"""The data structure of structure-preserving sparsity: maps of which only some cells are computed anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

_SHAPES = {
    "active": ("NA", "F"),
    "passive": ("NP", "F"),
    "index_map": ("R", "H", "W"),
    "roi": ("NA",),
    "xy": ("NA", "XY"),
}


@dataclass(eq=False, repr=False)
class SPS:
    """Structure-preserving sparsity: R maps of H x W cells with F features each, stored as rows.

    The cells in which new features are wanted are *active*, all others *passive*. A map of ids keeps the
    place of every feature, so that an op on an active cell finds whatever lies around it, passive features
    included; it computes new features for active cells only, and copies nothing. The feature of a cell is

        cat([active, passive])[index_map[r, y, x]]

    Ids below NA are active; each stands in exactly one cell, which ``roi`` and ``xy`` name, so that
    ``index_map[roi[i], xy[i, 1], xy[i, 0]] == i``. Ids from NA on are passive; each stands in any number of
    cells (after an upsampling a passive row serves all cells that it covers), or in none.

    Made by :func:`effops.sps_from_dense` and :func:`effops.sps_refine`; an op on rows alone, such as a
    linear layer, is applied to ``active`` (and, if it changes the number of features, to ``passive``), and
    :func:`dataclasses.replace` puts its result in. A pytree: it passes through ``torch.compile``,
    ``torch.export`` and ``torch.vmap``.

    Attributes:
        active: Features of the active cells, [NA, F], floating point.
        passive: Features of the passive cells, [NP, F], of the same dtype.
        index_map: Ids in [0, NA + NP), [R, H, W], int32 or int64.
        roi: The map of each active row, [NA] int32 in [0, R).
        xy: The cell (x, y) of each active row, [NA, 2] int32: x in [0, W) and y in [0, H).

    Source: C. Picron, PhD thesis, section 5.3.2.
    """

    active: Tensor  # [NA, F]
    passive: Tensor  # [NP, F]
    index_map: Tensor  # [R, H, W] int32 or int64
    roi: Tensor  # [NA] int32
    xy: Tensor  # [NA, 2] int32, (x, y)

    def __repr__(self) -> str:
        """Sizes, without reading a value."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if not all(isinstance(v, Tensor) and v.dim() == len(_SHAPES[name]) for name, v in values.items()):
            return f"SPS({', '.join(f'{name}={_short(v)}' for name, v in values.items())})"
        maps, height, width = self.index_map.shape
        (actives, features), passives = self.active.shape, self.passive.shape[0]
        return (
            f"SPS(active={actives}, passive={passives}, features={features}, maps={maps}, height={height}, "
            f"width={width}, dtype={_name(self.active)}, device={self.active.device})"
        )

    def to(self, *args: Any, **kwargs: Any) -> SPS:
        """Moves and converts, as :meth:`torch.nn.Module.to`: a dtype is for the features only.

        Arguments are those of :meth:`torch.Tensor.to`. Tensors that need no change are shared.
        """
        active = self.active.to(*args, **kwargs)
        if not active.is_floating_point():
            raise TypeError(f"SPS.to: expected a floating-point dtype, got {_name(active)}")
        flags = (value for value in args if isinstance(value, bool))
        switches: dict[str, Any] = dict(zip(("non_blocking", "copy"), flags, strict=False))
        switches |= {name: kwargs[name] for name in ("non_blocking", "copy") if name in kwargs}

        def move(ids: Tensor) -> Tensor:
            moved: Tensor = ids.to(active.device, **switches)
            return moved

        passive = self.passive.to(*args, **kwargs)
        return SPS(active, passive, move(self.index_map), move(self.roi), move(self.xy))

    def validate(self) -> SPS:
        """Checks everything that this class promises, for debugging; on CUDA the host waits for the values.

        Returns:
            self

        Raises:
            ValueError: what is wrong first, in the words of the ops' errors.
        """
        self._check_tensors()
        self._check_values()
        return self

    def _check_tensors(self) -> None:
        sizes = {"XY": 2}
        for name, letters in _SHAPES.items():
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                raise ValueError(f"SPS: expected {name} to be a Tensor, got {type(value).__name__}")
            _check_shape(name, value, letters, sizes)
            if value.device != self.active.device:
                raise ValueError(
                    f"SPS: expected {name} on the device of active ({self.active.device}), got {value.device}"
                )
        if not self.active.is_floating_point():
            raise ValueError(f"SPS: expected active of a floating-point dtype, got {_name(self.active)}")
        _check_dtype("passive", self.passive, self.active.dtype)
        _check_dtype("index_map", self.index_map, torch.int32, torch.int64)
        _check_dtype("roi", self.roi, torch.int32)
        _check_dtype("xy", self.xy, torch.int32)

    def _check_values(self) -> None:
        check_ranges("SPS", self.active, self.passive, self.index_map, self.roi, self.xy)
        x, y = self.xy.long().unbind(1)
        found = self.index_map[self.roi.long(), y, x]
        wrong = (found != torch.arange(len(found), device=found.device)).nonzero()
        if wrong.numel() > 0:
            i = int(wrong[0])
            cell = [int(self.roi[i]), int(y[i]), int(x[i])]
            raise ValueError(
                f"SPS: expected index_map{cell} = {i}, where roi and xy put it, got {int(found[i])}"
            )
        active_ids = self.index_map[self.index_map < len(found)].long()
        cells = torch.bincount(active_ids, minlength=len(found))
        wrong = (cells > 1).nonzero()
        if wrong.numel() > 0:
            i = int(wrong[0])
            raise ValueError(
                f"SPS: expected an active id in one cell of index_map, got {i} in {int(cells[i])}"
            )


def check_ranges(
    op: str, active: Tensor, passive: Tensor, index_map: Tensor, roi: Tensor, xy: Tensor
) -> None:
    """Raises ValueError unless every id is one of a row and every active cell lies in a map."""
    maps, height, width = index_map.shape
    for name, values, size, end in (
        ("index_map", index_map, "NA + NP", len(active) + len(passive)),
        ("roi", roi, "R", maps),
        ("xy[:, 0]", xy[:, 0], "W", width),
        ("xy[:, 1]", xy[:, 1], "H", height),
    ):
        wrong = values[(values < 0) | (values >= end)]
        if wrong.numel() > 0:
            raise ValueError(f"{op}: expected {name} in [0, {size} = {end}), got {int(wrong[0])}")


def _check_shape(name: str, tensor: Tensor, letters: Sequence[str], sizes: dict[str, int]) -> None:
    """The first tensor that shows a letter fixes its size."""
    fits = tensor.dim() == len(letters) and all(
        sizes.setdefault(letter, size) == size for letter, size in zip(letters, tensor.shape, strict=True)
    )
    if not fits:
        expected = ", ".join(f"{letter}={sizes[letter]}" if letter in sizes else letter for letter in letters)
        raise ValueError(f"SPS: expected {name} of shape [{expected}], got {list(tensor.shape)}")


def _check_dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    if tensor.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(f"SPS: expected {name} of dtype {names}, got {_name(tensor)}")


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _short(value: object) -> str:
    """A field that is not what it should be: pytrees may hold anything while they are mapped over."""
    return f"Tensor{list(value.shape)}" if isinstance(value, Tensor) else repr(value)


torch.export.register_dataclass(SPS, serialized_type_name="effops.SPS")
# torch.load, and torch.export.load of a program with example inputs, read it with weights_only=True.
torch.serialization.add_safe_globals([SPS])
