"""Entries of the binary engine, the ops on rows of M elements: packing, top-k, binary normalisation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from effops.testing._binary_inputs import WIDTHS, WORD_DTYPES, random_words, word_bits, words
from effops.testing._info import (
    DEFAULT_TOLERANCES,
    FLOAT_DTYPES,
    ErrorInput,
    Maker,
    OpInfo,
    SampleInput,
    Sizes,
    Tolerance,
)
from effops.testing._wrong import Wrong, wrong_counts, wrong_dtypes, wrong_kinds, wrong_maker

NAN, INF = math.nan, math.inf


def _numbers(make: Maker, options: Sequence[float], *shape: int) -> Tensor:
    """Picked from the options; for integers and booleans 0 and other numbers."""
    if make.dtype.is_floating_point:
        return make.choice(options, *shape)
    return make.choice((0, 1) if make.dtype == torch.bool else (0, 1, 2, 128, 255), *shape)


def _normal(make: Maker, *shape: int) -> Tensor:
    return make.normal(*shape) if make.dtype.is_floating_point else _numbers(make, (), *shape)


def _rows(
    make: Maker, k: int | None, *shape: int, name: str = "built", scale: float = 1.0, **settings: Any
) -> SampleInput:
    """Random x of the shape, and k if the op has one."""
    x = _normal(make, *shape)
    x = x * scale if scale != 1 else x
    return SampleInput(name, (x,) if k is None else (x, k), **settings)


def _empty_rows(make: Maker, k: int | None) -> Iterator[SampleInput]:
    none = None if k is None else 0
    yield _rows(make, k, 0, 3, 70, name="empty_A", kind="empty")
    yield _rows(make, k, 2, 0, 70, name="empty_N", kind="empty")
    yield _rows(make, none, 2, 3, 0, name="empty_M", kind="empty")
    yield _rows(make, none, 0, name="empty_vector", kind="empty")
    yield _rows(make, none, 0, 0, 0, name="empty_all", kind="empty")


def _special_rows(make: Maker, k: int | None) -> Iterator[SampleInput]:
    """Numbers whose order or sign is easily got wrong."""
    options = {
        "zeros": (0.0, -0.0),
        "small_numbers": (0.0, -0.0, 1e-7, -1e-7),
        "non_finite": (NAN, INF, -INF, 0.0, 1.0, -1.0),
        "nearly_all_nan": (NAN, NAN, NAN, 1.0),
        "all_inf": (INF,),
        "largest": (6e4, -6e4, INF, -INF),
    }
    for name, numbers in options.items():
        x = _numbers(make, numbers, 6, 67)
        yield SampleInput(name, (x,) if k is None else (x, k), kind="awkward")
    if make.dtype.is_floating_point:
        tiny = torch.finfo(make.dtype).tiny
        x = make.choice((tiny, tiny / 2, tiny / 4, -tiny / 4, 0.0), 6, 67)
    else:
        x = _normal(make, 6, 67)
    yield SampleInput("subnormal", (x,) if k is None else (x, k), kind="awkward")


def _wrong_tensors(
    argument: str, good: Tensor, dtypes: Sequence[torch.dtype], wrong: Wrong
) -> Iterator[ErrorInput]:
    """Dtypes that are refused, what is no tensor, and a tensor without dimensions."""
    yield wrong(f"{argument}_rank_0", ValueError, argument, {argument: good.flatten()[0]})
    yield from wrong_dtypes(argument, good, dtypes, wrong)
    yield from wrong_kinds(argument, wrong)


_NO_NUMBERS = (torch.int8, torch.int16, torch.int32, torch.uint16, torch.complex64, torch.complex128)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)

# ------------------------------------------------------------------------------------ pack_bits


def _pack_samples(make: Maker) -> Iterator[SampleInput]:
    # A and N differ from each other and from all other sizes: see OpInfo.dynamic. torch.export refuses a
    # variable M, as there might be a single word.
    yield _rows(make, None, 3, 5, 70, name="ordinary")
    yield _rows(make, None, 4, 8, 70, name="ordinary_larger")
    yield _rows(make, None, 6, 9, 70, name="ordinary_more")
    for width in WIDTHS:
        yield _rows(make, None, 3, width, name=f"M{width}", kind="awkward")
    yield _rows(make, None, 70, name="vector", kind="awkward")
    yield _rows(make, None, 2, 1, 3, 2, 65, name="rank_5", kind="awkward")
    yield _rows(make, None, 200, 9, name="many_short_rows", kind="awkward")
    yield from _special_rows(make, None)
    yield from _empty_rows(make, None)


def _pack_errors(make: Maker) -> Iterator[ErrorInput]:
    good = make.normal(3, 70)
    wrong = wrong_maker("pack_bits", {"x": good})
    yield from _wrong_tensors("x", good, (torch.int64, *_NO_NUMBERS, *_FLOAT8), wrong)
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.bool, torch.uint8):
        name = str(dtype).removeprefix("torch.")
        yield wrong(f"x_rank_0_{name}", ValueError, "x", {"x": good[0, 0].abs().to(dtype)})


_PACK_BITS = OpInfo(
    name="pack_bits",
    build=lambda make, sizes: _rows(make, None, sizes["A"], sizes["N"], sizes["M"]),
    size_ranges={"A": range(4), "N": range(6), "M": range(200)},
    typical={"A": 2, "N": 3, "M": 70},
    smallest={"A": 1, "N": 2, "M": 64},
    large=({"A": 1, "N": 4000, "M": 130}, {"A": 2, "N": 1, "M": 200_000}, {"A": 1, "N": 500, "M": 512}),
    other_paths=({"A": 2, "N": 3, "M": 128},),  # without padding
    draw_samples=_pack_samples,
    draw_errors=_pack_errors,
    native_args=lambda *inputs: inputs,
    backward_args=None,
    differentiable=(),
    vmap_batched=("x",),
    dynamic={"x": {0: "A", 1: "N"}},
    flops=(128, 0),  # 2 rows of 64
    dtypes=(*FLOAT_DTYPES, torch.bool, torch.uint8),
)

# ------------------------------------------------------------------------------------ unpack_bits


def _packed(
    make: Maker, num_bits: int, *rows: int, spare: int = 0, name: str = "built", **settings: Any
) -> SampleInput:
    """Random words, all bits of them, in rows that hold num_bits and so many words to spare."""
    size = word_bits(make)
    count = (num_bits + size - 1) // size + spare
    return SampleInput(name, (random_words(make, *rows, bits=count * size), num_bits), **settings)


def _build_packed(make: Maker, sizes: Sizes) -> SampleInput:
    bits = sizes["W"] * word_bits(make)
    packed = random_words(make, sizes["A"], sizes["N"], bits=bits)
    return SampleInput("built", (packed, max(bits - sizes["unused"], 0)))


def _unpack_samples(make: Maker) -> Iterator[SampleInput]:
    # A and N differ from each other and from all other sizes: see OpInfo.dynamic.
    yield _packed(make, 70, 3, 5, name="ordinary")
    yield _packed(make, 70, 4, 8, name="ordinary_larger")
    yield _packed(make, 70, 6, 12, name="ordinary_more")
    for width in WIDTHS:
        yield _packed(make, width, 3, name=f"bits_{width}", kind="awkward")
        yield _packed(make, width, 2, spare=2, name=f"bits_{width}_of_more", kind="awkward")
    yield _packed(make, 70, name="vector", kind="awkward")
    yield _packed(make, 70, 2, 1, 3, 2, name="rank_5", kind="awkward")
    yield _packed(make, 0, 3, spare=2, name="no_bits", kind="awkward")
    for value in (True, False):
        bits = torch.full((3, 128), value, device=make.device)
        yield SampleInput(f"all_{value}", (words(make, bits), 127), kind="awkward")
    yield _packed(make, 70, 0, 3, name="empty_A", kind="empty")
    yield _packed(make, 70, 2, 0, name="empty_N", kind="empty")
    yield _packed(make, 0, 2, 3, name="empty_W", kind="empty")


def _unpack_errors(make: Maker) -> Iterator[ErrorInput]:
    """Starting from 70 bits of rows of 2 words."""
    packed = random_words(make, 3, bits=128)
    wrong = wrong_maker("unpack_bits", {"packed": packed, "num_bits": 70})
    dtypes = (torch.bool, torch.float32, torch.float16, *_NO_NUMBERS)
    yield from _wrong_tensors("packed", packed, dtypes, wrong)
    yield from wrong_counts("num_bits", 128, wrong)
    few = {"packed": packed.view(torch.uint8)[:, :8], "num_bits": 65}
    yield wrong("num_bits_65_of_8_bytes", ValueError, "num_bits", few)
    yield wrong("num_bits_1_of_none", ValueError, "num_bits", {"packed": packed[:, :0], "num_bits": 1})


_UNPACK_BITS = OpInfo(
    name="unpack_bits",
    build=_build_packed,
    size_ranges={"A": range(4), "N": range(6), "W": range(6), "unused": range(80)},
    typical={"A": 2, "N": 3, "W": 2, "unused": 3},
    smallest={"A": 1, "N": 2, "W": 1, "unused": 0},
    large=(
        {"A": 1, "N": 4000, "W": 3, "unused": 3},
        {"A": 2, "N": 1, "W": 9000, "unused": 7},
        {"A": 1, "N": 2000, "W": 8, "unused": 0},
    ),
    other_paths=({"A": 2, "N": 3, "W": 8, "unused": 0},),  # without padding
    draw_samples=_unpack_samples,
    draw_errors=_unpack_errors,
    native_args=lambda *inputs: inputs,
    backward_args=None,
    differentiable=(),
    vmap_batched=("packed",),
    dynamic={"packed": {0: "A", 1: "N"}},
    flops=(256, 0),  # 2 rows of 64 bits: 2 * 2 * 64
    dtypes=WORD_DTYPES,
)

# ------------------------------------------------------------------------------------ topk_pack


def _build_rows(make: Maker, sizes: Sizes) -> SampleInput:
    """Rows for the ops that choose k of M elements."""
    k = min(sizes["k"], sizes["M"])
    return _rows(make, k, sizes["A"], sizes["N"], sizes["M"])


def _row_samples(make: Maker) -> Iterator[SampleInput]:
    """What topk_pack and binnorm share."""
    # A and N differ from each other and from all other sizes: see OpInfo.dynamic.
    yield _rows(make, 9, 3, 5, 70, name="ordinary")
    yield _rows(make, 9, 4, 8, 70, name="ordinary_larger")
    yield _rows(make, 9, 6, 2, 70, name="ordinary_fewer")
    for width in WIDTHS:
        yield _rows(make, (width + 3) // 4, 3, width, name=f"M{width}", kind="awkward")
    for k in (0, 1, 60, 67):
        yield _rows(make, k, 3, 67, name=f"k{k}_of_67", kind="awkward")
    for k in (0, 1):
        yield _rows(make, k, 3, 1, name=f"k{k}_of_1", kind="awkward")
    yield _rows(make, 9, 70, name="vector", kind="awkward")
    yield _rows(make, 9, 2, 1, 3, 2, 65, name="rank_5", kind="awkward")
    yield _rows(make, 4, 200, 9, name="many_short_rows", kind="awkward")
    x = make.normal(4, 1).expand(4, 67)
    yield SampleInput("constant", (x, 20), kind="awkward")
    x = make.choice((-1.0, 0.5, 2.0), 6, 130)
    yield SampleInput("ties", (x, 40), kind="awkward")
    yield from _empty_rows(make, 9)


def _topk_samples(make: Maker) -> Iterator[SampleInput]:
    yield from _row_samples(make)
    yield from _special_rows(make, 9)
    yield _rows(make, 66, 3, 67, name="k66_of_67", kind="awkward")
    x = make.normal(2, 200)
    yield SampleInput("ascending", (x.sort(dim=-1).values, 30), kind="awkward")
    yield SampleInput("descending", (x.sort(dim=-1, descending=True).values, 30), kind="awkward")
    for ones in (1, 8, 56, 64, 127):  # neighbouring numbers
        near = torch.nextafter(x.new_ones(()), x.new_full((), 2.0)).expand(2, 128)
        x_near = torch.where(make.bits(2, 128), near, near.new_ones(()))
        yield SampleInput(f"neighbours_k{ones}", (x_near, ones), kind="awkward")


def _row_errors(op: str, make: Maker) -> Iterator[ErrorInput]:
    """Starting from k = 20 of 70 elements."""
    x = make.normal(3, 70)
    wrong = wrong_maker(op, {"x": x, "k": 20})
    dtypes = (torch.bool, torch.uint8, torch.int64, *_NO_NUMBERS, *_FLOAT8)
    yield from _wrong_tensors("x", x, dtypes, wrong)
    yield from wrong_counts("k", 70, wrong, backward=False)
    yield wrong("k_1_of_none", ValueError, "k", {"x": x[:, :0], "k": 1}, backward=False)


_TOPK_PACK = OpInfo(
    name="topk_pack",
    build=_build_rows,
    size_ranges={"A": range(4), "N": range(6), "M": range(200), "k": range(200)},
    typical={"A": 2, "N": 3, "M": 70, "k": 9},
    smallest={"A": 1, "N": 2, "M": 64, "k": 5},
    large=({"A": 1, "N": 3000, "M": 130, "k": 20}, {"A": 2, "N": 20, "M": 5000, "k": 777}),
    other_paths=({"A": 2, "N": 3, "M": 128, "k": 64},),  # without padding
    draw_samples=_topk_samples,
    draw_errors=lambda make: _row_errors("topk_pack", make),
    native_args=lambda *inputs: inputs,
    backward_args=None,
    differentiable=(),
    vmap_batched=("x",),
    dynamic={"x": {0: "A", 1: "N"}},
    flops=(128, 0),  # 2 rows of 64
)

# ------------------------------------------------------------------------------------ binnorm


def _build_binnorm(make: Maker, sizes: Sizes) -> SampleInput:
    """As :func:`_build_rows`; half precision, too coarse near 1, gets at most half of the elements."""
    most = sizes["M"] if make.dtype.itemsize > 2 else (sizes["M"] + 1) // 2
    return _build_rows(make, {**sizes, "k": min(sizes["k"], most)})


def _binnorm_samples(make: Maker) -> Iterator[SampleInput]:
    yield from _row_samples(make)

    def awkward(name: str, x: Tensor, k: int, **settings: Any) -> SampleInput:
        return SampleInput(name, (x, k), kind="awkward", **settings)

    yield _rows(make, 16, 4, 67, name="flat", scale=0.01, kind="awkward")
    yield _rows(make, 16, 4, 67, name="steep", scale=4.0, kind="awkward")
    yield awkward("shifted", make.normal(4, 67) + 100, 16)
    yield _rows(make, 64, 2, 256, name="descriptors", kind="awkward")
    yield awkward("two_levels", make.choice((-1.0, 1.0), 4, 67), 16)
    # Some elements are 0 or 1, and some between them share the rest.
    base = make.normal(6, 90)
    ends = make.choice((-1.0, 1.0), 6, 30)
    for size in (50.0, 1e4, INF):
        x = torch.cat([base[:, :50], ends * size, base[:, 50:60]], dim=1)
        yield awkward(f"ends_{size:g}", x, 45, smooth=False)
    padded = torch.cat([base[:, :50], torch.full_like(ends, -INF)], dim=1)
    yield awkward("padded_by_minus_inf", padded, 20, smooth=False)
    yield awkward("all_that_are_finite", padded, 50, smooth=False)
    yield awkward("none_that_is_finite", -padded, 30, smooth=False)
    yield awkward("nothing_finite", torch.full_like(padded, -INF), 0, smooth=False)


# Backward knows the rounded result alone: y (1 - y) has the error of y, that is 2^-12 or 2^-9.
_BINNORM_TOLERANCES: Mapping[torch.dtype, Tolerance] = MappingProxyType(
    {
        **DEFAULT_TOLERANCES,
        torch.float16: Tolerance(1e-3, 4e-3),
        torch.bfloat16: Tolerance(8e-3, 3e-2),
    }
)

_BINNORM = OpInfo(
    name="binnorm",
    build=_build_binnorm,
    size_ranges={"A": range(4), "N": range(6), "M": range(150), "k": range(150)},
    typical={"A": 2, "N": 3, "M": 7, "k": 3},
    smallest={"A": 1, "N": 2, "M": 8, "k": 3},
    large=({"A": 1, "N": 1000, "M": 130, "k": 20}, {"A": 2, "N": 20, "M": 3000, "k": 777}),
    other_paths=({"A": 2, "N": 3, "M": 64, "k": 16},),
    draw_samples=_binnorm_samples,
    draw_errors=lambda make: _row_errors("binnorm", make),
    native_args=lambda *inputs: inputs,
    # Any tensor of x's shape can stand for the result.
    backward_args=lambda gradients, inputs: (*gradients, inputs[0]),
    differentiable=("x",),
    autocast={"x": "float32"},
    vmap_batched=("x",),
    dynamic={"x": {0: "A", 1: "N"}},
    flops=(64, 112),  # 16 elements: 4 and 7 each
    tolerances=_BINNORM_TOLERANCES,
)

ENTRIES: tuple[OpInfo, ...] = (_PACK_BITS, _UNPACK_BITS, _TOPK_PACK, _BINNORM)
