"""Where a mask keeps something: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from effops._mask_plan import MaskPlan
from effops.reference._bilinear import check_floating, check_shape

_OP = "plan_mask"


def plan_mask(mask: Tensor) -> MaskPlan:
    """The positions at which a mask is not 0 (NaN is not), for all layers that share it.

    Args:
        mask: [N, Ho, Wo], bool or floating point.

    Returns:
        The mask itself, the kept positions n Ho Wo + y Wo + x, ascending, [K] int64, and where each position
        stands among them, or -1, [N, Ho, Wo] int64.

    Raises:
        ValueError: a mask that has not three dimensions.
        TypeError: a mask of integers.
    """
    check_mask(_OP, mask)
    positions = (mask.detach() != 0).flatten().nonzero()[:, 0]
    rows = torch.full((mask.numel(),), -1, device=mask.device)
    rows[positions] = torch.arange(len(positions), device=mask.device)
    return MaskPlan(mask, positions, rows.view(mask.shape))


def check_mask(op: str, mask: Tensor) -> None:
    check_shape(op, "mask", mask, "NHW", (None, None, None))
    if mask.dtype != torch.bool:
        check_floating(op, "mask", mask)
