"""Where a mask keeps something: found once, used by every layer that has the mask."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(eq=False, repr=False)
class MaskPlan:
    """A mask and the list of its kept positions, for :func:`effops.perforated_conv2d`.

    A position is kept where the mask is not 0 (NaN is not 0). The plan depends on the mask alone, not on a
    layer's channels, kernel or stride, so that the layers of a block whose outputs have one size and one
    mask share it. Made by :func:`effops.plan_mask`. A pytree: it passes through ``torch.compile`` and
    ``torch.export``. The mask's gradient, if it is floating point, flows through :attr:`mask`.

    Attributes:
        mask: [N, Ho, Wo], bool or floating point.
        positions: The kept positions n * Ho * Wo + y * Wo + x, ascending, [K] int64.
        rows: Where each position stands in ``positions``, or -1, [N, Ho, Wo] int64.
    """

    mask: Tensor  # [N, Ho, Wo]
    positions: Tensor  # [K] int64
    rows: Tensor  # [N, Ho, Wo] int64

    @property
    def count(self) -> int:
        """How many positions are kept; known without reading a value."""
        return self.positions.shape[0]

    @property
    def density(self) -> float:
        """The kept part of all positions, 0 if there are none."""
        total = self.mask.numel()
        return self.count / total if total > 0 else 0.0

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> MaskPlan:
        """The plan on another device; tensors that are there already are shared."""
        return MaskPlan(
            self.mask.to(device, non_blocking=non_blocking),
            self.positions.to(device, non_blocking=non_blocking),
            self.rows.to(device, non_blocking=non_blocking),
        )

    def __repr__(self) -> str:
        """Sizes, without reading a value."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        ranks = {"mask": 3, "positions": 1, "rows": 3}
        if not all(isinstance(v, Tensor) and v.dim() == ranks[name] for name, v in values.items()):
            return f"MaskPlan({', '.join(f'{name}={_short(v)}' for name, v in values.items())})"
        images, height, width = self.mask.shape
        return (
            f"MaskPlan(count={self.count}, images={images}, height={height}, width={width}, "
            f"dtype={str(self.mask.dtype).removeprefix('torch.')}, device={self.mask.device})"
        )


def _short(value: object) -> str:
    """A field that is not what it should be: pytrees may hold anything while they are mapped over."""
    return f"Tensor{list(value.shape)}" if isinstance(value, Tensor) else repr(value)


torch.export.register_dataclass(MaskPlan, serialized_type_name="effops.MaskPlan")
# torch.load, and torch.export.load of a program with example inputs, read it with weights_only=True.
torch.serialization.add_safe_globals([MaskPlan])
