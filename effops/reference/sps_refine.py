"""The step of an SPS to the next resolution: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from effops._sps import SPS
from effops.reference._bilinear import check_floating, check_shape, compute_dtype
from effops.reference._rowconv import check_sps, id_dtype

_OP = "sps_refine"


def sps_refine(sps: SPS, scores: Tensor, num_refine: int, upsample: bool = True) -> SPS:
    """Keep the active cells of the highest scores, make the others passive, and double the resolution.

    The num_refine highest of all scores stay active (all, if there are fewer); ties go to the lowest row,
    and NaN counts as higher than every number. Kept rows stay in their order, as rows p = 0, 1, ...; the
    others are appended to the passive rows, in their order. Passive rows never become active.

    Then each cell becomes 2 x 2 cells: row p becomes rows 4 p ... 4 p + 3, copies of its features, at the
    cells (2x, 2y), (2x + 1, 2y), (2x, 2y + 1), (2x + 1, 2y + 1); a passive row serves all four cells.

    Args:
        sps: R maps of H x W cells; NA active and NP passive rows.
        scores: [NA], floating point; they get no gradient.
        num_refine: how many active rows to keep, 0 or more.
        upsample: whether to double the resolution.

    Returns:
        An SPS of 4 min(num_refine, NA) active and NP + NA - min(num_refine, NA) passive rows, with maps of
        2 H x 2 W cells; without upsampling, min(num_refine, NA) active rows and H x W cells.

    Raises:
        ValueError: shapes that do not fit together, ids or cells out of range, a negative num_refine.
        TypeError: wrong dtypes.

    Source: C. Picron, PhD thesis, section 5.3.2.
    """
    check_sps(_OP, sps)
    check_floating(_OP, "scores", scores)
    check_shape(_OP, "scores", scores, "A", (len(sps.active),))
    if num_refine < 0:
        raise ValueError(f"{_OP}: expected num_refine >= 0, got {num_refine}")

    ranking = scores.detach().sort(descending=True, stable=True).indices
    kept = ranking[:num_refine].sort().values
    demoted = ranking[num_refine:].sort().values
    children = 4 if upsample else 1

    features = sps.active.to(compute_dtype(sps.active))  # the gradient sums those of the children
    active = features[kept].repeat_interleave(children, dim=0).to(sps.active.dtype)
    passive = torch.cat([sps.passive, sps.active[demoted]])

    new_id = torch.empty(len(sps.active) + len(sps.passive), dtype=torch.int64, device=kept.device)
    new_id[kept] = children * torch.arange(len(kept), device=kept.device)
    old_passive = torch.arange(len(sps.passive), device=kept.device)
    new_id[len(sps.active) :] = len(active) + old_passive
    new_id[demoted] = len(active) + len(sps.passive) + torch.arange(len(demoted), device=kept.device)
    index_map = new_id[sps.index_map.long()]

    roi, xy = sps.roi[kept], sps.xy[kept]
    if upsample:
        child = torch.arange(4, device=kept.device)
        offset = torch.stack([child % 2, child // 2], dim=1).int()  # (x, y)
        roi = roi.repeat_interleave(4)
        xy = (2 * xy[:, None] + offset).flatten(0, 1)
        index_map = index_map.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
        height, width = sps.index_map.shape[1:]
        child_map = child.view(2, 2).repeat(height, width)
        index_map = torch.where(index_map < len(active), index_map + child_map, index_map)
    dtype = id_dtype(sps.index_map, len(active) + len(passive))
    return SPS(active, passive, index_map.to(dtype), roi, xy)
