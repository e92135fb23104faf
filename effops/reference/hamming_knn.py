"""Nearest neighbours by Hamming distance: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from effops.reference._bilinear import check_shape
from effops.reference._packed import check_count
from effops.reference.hamming_distance import check_sets, hamming_distance

_OP = "hamming_knn"
MISSING_DISTANCE, MISSING_INDEX = 2**31 - 1, -1


def hamming_knn(
    a: Tensor,
    b: Tensor,
    k: int = 1,
    *,
    lengths_a: Tensor | None = None,
    lengths_b: Tensor | None = None,
    mask: Tensor | None = None,
    mutual: bool = False,
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of b for every row of a, ordered by (distance, index).

    A neighbour that does not exist has index -1 and distance 2^31 - 1.

    Args:
        a: packed rows that look for neighbours, [B, Na, W] or [Na, W], int64 words or uint8 bytes.
        b: packed rows that are found, [B, Nb, W] or [Nb, W], of the same dtype.
        k: neighbours per row, 0 or more; it may exceed Nb.
        lengths_a, lengths_b: how many rows exist, [B] int64 in [0, N], or [] beside a single set.
        mask: pairs that may be neighbours, [B, Na, Nb] bool, or [Na, Nb] for all sets alike.
        mutual: whether a row keeps its neighbours only if its nearest one has it as its own nearest row.

    Returns:
        distances int32 and indices int64, [B, Na, k] or [Na, k].

    Raises:
        ValueError: shapes that do not fit together, a negative k, lengths out of range.
        TypeError: other dtypes.

    Source: M. Kanakis, PhD thesis, section 5.3; mutual is OpenCV's crossCheck.
    """
    check_sets(_OP, a, b)
    check_count(_OP, "k", k, 2**32 - 1)
    exists_a, exists_b = _exists("lengths_a", lengths_a, a), _exists("lengths_b", lengths_b, b)
    allowed = exists_a[..., :, None] & exists_b[..., None, :]
    if mask is not None:
        _check_mask(mask, allowed)
        allowed = allowed & mask
    distances = torch.where(allowed, hamming_distance(a, b), MISSING_DISTANCE)

    nearest_distances, nearest = nearest_first(distances, k)
    if mutual:
        keep = is_mutual(distances)[..., None]
        nearest_distances = torch.where(keep, nearest_distances, MISSING_DISTANCE)
        nearest = torch.where(keep, nearest, MISSING_INDEX)
    return nearest_distances, nearest


def nearest_first(distances: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of each row of distances [..., N], ties in order, padded with missing ones: [..., k]."""
    found, index = distances.sort(dim=-1, stable=True)
    index = torch.where(found == MISSING_DISTANCE, MISSING_INDEX, index)
    shape = (*distances.shape[:-1], max(k - distances.shape[-1], 0))
    found = torch.cat([found[..., :k], found.new_full(shape, MISSING_DISTANCE)], dim=-1)
    return found, torch.cat([index[..., :k], index.new_full(shape, MISSING_INDEX)], dim=-1)


def is_mutual(distances: Tensor) -> Tensor:
    """Whether row i of distances [..., Na, Nb] has a nearest j whose nearest is i, [..., Na]."""
    nearest_to_a = nearest_first(distances, 1)[1][..., 0]
    nearest_to_b = nearest_first(distances.mT, 1)[1][..., 0]
    if nearest_to_b.shape[-1] == 0:
        return torch.zeros_like(nearest_to_a, dtype=torch.bool)
    back = nearest_to_b.gather(-1, nearest_to_a.clamp(min=0))
    own = torch.arange(nearest_to_a.shape[-1], device=distances.device)
    return (nearest_to_a != MISSING_INDEX) & (back == own)


def _exists(name: str, lengths: Tensor | None, rows: Tensor) -> Tensor:
    """Which rows of [..., N, W] exist, [..., N]."""
    count = rows.shape[-2]
    number = torch.arange(count, device=rows.device)
    if lengths is None:
        return (number >= 0).expand(rows.shape[:-1])
    if lengths.dtype != torch.int64:
        raise TypeError(f"{_OP}: expected {name} of dtype torch.int64, got {lengths.dtype}")
    check_shape(_OP, name, lengths, "B"[: rows.dim() - 2], tuple(rows.shape[:-2]))
    wrong = lengths[(lengths < 0) | (lengths > count)]
    if wrong.numel() > 0:
        raise ValueError(f"{_OP}: expected {name} in [0, {count}], got {int(wrong[0])}")
    return number < lengths[..., None]


def _check_mask(mask: Tensor, pairs: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"{_OP}: expected mask of dtype torch.bool, got {mask.dtype}")
    sizes = tuple(pairs.shape[-2:] if mask.dim() == 2 else pairs.shape)
    check_shape(_OP, "mask", mask, "BNM"[-len(sizes) :], sizes)
