"""What the ops on packed bits share: bit j of a row is bit j % 64 of its word j // 64.

Words are int64, or uint8 as OpenCV and faiss have them; in memory both are the same little-endian bytes.
"""

from typing import Any

import torch
from torch import Tensor

from effops.ops import _vmap
from effops.ops._checks import ShapeChecker, check_backend, check_integer

WORD_DTYPES = (torch.int64, torch.uint8)
#: Per row, in the ops that compare rows.
MAX_BITS = 4096


def words_of(bits: int) -> int:
    """How many int64 words hold a row of so many bits."""
    return (bits + 63) // 64


def bits_of(packed: Tensor) -> int:
    """How many bits the words of a row hold."""
    return packed.shape[-1] * packed.element_size() * 8


# ------------------------------------------------------------------------------------------ checks


def check_rows(op: str, argument: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    """A tensor of any rank but 0, of one of the dtypes, on a device that has kernels."""
    check = ShapeChecker(op)
    check.tensor(argument, tensor)
    if tensor.dim() < 1:
        raise ValueError(f"{op}: expected {argument} of at least 1 dimension, got shape []")
    check.dtype(argument, tensor, *dtypes)
    check_backend(op, tensor)


def check_count(op: str, argument: str, value: int, most: int) -> None:
    """Raises unless the value is an integer in [0, most]."""
    check_integer(op, argument, value)
    if value < 0 or value > most:
        raise ValueError(f"{op}: expected {argument} in [0, {most}], got {value}")


def check_sets(op: str, a: Tensor, b: Tensor) -> ShapeChecker:
    """Two sets of packed rows, [B, N, W] and [B, M, W] or, unbatched, [N, W] and [M, W]."""
    check = ShapeChecker(op)
    check.tensor("a", a)
    batched = a.dim() == 3
    check.match("a", a, "BNW" if batched else "NW")
    check.match("b", b, "BMW" if batched else "MW")
    check.dtype("a", a, *WORD_DTYPES)
    check.dtype("b", b, a.dtype)
    check.device("b", b, "a", a)
    if bits_of(a) > MAX_BITS:
        raise ValueError(f"{op}: expected a of at most {MAX_BITS} bits per row, got shape {list(a.shape)}")
    check_backend(op, a)
    return check


def check_mask(check: ShapeChecker, mask: Tensor, a: Tensor) -> None:
    """Which pairs of the sets in ``check.sizes`` count: [B, N, M], or [N, M] for all sets alike."""
    check.tensor("mask", mask)
    check.match("mask", mask, "BNM" if "B" in check.sizes and mask.dim() != 2 else "NM")
    check.dtype("mask", mask, torch.bool)
    check.device("mask", mask, "a", a)


# ------------------------------------------------------------------------------------------ vmap


def first_member(tensor: Any, in_dim: int | None) -> Any:
    """An argument as the first member of vmap sees it, for the checks."""
    if in_dim is None:
        return tensor
    members = tensor.movedim(in_dim, 0)
    return members[0] if len(members) > 0 else members.new_empty(members.shape[1:])


def fold_set(tensor: Tensor, in_dim: int | None, size: int) -> Tensor:
    """Sets of all members of vmap as one batch: [size, N, W], or [size * B, N, W] from batched ones."""
    sets = _vmap.move_to_front(tensor, in_dim, size)
    return sets.flatten(0, 1) if sets.dim() == 4 else sets


def unfold_set(tensor: Tensor, size: int, batched: bool) -> Tensor:
    """The reverse, of a result."""
    return _vmap.unfold(tensor, size) if batched else tensor


# ------------------------------------------------------------------------------------------ FLOPs


def pair_flops(a: Tensor, b: Tensor) -> int:
    """Of all distances as a product of matrices of +-1: a multiply-add per pair and bit."""
    pairs: int = a.shape[:-1].numel() * b.shape[-2]
    return 2 * pairs * bits_of(a)
