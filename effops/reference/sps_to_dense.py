"""The maps that an SPS stands for: the definition."""

from __future__ import annotations

from torch import Tensor

from effops._sps import SPS
from effops.reference._bilinear import compute_dtype
from effops.reference._rowconv import check_sps, table

_OP = "sps_to_dense"


def sps_to_dense(sps: SPS) -> Tensor:
    """The features of all cells.

        out[r, :, y, x] = cat([active, passive])[index_map[r, y, x]]

    Args:
        sps: R maps of H x W cells with F features.

    Returns:
        [R, F, H, W]. The gradient of a passive row is the sum over its cells.

    Raises:
        ValueError: shapes that do not fit together, ids or cells out of range.
        TypeError: wrong dtypes.

    Source: C. Picron, PhD thesis, section 5.3.2.
    """
    check_sps(_OP, sps)
    rows = table(sps, compute_dtype(sps.active))
    return rows[sps.index_map.long()].permute(0, 3, 1, 2).to(sps.active.dtype).contiguous()
