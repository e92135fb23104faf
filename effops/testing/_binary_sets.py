"""What the entries of the Hamming ops share: two sets of packed rows, right and wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from effops.testing._binary_inputs import WIDTHS, random_words, word_bits, words
from effops.testing._info import ErrorInput, Maker, Sizes
from effops.testing._wrong import Wrong, wrong_dtypes, wrong_kinds

Sets = tuple[Tensor, Tensor]


def sets_of(make: Maker, batch: int | None, rows_a: int, rows_b: int, bits: int) -> Sets:
    """Random rows, [B, N, W], or [N, W] without a batch."""
    first = () if batch is None else (batch,)
    return random_words(make, *first, rows_a, bits=bits), random_words(make, *first, rows_b, bits=bits)


def tied_sets(make: Maker, batch: int | None, rows_a: int, rows_b: int, bits: int) -> Sets:
    """Rows drawn from four, so that most distances tie."""
    kinds = random_words(make, 4, bits=bits)
    first = () if batch is None else (batch,)
    return kinds[make.integers(*first, rows_a, high=4)], kinds[make.integers(*first, rows_b, high=4)]


def _constant_sets(make: Maker, rows_a: int, rows_b: int, bits: int) -> Sets:
    """All ones against all zeros."""
    ones = torch.ones(bits, dtype=torch.bool, device=make.device)
    return words(make, ones.expand(rows_a, bits)), words(make, ~ones.expand(rows_b, bits))


def awkward_sets(make: Maker, batch: int | None) -> Iterator[tuple[str, Sets]]:
    """Sets by name, in a batch or alone."""
    for bits in WIDTHS:
        yield f"bits_{bits}", sets_of(make, None if bits % 2 else batch, 5, 7, bits)
    yield "one_pair", sets_of(make, None, 1, 1, 64)
    yield "one_against_many", sets_of(make, batch, 1, 300, 128)
    yield "many_against_one", sets_of(make, batch, 300, 1, 128)
    yield "many_256", sets_of(make, None, 67, 131, 256)
    yield "many_320", sets_of(make, None, 45, 70, 320)
    yield "several_tiles", tied_sets(make, None, 140, 700, 256)
    yield "ties", tied_sets(make, batch, 33, 40, 256)
    yield "ties_odd", tied_sets(make, None, 20, 37, 72)
    yield "ones_against_zeros", _constant_sets(make, 9, 8, 256)
    yield "longest_ones_against_zeros", _constant_sets(make, 3, 5, 4096)
    same, _ = sets_of(make, batch, 19, 0, 128)
    yield "same_set", (same, same)
    # Stride 0: all rows are one, and all words of a row.
    a, b = sets_of(make, None, 6, 9, 192)
    yield "expanded_rows", (a[:1].expand(6, -1), b)
    yield "expanded_words", (a[:, :1].expand(-1, 3), b[:, :1].expand(-1, 3))


def empty_sets(make: Maker, batch: int | None) -> Iterator[tuple[str, Sets]]:
    if batch is not None:
        yield "empty_B", sets_of(make, 0, 3, 4, 64)
    yield "empty_a", sets_of(make, batch, 0, 4, 64)
    yield "empty_b", sets_of(make, batch, 3, 0, 64)
    yield "empty_W", sets_of(make, batch, 3, 4, 0)
    yield "empty_all", sets_of(make, None if batch is None else 0, 0, 0, 0)


def build_sets(make: Maker, sizes: Sizes) -> Sets:
    return sets_of(make, sizes.get("B"), sizes["Na"], sizes["Nb"], sizes["W"] * word_bits(make))


def wrong_sets(good: dict[str, Any], wrong: Wrong) -> Iterator[ErrorInput]:
    """Wrong in either set; the first that shows a size fixes it, so that b is blamed for it."""
    for argument in ("a", "b"):
        tensor: Tensor = good[argument]
        flat = tensor.flatten(0, -2)
        yield wrong(f"{argument}_rank_1", ValueError, argument, {argument: flat[0]})
        yield wrong(f"{argument}_rank_4", ValueError, argument, {argument: flat[None, None]})
        narrow, none = tensor[..., :1], tensor[..., :0]
        wide = torch.cat([tensor, tensor], dim=-1)
        for name, changed in (("narrow", narrow), ("without_words", none), ("wide", wide)):
            yield wrong(f"{argument}_{name}", ValueError, "b", {argument: changed})
        yield wrong(f"{argument}_on_meta", ValueError, "b", {argument: tensor.to("meta")})
        yield from wrong_kinds(argument, wrong)
    refused = (torch.bool, torch.int8, torch.int16, torch.int32, torch.float32, torch.complex64)
    yield from wrong_dtypes("a", good["a"], (*refused, torch.float16), wrong)
    yield from wrong_dtypes("b", good["b"], (*refused, torch.uint8), wrong)
    yield wrong("a_uint8_beside_int64", TypeError, "b", {"a": good["a"].to(torch.uint8)})
    for dtype, count in ((torch.int64, 65), (torch.uint8, 513)):
        longer = {
            argument: good[argument].new_zeros(*good[argument].shape[:-1], count, dtype=dtype)
            for argument in ("a", "b")
        }
        yield wrong(f"rows_of_{count}_{dtype}".replace("torch.", ""), ValueError, "bits per row", longer)


def too_many_rows(good: dict[str, Any], wrong: Wrong) -> Iterator[ErrorInput]:
    """Rows without words take no memory. Fake kernels don't look, so that sizes stay dynamic."""
    for argument in ("a", "b"):
        changes = {name: good[name][..., :0] for name in ("a", "b")}
        changes[argument] = changes[argument].new_empty(*good[argument].shape[:-2], 2**32, 0)
        yield wrong(f"{argument}_of_2_32_rows", ValueError, "rows", changes, needs_values=True)


def wrong_masks(good: Tensor, wrong: Wrong) -> Iterator[ErrorInput]:
    """For a [..., 5, W] and b [..., 6, W]."""
    for name, value in {
        "transposed": good.mT,
        "short_in_a": good[..., :4, :],
        "short_in_b": good[..., :5],
        "without_columns": good[..., :0],
        "rank_1": good.flatten(),
        "rank_4": good.expand(1, 1, 5, 6) if good.dim() == 2 else good[None],
        "on_meta": good.to("meta"),
        "shared_transposed": good.reshape(-1, 5, 6)[0].mT,
    }.items():
        yield wrong(f"mask_{name}", ValueError, "mask", {"mask": value})
    if good.dim() == 3:
        yield wrong("mask_B_short", ValueError, "mask", {"mask": good[:1]})
    yield from wrong_dtypes("mask", good, (torch.uint8, torch.int64, torch.float32), wrong)
    yield from wrong_kinds("mask", wrong, optional=True)
