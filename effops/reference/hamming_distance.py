"""Hamming distances of all pairs of two sets: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from effops.reference._bilinear import check_shape
from effops.reference._packed import bits_of, check_words

_OP = "hamming_distance"
_MAX_BITS = 4096


def hamming_distance(a: Tensor, b: Tensor) -> Tensor:
    """How many bits differ, for every row of a and every row of b.

        out[i, j] = sum over bits of  a_i (1 - b_j) + (1 - a_i) b_j

    Args:
        a: packed rows, [B, Na, W] or [Na, W], int64 words or uint8 bytes, at most 4096 bits each.
        b: packed rows, [B, Nb, W] or [Nb, W], of the same dtype.

    Returns:
        [B, Na, Nb] or [Na, Nb] int32.

    Raises:
        ValueError: shapes that do not fit together, rows that are too long.
        TypeError: other dtypes.

    Source: M. Kanakis, PhD thesis, section 5.3.
    """
    check_sets(_OP, a, b)
    ones_a, ones_b = bits_of(a).double(), bits_of(b).double()
    distances = ones_a @ (1 - ones_b).mT + (1 - ones_a) @ ones_b.mT
    return distances.to(torch.int32)


def check_sets(op: str, a: Tensor, b: Tensor) -> None:
    """Two sets of rows of one width and dtype, or two batches of them."""
    check_words(op, "a", a)
    if b.dtype != a.dtype:
        raise TypeError(f"{op}: expected b of dtype {a.dtype}, got {b.dtype}")
    if a.dim() == 3:
        check_shape(op, "a", a, "BNW", (None, None, None))
        check_shape(op, "b", b, "BMW", (a.shape[0], None, a.shape[2]))
    else:
        check_shape(op, "a", a, "NW", (None, None))
        check_shape(op, "b", b, "MW", (None, a.shape[1]))
    if 8 * a.element_size() * a.shape[-1] > _MAX_BITS:
        raise ValueError(f"{op}: expected a of at most {_MAX_BITS} bits per row, got shape {list(a.shape)}")
