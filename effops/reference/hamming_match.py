"""Matches between two sets of binary descriptors: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from effops.reference._bilinear import check_shape
from effops.reference.hamming_distance import check_sets
from effops.reference.hamming_knn import MISSING_DISTANCE, hamming_knn

_OP = "hamming_match"


def hamming_match(
    a: Tensor,
    b: Tensor,
    ratio: float | None = None,
    max_distance: int | None = None,
    mutual: bool = True,
    *,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pairs of rows of a and their nearest rows of b, those that pass three independent tests.

        d1 <= max_distance,    d1 < ratio * d2,    i = nearest row of a to j  (mutual)

    for row i of a with its nearest row j of b at distance d1 and its second nearest at d2. A row without a
    second candidate passes the ratio test.

    Args:
        a: packed rows, [Na, W], int64 words or uint8 bytes.
        b: packed rows, [Nb, W], of the same dtype.
        ratio: greater than 0, compared in float64; None: no such test.
        max_distance: inclusive, 0 or more; None: no such test.
        mutual: whether both must be the nearest rows of each other.
        mask: pairs that may match, [Na, Nb] bool.

    Returns:
        matches [n, 2] int64, the indices in a (ascending) and in b, and their distances [n] int32.

    Raises:
        ValueError: shapes that do not fit together, a ratio that is not positive, a negative distance.
        TypeError: other dtypes.

    Source: M. Kanakis, PhD thesis, section 5.3; Lowe, IJCV 2004 (ratio test).
    """
    check_shape(_OP, "a", a, "NW", (None, None))
    check_sets(_OP, a, b)
    if ratio is not None and not ratio > 0:
        raise ValueError(f"{_OP}: expected ratio > 0, got {ratio}")
    if max_distance is not None and max_distance < 0:
        raise ValueError(f"{_OP}: expected max_distance >= 0, got {max_distance}")

    distances, indices = hamming_knn(a, b, 2, mask=mask)
    (first, second), nearest = distances.unbind(1), indices[:, 0]
    keep = first != MISSING_DISTANCE
    if ratio is not None:
        keep &= (second == MISSING_DISTANCE) | (first.double() < ratio * second.double())
    if max_distance is not None:
        keep &= first.long() <= max_distance
    if mutual:
        keep &= hamming_knn(a, b, 1, mask=mask, mutual=True)[1][:, 0] >= 0
    matches = torch.stack([keep.nonzero()[:, 0], nearest[keep]], dim=1)
    return matches, first[keep]
