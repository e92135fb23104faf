"""Entries of the binary engine: distances and nearest neighbours of packed rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from effops.testing._binary_inputs import WORD_DTYPES
from effops.testing._binary_sets import (
    Sets,
    awkward_sets,
    build_sets,
    empty_sets,
    sets_of,
    tied_sets,
    too_many_rows,
    wrong_masks,
    wrong_sets,
)
from effops.testing._info import ErrorInput, Maker, OpInfo, SampleInput, Sizes
from effops.testing._wrong import Wrong, wrong_counts, wrong_dtypes, wrong_kinds, wrong_maker

# ------------------------------------------------------------------------------------ hamming_distance


def _wrong_batches(good: dict[str, Any], wrong: Wrong) -> Iterator[ErrorInput]:
    """Starting from batched sets."""
    a, b = good["a"], good["b"]
    yield wrong("a_unbatched", ValueError, "b", {"a": a[0]})
    yield wrong("b_unbatched", ValueError, "b", {"b": b[0]})
    yield wrong("B_short_in_a", ValueError, "b", {"a": a[:1]})
    yield wrong("B_short_in_b", ValueError, "b", {"b": b[:1]})
    yield wrong("B_none_in_b", ValueError, "b", {"b": b[:0]})


def _distance_samples(make: Maker) -> Iterator[SampleInput]:
    # B, Na and Nb differ from each other and from all other sizes: see OpInfo.dynamic.
    yield SampleInput("ordinary", sets_of(make, 3, 5, 7, 128))
    yield SampleInput("ordinary_larger", sets_of(make, 4, 9, 11, 128))
    yield SampleInput("ordinary_fewer", sets_of(make, 6, 10, 5, 128))
    for name, sets in awkward_sets(make, 2):
        yield SampleInput(name, sets, kind="awkward")
    for name, sets in empty_sets(make, 2):
        yield SampleInput(name, sets, kind="empty")
    for name, sets in empty_sets(make, None):
        yield SampleInput(f"{name}_unbatched", sets, kind="empty")


def _distance_errors(make: Maker) -> Iterator[ErrorInput]:
    """Starting from a [2, 5, 2] and b [2, 6, 2]."""
    good = dict(zip("ab", sets_of(make, 2, 5, 6, 128), strict=True))
    wrong = wrong_maker("hamming_distance", good)
    yield from wrong_sets(good, wrong)
    yield from too_many_rows(good, wrong)
    yield from _wrong_batches(good, wrong)


_HAMMING_DISTANCE = OpInfo(
    name="hamming_distance",
    build=lambda make, sizes: SampleInput("built", build_sets(make, sizes)),
    size_ranges={"B": range(4), "Na": range(40), "Nb": range(40), "W": range(6)},
    typical={"B": 2, "Na": 3, "Nb": 4, "W": 3},
    smallest={"B": 1, "Na": 2, "Nb": 3, "W": 1},
    large=({"B": 1, "Na": 700, "Nb": 900, "W": 4}, {"B": 9, "Na": 150, "Nb": 170, "W": 3}),
    other_paths=({"B": 1, "Na": 5, "Nb": 40, "W": 4},),
    draw_samples=_distance_samples,
    draw_errors=_distance_errors,
    native_args=lambda *inputs: inputs,
    backward_args=None,
    differentiable=(),
    vmap_batched=("a", "b"),
    dynamic={"a": {0: "B", 1: "Na"}, "b": {0: "B", 1: "Nb"}},
    flops=(768, 0),  # 6 pairs of 64 bits: 2 * 6 * 64
    dtypes=WORD_DTYPES,
)

# ------------------------------------------------------------------------------------ hamming_knn

_KNN_KEYWORDS = ("lengths_a", "lengths_b", "mask", "mutual")


def _limits(make: Maker, sets: Sets, share: float = 0.7) -> dict[str, Any]:
    """Random lengths and a mask for the sets."""
    a, b = sets
    pairs = (*a.shape[:-1], b.shape[-2])
    return {
        "lengths_a": make.integers(*a.shape[:-2], high=a.shape[-2] + 1),
        "lengths_b": make.integers(*b.shape[:-2], high=b.shape[-2] + 1),
        "mask": make.bits(*pairs, ones=share),
    }


def _knn(name: str, sets: Sets, k: int = 1, kind: Any = "awkward", **keywords: Any) -> SampleInput:
    return SampleInput(name, (*sets, k), keywords, kind=kind)


def _build_knn(make: Maker, sizes: Sizes) -> SampleInput:
    sets = build_sets(make, sizes)
    limits = _limits(make, sets) if sizes["limited"] else {}
    return _knn("built", sets, sizes["k"], "ordinary", **limits, mutual=bool(sizes["mutual"]))


def _knn_samples(make: Maker) -> Iterator[SampleInput]:
    # B, Na and Nb differ from each other and from all other sizes: see OpInfo.dynamic.
    for name, batch, rows_a, rows_b in (
        ("ordinary", 3, 5, 7),
        ("ordinary_larger", 4, 9, 11),
        ("ordinary_fewer", 6, 10, 5),
    ):
        sets = sets_of(make, batch, rows_a, rows_b, 128)
        yield _knn(name, sets, 2, "ordinary", **_limits(make, sets), mutual=False)
    for number, (name, sets) in enumerate(awkward_sets(make, 2)):
        yield _knn(name, sets, (1, 2, 3, 9)[number % 4])
        yield _knn(f"{name}_mutual", sets, (2, 1)[number % 2], mutual=True)
    yield from _knn_counts(make)
    yield from _knn_limits(make)
    for sets_per_batch, label in ((2, ""), (None, "_unbatched")):
        for name, sets in empty_sets(make, sets_per_batch):
            yield _knn(f"{name}{label}", sets, 2, "empty")
            limits = _limits(make, sets)
            yield _knn(f"{name}_limited{label}", sets, 2, "empty", **limits, mutual=True)
    yield _knn("empty_k", sets_of(make, 2, 3, 4, 64), 0, "empty")
    yield _knn("empty_k_mutual", sets_of(make, 2, 3, 4, 64), 0, "empty", mutual=True)


def _knn_counts(make: Maker) -> Iterator[SampleInput]:
    """Counts of neighbours, below and above Nb."""
    for k in (1, 2, 3, 5, 8, 16, 17, 40):
        yield _knn(f"k{k}_of_20", sets_of(make, None, 6, 20, 256), k)
        yield _knn(f"k{k}_of_20_ties", tied_sets(make, 2, 6, 20, 256), k)
    yield _knn("k100_of_300", sets_of(make, None, 3, 300, 64), 100)
    yield _knn("k5_of_1000", tied_sets(make, None, 3, 1000, 64), 5)


def _knn_limits(make: Maker) -> Iterator[SampleInput]:
    """Lengths and masks, one by one and together."""
    for batch, label in ((3, ""), (None, "_unbatched")):
        for name, draw in (("random", sets_of), ("ties", tied_sets)):
            sets = draw(make, batch, 17, 21, 256)
            limits = _limits(make, sets)
            for argument, value in limits.items():
                yield _knn(f"{argument}_{name}{label}", sets, 2, **{argument: value})
                yield _knn(f"{argument}_mutual_{name}{label}", sets, 2, **{argument: value}, mutual=True)
            yield _knn(f"all_limits_{name}{label}", sets, 3, **limits)
            yield _knn(f"all_limits_mutual_{name}{label}", sets, 1, **limits, mutual=True)
    sets = sets_of(make, 3, 6, 7, 128)
    yield _knn("shared_mask", sets, 2, mask=make.bits(6, 7))
    yield _knn("shared_mask_mutual", sets, 2, mask=make.bits(6, 7), mutual=True)
    nothing = torch.zeros(3, 6, 7, dtype=torch.bool, device=make.device)
    yield _knn("empty_mask", sets, 2, mask=nothing)
    yield _knn("full_mask", sets, 2, mask=~nothing, mutual=True)
    ends = {"lengths_a": make.int64([0, 6, 3]), "lengths_b": make.int64([7, 0, 7])}
    yield _knn("lengths_at_the_ends", sets, 2, **ends)
    yield _knn("lengths_at_the_ends_mutual", sets, 2, **ends, mutual=True)


def _knn_native(
    a: Any,
    b: Any,
    k: Any = 1,
    *,
    lengths_a: Any = None,
    lengths_b: Any = None,
    mask: Any = None,
    mutual: Any = False,
) -> tuple[Any, ...]:
    return a, b, k, lengths_a, lengths_b, mask, mutual


def _knn_errors(make: Maker) -> Iterator[ErrorInput]:
    """Starting from a [2, 5, 2] and b [2, 6, 2]."""
    a, b = sets_of(make, 2, 5, 6, 128)
    good = {"a": a, "b": b, "k": 1}
    wrong = wrong_maker("hamming_knn", good, _KNN_KEYWORDS)
    yield from wrong_sets(good, wrong)
    yield from too_many_rows(good, wrong)
    yield from _wrong_batches(good, wrong)
    yield from wrong_counts("k", 2**32 - 1, wrong)
    for argument, rows in (("lengths_a", 5), ("lengths_b", 6)):
        yield from _wrong_lengths(argument, make.int64([rows, rows]), rows, wrong)
    yield from wrong_masks(make.bits(2, 5, 6), wrong)
    unbatched = {"a": a[0], "b": b[0]}
    yield wrong("length_for_one_set", ValueError, "lengths_a", {**unbatched, "lengths_a": make.int64([5])})
    yield wrong("masks_for_one_set", ValueError, "mask", {**unbatched, "mask": make.bits(1, 5, 6)})
    yield wrong("mutual_a_string", TypeError, "mutual", {"mutual": "yes"}, native=False)


def _wrong_lengths(argument: str, good: Tensor, rows: int, wrong: Wrong) -> Iterator[ErrorInput]:
    for name, value in {
        "rank_0": good[0],
        "rank_2": good[None],
        "short": good[:1],
        "long": torch.cat([good, good]),
        "none_of_them": good[:0],
        "on_meta": good.to("meta"),
    }.items():
        yield wrong(f"{argument}_{name}", ValueError, argument, {argument: value})
    yield from wrong_dtypes(argument, good, (torch.int32, torch.uint8, torch.float32, torch.bool), wrong)
    yield from wrong_kinds(argument, wrong, optional=True)
    for number in (-1, rows + 1, 2**31, 2**32, 2**63 - 1, -(2**63)):
        lengths = good.clone()
        lengths[-1] = number
        yield wrong(f"{argument}_{number}", ValueError, argument, {argument: lengths}, needs_values=True)


_HAMMING_KNN = OpInfo(
    name="hamming_knn",
    build=_build_knn,
    size_ranges={
        "B": range(4),
        "Na": range(40),
        "Nb": range(40),
        "W": range(6),
        "k": range(12),
        "limited": range(2),
        "mutual": range(2),
    },
    typical={"B": 2, "Na": 3, "Nb": 4, "W": 3, "k": 2, "limited": 1, "mutual": 0},
    smallest={"B": 1, "Na": 2, "Nb": 3, "W": 1, "k": 2, "limited": 0, "mutual": 0},
    large=(
        {"B": 1, "Na": 700, "Nb": 900, "W": 4, "k": 2, "limited": 0, "mutual": 0},
        {"B": 1, "Na": 700, "Nb": 900, "W": 4, "k": 1, "limited": 0, "mutual": 1},
        {"B": 1, "Na": 2, "Nb": 60_000, "W": 8, "k": 3, "limited": 0, "mutual": 0},
        {"B": 9, "Na": 150, "Nb": 170, "W": 3, "k": 17, "limited": 1, "mutual": 1},
    ),
    other_paths=(
        {"B": 1, "Na": 5, "Nb": 40, "W": 4, "k": 1, "limited": 0, "mutual": 1},
        {"B": 1, "Na": 5, "Nb": 40, "W": 4, "k": 11, "limited": 1, "mutual": 0},
    ),
    draw_samples=_knn_samples,
    draw_errors=_knn_errors,
    native_args=_knn_native,
    backward_args=None,
    differentiable=(),
    vmap_batched=("a", "b", "lengths_a", "lengths_b", "mask"),
    dynamic={
        "a": {0: "B", 1: "Na"},
        "b": {0: "B", 1: "Nb"},
        "lengths_a": {0: "B"},
        "lengths_b": {0: "B"},
        "mask": {0: "B", 1: "Na", 2: "Nb"},
    },
    flops=(768, 0),  # 6 pairs of 64 bits: 2 * 6 * 64
    dtypes=WORD_DTYPES,
)

ENTRIES: tuple[OpInfo, ...] = (_HAMMING_DISTANCE, _HAMMING_KNN)
