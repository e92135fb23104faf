"""Rows of bits in words: bit j of word w is element s w + j, s being 64 for int64 words and 8 for bytes."""

from __future__ import annotations

import torch
from torch import Tensor


def words(bits: Tensor) -> Tensor:
    """Bits [..., M] bool as int64 words [..., ceil(M / 64)]; padding bits are 0."""
    count = (bits.shape[-1] + 63) // 64
    padded = bits.new_zeros(*bits.shape[:-1], 64 * count)
    padded[..., : bits.shape[-1]] = bits
    place = torch.arange(64, device=bits.device)
    values: Tensor = padded.unflatten(-1, (count, 64)).long() << place
    return values.sum(-1)


def bits_of(packed: Tensor) -> Tensor:
    """All bits of the words [..., W] of a row, [..., 64 W] or [..., 8 W] bool."""
    size = 8 * packed.element_size()
    place = torch.arange(size, dtype=packed.dtype, device=packed.device)
    return ((packed[..., None] >> place) & 1).bool().flatten(-2)


def check_rows(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dim() < 1:
        raise ValueError(f"{op}: expected {name} of at least 1 dimension, got shape []")


def check_words(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"{op}: expected {name} of dtype torch.int64 or torch.uint8, got {tensor.dtype}")


def check_count(op: str, name: str, value: int, most: int) -> None:
    if not 0 <= value <= most:
        raise ValueError(f"{op}: expected {name} in [0, {most}], got {value}")
