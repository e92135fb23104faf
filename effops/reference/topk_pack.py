"""Rows of constant weight: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from effops.reference._bilinear import check_floating
from effops.reference._packed import check_count, check_rows, words

_OP = "topk_pack"


def topk_pack(x: Tensor, k: int) -> Tensor:
    """Packed rows with exactly k ones, at the k largest elements.

    Ties go to the lowest index; NaN is larger than every number, all NaN tie, and so do 0 and -0.

    Args:
        x: [..., M] floating point.
        k: ones per row, 0 to M.

    Returns:
        [..., ceil(M / 64)] int64, bits in the order of pack_bits.

    Raises:
        ValueError: a tensor without dimensions, k out of range.
        TypeError: an x that is not floating point.

    Source: M. Kanakis, PhD thesis, section 5.3.3.
    """
    check_rows(_OP, "x", x)
    check_floating(_OP, "x", x)
    check_count(_OP, "k", k, x.shape[-1])
    largest_first = x.detach().sort(dim=-1, descending=True, stable=True).indices
    ones = torch.zeros_like(x, dtype=torch.bool)
    return words(ones.scatter(-1, largest_first[..., :k], True))
