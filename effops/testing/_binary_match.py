"""Entry of the binary engine: matches between two sets of packed rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from effops.testing._binary_inputs import WORD_DTYPES, word_bits
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
from effops.testing._wrong import wrong_maker


def _match(name: str, sets: Sets, *settings: Any, kind: Any = "awkward", **keywords: Any) -> SampleInput:
    return SampleInput(name, (*sets, *settings), keywords, kind=kind)


def _build_match(make: Maker, sizes: Sizes) -> SampleInput:
    sets = build_sets(make, sizes)
    masked = {"mask": make.bits(sizes["Na"], sizes["Nb"], ones=0.7)} if sizes["masked"] else {}
    ratio, most = (0.95, sizes["W"] * word_bits(make) // 2) if sizes["tested"] else (None, None)
    return _match("built", sets, ratio, most, bool(sizes["mutual"]), kind="ordinary", **masked)


def _match_samples(make: Maker) -> Iterator[SampleInput]:
    # Na and Nb differ from each other and from all other sizes: see OpInfo.dynamic. No ratio: torch.compile
    # first takes a float for a variable, and begins anew when the op fixes it.
    for name, rows_a, rows_b in (
        ("ordinary", 15, 17),
        ("ordinary_larger", 29, 31),
        ("ordinary_fewer", 9, 5),
    ):
        yield _match(name, sets_of(make, None, rows_a, rows_b, 128), None, 70, True, kind="ordinary")
    for number, (name, sets) in enumerate(awkward_sets(make, None)):
        yield _match(name, sets)
        ratio, most = ((0.9, None), (None, 60), (1.0, 128), (1.5, 2**40))[number % 4]
        yield _match(f"{name}_tested", sets, ratio, most, number % 3 == 0)
    for label, draw in (("", sets_of), ("_ties", tied_sets)):
        sets = draw(make, None, 23, 27, 256)
        mask = make.bits(23, 27, ones=0.4)
        yield _match(f"mask{label}", sets, mask=mask)
        yield _match(f"mask_one_way{label}", sets, None, None, False, mask=mask)
        yield _match(f"mask_tested{label}", sets, 0.97, 120, True, mask=mask)
        yield _match(f"empty_mask{label}", sets, mask=mask & False)
        single = torch.eye(23, 27, dtype=torch.bool, device=make.device)  # one candidate passes any ratio
        yield _match(f"single_candidates{label}", sets, 0.01, None, False, mask=single)
    yield _match("an_integer_ratio", sets_of(make, None, 9, 8, 128), 1, None, False)
    yield _match("infinite_ratio", tied_sets(make, None, 9, 8, 128), float("inf"), None, False)
    yield _match("distance_0", tied_sets(make, None, 9, 8, 128), None, 0, False)
    for name, sets in empty_sets(make, None):
        yield _match(name, sets, kind="empty")
        yield _match(f"{name}_tested", sets, 0.9, 3, False, kind="empty")


def _match_native(
    a: Any, b: Any, ratio: Any = None, max_distance: Any = None, mutual: Any = True, *, mask: Any = None
) -> tuple[Any, ...]:
    return a, b, ratio, max_distance, mutual, mask


def _match_errors(make: Maker) -> Iterator[ErrorInput]:
    """Starting from a [5, 2] and b [6, 2]."""
    a, b = sets_of(make, None, 5, 6, 128)
    good = {"a": a, "b": b, "ratio": 0.9, "max_distance": 60, "mutual": True}
    wrong = wrong_maker("hamming_match", good, ("mask",))
    yield from wrong_sets(good, wrong)
    yield from too_many_rows(good, wrong)
    yield from wrong_masks(make.bits(5, 6), wrong)
    yield wrong("a_batched", ValueError, "a", {"a": a[None]})
    yield wrong("b_batched", ValueError, "b", {"b": b[None]})
    yield wrong("both_batched", ValueError, "a", {"a": a[None], "b": b[None]})
    for ratio in (0.0, -0.0, -1.0, float("nan"), float("-inf")):
        yield wrong(f"ratio_{ratio}", ValueError, "ratio", {"ratio": ratio})
    for most in (-1, -(2**63)):
        yield wrong(f"max_distance_{most}", ValueError, "max_distance", {"max_distance": most})
    values: dict[str, Any] = {"a_string": "0.9", "a_list": [0.9], "a_dict": {}}
    for argument in ("ratio", "max_distance", "mutual"):
        for name, value in values.items():
            yield wrong(f"{argument}_{name}", TypeError, argument, {argument: value}, native=False)
    yield wrong("max_distance_a_fraction", TypeError, "max_distance", {"max_distance": 1.5}, native=False)


_HAMMING_MATCH = OpInfo(
    name="hamming_match",
    build=_build_match,
    size_ranges={
        "Na": range(40),
        "Nb": range(40),
        "W": range(6),
        "tested": range(2),
        "mutual": range(2),
        "masked": range(2),
    },
    typical={"Na": 9, "Nb": 8, "W": 3, "tested": 1, "mutual": 1, "masked": 1},
    smallest={"Na": 2, "Nb": 3, "W": 1, "tested": 0, "mutual": 1, "masked": 0},
    large=(
        {"Na": 700, "Nb": 900, "W": 4, "tested": 0, "mutual": 1, "masked": 0},
        {"Na": 700, "Nb": 900, "W": 4, "tested": 1, "mutual": 0, "masked": 1},
        {"Na": 2, "Nb": 60_000, "W": 8, "tested": 1, "mutual": 1, "masked": 0},
    ),
    other_paths=({"Na": 5, "Nb": 40, "W": 4, "tested": 0, "mutual": 0, "masked": 0},),
    draw_samples=_match_samples,
    draw_errors=_match_errors,
    native_args=_match_native,
    backward_args=None,
    differentiable=(),
    dynamic={"a": {0: "Na"}, "b": {0: "Nb"}},
    flops=(768, 0),  # 6 pairs of 64 bits: 2 * 6 * 64
    dtypes=WORD_DTYPES,
    data_dependent_shape=True,
)

ENTRIES: tuple[OpInfo, ...] = (_HAMMING_MATCH,)
