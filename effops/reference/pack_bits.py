"""Bits packed into words, and back: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from effops.reference._packed import bits_of, check_count, check_rows, check_words, words


def pack_bits(x: Tensor) -> Tensor:
    """Packs the signs of each row, 64 to a word.

        out[..., w] = sum over j < 64 of  2^j [x[..., 64 w + j] > 0]

    Bit 63 is the sign of the int64 word; bits beyond the last element are 0.

    Args:
        x: [..., M] bool, uint8 or floating point; NaN, 0 and -0 are not greater than 0.

    Returns:
        [..., ceil(M / 64)] int64.

    Raises:
        ValueError: a tensor without dimensions.
        TypeError: other dtypes.

    Source: the layout of binary descriptors in OpenCV and faiss.
    """
    check_rows("pack_bits", "x", x)
    if not (x.is_floating_point() or x.dtype in (torch.bool, torch.uint8)):
        raise TypeError(f"pack_bits: expected x of dtype bool, uint8 or floating point, got {x.dtype}")
    return words(x > 0)


def unpack_bits(packed: Tensor, num_bits: int) -> Tensor:
    """The first bits of each packed row: the reverse of pack_bits.

    Args:
        packed: [..., W] int64 words, or uint8: the bytes of those, lowest first.
        num_bits: how many bits of each row, 0 to 64 W (8 W).

    Returns:
        [..., num_bits] bool.

    Raises:
        ValueError: a tensor without dimensions, more bits than there are.
        TypeError: other dtypes.

    Source: as pack_bits.
    """
    check_rows("unpack_bits", "packed", packed)
    check_words("unpack_bits", "packed", packed)
    bits = bits_of(packed)
    check_count("unpack_bits", "num_bits", num_bits, bits.shape[-1])
    return bits[..., :num_bits].contiguous()
