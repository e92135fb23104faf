"""Maps and a mask of their active cells as an SPS: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from effops._sps import SPS
from effops.reference._bilinear import check_floating, check_shape
from effops.reference._rowconv import check_dtype

_OP = "sps_from_dense"


def sps_from_dense(x: Tensor, mask: Tensor) -> SPS:
    """Every cell gets a row of its own: an active one where the mask is True, else a passive one.

    Active rows, and passive rows, are in (map, y, x) order.

    Args:
        x: features, [R, F, H, W].
        mask: [R, H, W] bool, True for active cells.

    Returns:
        An SPS of NA + NP = R H W rows; its index_map is int32, or int64 from 2^31 cells on.

    Raises:
        ValueError: shapes that do not fit together.
        TypeError: features that are not floating point, a mask that is not bool.

    Source: C. Picron, PhD thesis, section 5.3.2.
    """
    check_shape(_OP, "x", x, "RFHW", (None, None, None, None))
    check_shape(_OP, "mask", mask, "RHW", (x.shape[0], *x.shape[2:]))
    check_floating(_OP, "x", x)
    check_dtype(_OP, "mask", mask, torch.bool)

    features = x.permute(0, 2, 3, 1)
    flat = mask.flatten()
    active_ids = flat.cumsum(0) - 1
    passive_ids = flat.sum() + (~flat).cumsum(0) - 1
    ids = torch.where(flat, active_ids, passive_ids).view(mask.shape)
    index_map = ids.to(torch.int32 if ids.numel() < 2**31 else torch.int64)
    roi, y, x_ = mask.nonzero().int().unbind(1)
    return SPS(features[mask], features[~mask], index_map, roi, torch.stack([x_, y], dim=1))
