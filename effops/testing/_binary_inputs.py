"""What the entries of the binary engine share: packed rows."""

from __future__ import annotations

import torch
from torch import Tensor

from effops import reference
from effops.testing._info import Maker

WORD_DTYPES = (torch.int64, torch.uint8)
#: Bits per row, around words, bytes and registers.
WIDTHS = (1, 7, 8, 63, 64, 65, 256, 1000, 4096)


def word_bits(make: Maker) -> int:
    """Bits in a word of the sample's dtype, int64 or uint8."""
    return 8 * make.dtype.itemsize


def words(make: Maker, bits: Tensor) -> Tensor:
    """Bits [..., M] as words of the sample's dtype; padding bits are 0."""
    packed = reference.pack_bits(bits)
    if make.dtype == torch.int64:
        return packed
    return packed.view(torch.uint8)[..., : (bits.shape[-1] + 7) // 8].contiguous()


def random_words(make: Maker, *rows: int, bits: int) -> Tensor:
    """Rows [..., W] of random bits; padding bits are 0."""
    count = (bits + word_bits(make) - 1) // word_bits(make)
    data = make.integers(*rows, count * make.dtype.itemsize, high=256).to(torch.uint8)
    whole, rest = divmod(bits, 8)
    if rest > 0:
        data[..., whole] &= 2**rest - 1
    data[..., (bits + 7) // 8 :] = 0
    return data.flatten().view(make.dtype).view(*rows, count)
