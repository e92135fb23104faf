"""Labels of points by where they ended up: the definition."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effops.reference._bilinear import compute_dtype
from effops.reference._pairwise import check_points, normalized
from effops.reference._rowconv import check_at_least

_OP = "assign_modes"


def assign_modes(modes: Tensor, threshold: float = 0.9, min_size: int = 1) -> Tensor:
    """Connected components of the graph that joins similar rows.

        i and j are joined if (1 + cos(angle between rows i and j)) / 2 > threshold

    Components are numbered from 0 by falling size, those of one size by their first members. Rows with a NaN
    or Inf join nothing.

    Args:
        modes: [B, N, D] or [N, D], 1 <= D <= 512; rows are normalised first.
        threshold: a finite number.
        min_size: members that a component needs to get a label, 1 or more.

    Returns:
        [B, N] or [N] int64 labels; -1 for members of smaller components.

    Raises:
        ValueError: wrong shapes, numbers out of range.
        TypeError: wrong dtypes.

    Source: the readout that S. Kong, PhD thesis, section 5.5, leaves open.
    """
    check_points(_OP, "modes", modes)
    if not math.isfinite(threshold):
        raise ValueError(f"{_OP}: expected finite threshold, got {threshold}")
    check_at_least(_OP, "min_size", (min_size,), 1)
    labels = torch.empty(modes.shape[:-1], dtype=torch.int64, device=modes.device)
    if labels.numel() == 0:
        return labels
    rows = normalized(modes.detach().to(compute_dtype(modes)))
    is_joined = (1 + (rows @ rows.mT).clamp(max=1)) / 2 > threshold
    if modes.dim() == 2:
        return _by_size(_first_members(is_joined), min_size)
    for image, edges in enumerate(is_joined):
        labels[image] = _by_size(_first_members(edges), min_size)
    return labels


def _first_members(is_joined: Tensor) -> Tensor:
    """The smallest member of each row's component, [N], from the graph [N, N]."""
    count = len(is_joined)
    edges = is_joined | is_joined.mT | torch.eye(count, dtype=torch.bool, device=is_joined.device)
    first = torch.arange(count, device=is_joined.device)
    while True:
        smaller = torch.where(edges, first, count).amin(1)
        smaller = smaller[smaller]  # which is a member too
        if torch.equal(smaller, first):
            return first
        first = smaller


def _by_size(first: Tensor, min_size: int) -> Tensor:
    """Labels of components that are given by their smallest members."""
    sizes = first.bincount(minlength=len(first))
    order = sizes.argsort(descending=True, stable=True)
    label = torch.empty_like(order)
    label[order] = torch.arange(len(order), device=order.device)
    return torch.where(sizes[first] >= min_size, label[first], -1)
