"""Bits packed into words, and back."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effops.ops import _packed
from effops.ops._checks import FLOAT_DTYPES, explain

_PACK, _UNPACK = "pack_bits", "unpack_bits"
_pack_op = torch.ops.effops.pack_bits.default
_unpack_op = torch.ops.effops.unpack_bits.default


def pack_bits(
    x: Tensor,  # [..., M]
) -> Tensor:  # [..., ceil(M / 64)]
    r"""Packs the signs of each row, 64 to a word.

    .. math::
        out[\dots, w] = \sum_{j < 64} 2^j \, [x[\dots, 64 w + j] > 0]

    Bit j of word w is element 64 w + j, and bits beyond M are 0. In memory, the words are little-endian
    bytes of which byte y holds the elements from 8 y on, its lowest bit first:
    ``pack_bits(x).view(torch.uint8)`` is what ``numpy.packbits(x > 0, axis=-1, bitorder="little")`` gives,
    up to padding bytes.

    Args:
        x: Rows of M elements, [..., M]: bool, uint8 (any number but 0 is a one), or floating point (positive
            numbers are ones; NaN, 0 and -0 are not). float32, float64, bfloat16 or float16.

    Returns:
        [..., ceil(M / 64)] int64, contiguous.

    Raises:
        ValueError: a tensor without dimensions.
        TypeError: wrong dtypes, or an argument that is no tensor.
        RuntimeError: no kernels for the device in this installation.

    The result has no gradient. Deterministic. vmap may batch ``x``.

    Source: the layout of binary descriptors in OpenCV and faiss; M. Kanakis, PhD thesis, section 5.3.
    """
    try:
        return _pack_op(x)
    except (RuntimeError, TypeError) as error:
        return explain(_PACK, error, lambda: _check_pack(x))


def unpack_bits(
    packed: Tensor,  # [..., W]
    num_bits: int,
) -> Tensor:  # [..., num_bits]
    r"""The bits of packed rows: the reverse of :func:`pack_bits`.

    .. math::
        out[\dots, j] = \lfloor packed[\dots, \lfloor j / s \rfloor] / 2^{j \bmod s} \rfloor \bmod 2

    where s is 64 for int64 words (read as unsigned numbers) and 8 for bytes.

    Args:
        packed: Words, [..., W]: int64, or uint8 (the bytes of those, as OpenCV and faiss have them).
        num_bits: How many bits of each row, from the first on: 0 to 64 W, for bytes to 8 W.

    Returns:
        [..., num_bits] bool, contiguous.

    Raises:
        ValueError: a tensor without dimensions, more bits than the words hold.
        TypeError: wrong dtypes, or an argument that is no tensor or no integer.
        RuntimeError: no kernels for the device in this installation.

    Deterministic. vmap may batch ``packed``.

    Source: as :func:`pack_bits`.
    """
    try:
        return _unpack_op(packed, num_bits)
    except (RuntimeError, TypeError) as error:
        return explain(_UNPACK, error, lambda: _check_unpack(packed, num_bits))


def _check_pack(x: Tensor) -> None:
    """The metadata checks of csrc/binary/pack_bits.h."""
    _packed.check_rows(_PACK, "x", x, torch.bool, torch.uint8, *FLOAT_DTYPES)


def _check_unpack(packed: Tensor, num_bits: int) -> None:
    """The metadata checks of csrc/binary/pack_bits.h."""
    _packed.check_rows(_UNPACK, "packed", packed, *_packed.WORD_DTYPES)
    _packed.check_count(_UNPACK, "num_bits", num_bits, _packed.bits_of(packed))


# ------------------------------------------------------------------------------------------ fake


@torch.library.register_fake("effops::pack_bits")
def _fake_pack(x: Tensor) -> Tensor:
    _check_pack(x)
    return x.new_empty((*x.shape[:-1], _packed.words_of(x.shape[-1])), dtype=torch.int64)


@torch.library.register_fake("effops::unpack_bits")
def _fake_unpack(packed: Tensor, num_bits: int) -> Tensor:
    _check_unpack(packed, num_bits)
    return packed.new_empty((*packed.shape[:-1], num_bits), dtype=torch.bool)


# ------------------------------------------------------------------------------------------ vmap


@torch.library.register_vmap("effops::pack_bits")
def _vmap_pack_rule(info: Any, in_dims: tuple[int], x: Tensor) -> tuple[Tensor, int]:
    _check_pack(_packed.first_member(x, in_dims[0]))
    return _pack_op(x.movedim(in_dims[0], 0)), 0


@torch.library.register_vmap("effops::unpack_bits")
def _vmap_unpack_rule(
    info: Any, in_dims: tuple[int, None], packed: Tensor, num_bits: int
) -> tuple[Tensor, int]:
    _check_unpack(_packed.first_member(packed, in_dims[0]), num_bits)
    return _unpack_op(packed.movedim(in_dims[0], 0), num_bits), 0


# ------------------------------------------------------------------------------------------ FLOPs


@register_flop_formula(torch.ops.effops.pack_bits, get_raw=True)
def _pack_flops(x: Tensor, *, out_val: Any = None, **_: Any) -> int:
    """A comparison per element."""
    return x.numel()


@register_flop_formula(torch.ops.effops.unpack_bits, get_raw=True)
def _unpack_flops(packed: Tensor, num_bits: int, *, out_val: Any = None, **_: Any) -> int:
    """A shift and a mask per bit."""
    return 2 * packed.shape[:-1].numel() * num_bits
