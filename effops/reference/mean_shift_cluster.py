"""Grouping of points by mean shift: the definition."""

from __future__ import annotations

from torch import Tensor

from effops.reference._bilinear import compute_dtype
from effops.reference._pairwise import check_points
from effops.reference.assign_modes import assign_modes
from effops.reference.mean_shift import mean_shift

_OP = "mean_shift_cluster"


def mean_shift_cluster(
    x: Tensor, kappa: float = 36.0, iterations: int = 10, threshold: float = 0.9, min_size: int = 1
) -> Tensor:
    """Points with one label where mean shift took them to one mode.

        labels = assign_modes(mean_shift(x, kappa, iterations=iterations), threshold, min_size)

    Args:
        x: [B, N, D] or [N, D]; half precision is taken as float32, without a rounding between the two steps.
        kappa, iterations: those of :func:`mean_shift`.
        threshold, min_size: those of :func:`assign_modes`.

    Returns:
        [B, N] or [N] int64.

    Raises:
        ValueError: wrong shapes, numbers out of range.
        TypeError: wrong dtypes.

    Source: S. Kong, PhD thesis, sections 5.4 and 5.5.
    """
    check_points(_OP, "x", x)
    points = x.detach().to(compute_dtype(x))
    return assign_modes(mean_shift(points, kappa, iterations=iterations), threshold, min_size)
