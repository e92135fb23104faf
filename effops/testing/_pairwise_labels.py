"""Entries of the pairwise engine: labels of points, which are integers.

Similarities keep away from the threshold, so that rounding changes no label.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from effops.testing._info import ErrorInput, Maker, OpInfo, SampleInput, Sizes
from effops.testing._pairwise_inputs import (
    arc,
    cast_like_op,
    groups,
    with_batch,
    wrong_integers,
    wrong_numbers,
    wrong_points,
)
from effops.testing._wrong import wrong_maker

_NOT_FINITE = (math.nan, math.inf, -math.inf)


def _native(x: Any, *numbers: Any) -> tuple[Any, ...]:
    (x,) = cast_like_op(x)
    return *(with_batch(x) if isinstance(x, Tensor) and x.dim() == 2 else (x,)), *numbers


# ------------------------------------------------------------------------------------ assign_modes


def _modes(
    make: Maker,
    batch: int,
    points: int,
    channels: int,
    threshold: float = 0.9,
    min_size: int = 1,
    *,
    count: int = 3,
    noise: float = 0.03,
    order: str = "mixed",
    name: str = "built",
    **settings: Any,
) -> SampleInput:
    modes = groups(make, batch, points, channels, count=count, noise=noise, order=order)
    return SampleInput(name, (modes, threshold, min_size), **settings)


def _modes_samples(make: Maker) -> Iterator[SampleInput]:
    # B and N differ from each other and from all other sizes: see OpInfo.dynamic.
    for name, (batch, points) in {"": (5, 12), "_larger": (3, 20), "_fewer": (2, 11)}.items():
        yield SampleInput(f"ordinary{name}", (groups(make, batch, points, 4, noise=0.03, order="mixed"),))

    def awkward(name: str, modes: Tensor, threshold: float = 0.9, min_size: int = 1) -> SampleInput:
        return SampleInput(name, (modes, threshold, min_size), kind="awkward")

    def drawn(name: str, *sizes: Any, **settings: Any) -> SampleInput:
        return _modes(make, *sizes, name=name, kind="awkward", **settings)

    yield drawn("min_size", 2, 14, 3, 0.9, 5)
    yield drawn("min_size_of_none", 2, 14, 3, 0.9, 15)
    yield drawn("several_tiles", 1, 150, 6, 0.9, 3, count=11)
    yield drawn("several_tiles_in_runs", 2, 150, 3, count=5, order="runs")
    yield drawn("one_group", 1, 100, 3, count=1)
    yield drawn("D1", 2, 9, 1, count=2)
    yield drawn("D64", 1, 20, 64, count=9, noise=0.01)
    yield drawn("D512", 1, 6, 512, noise=0.005)
    yield drawn("one_point", 2, 1, 3)
    yield drawn("all_joined", 1, 20, 3, -0.5)
    yield drawn("none_joined", 1, 20, 3, 1.5)
    # Joined at less than 36.9 degrees: chains, which single steps hold together.
    chain = arc(make, 0, 25, 50, 75, 100, 150, 170, 190, 250)
    yield awkward("chain", chain[None])
    yield awkward("chain_backwards", chain.flip(0)[None])
    yield awkward("chain_mixed", chain[make.permutation(9)][None], 0.9, 2)
    yield awkward("ring", arc(make, *range(0, 360, 30))[make.permutation(12)][None])
    yield awkward("ties", arc(make, 300, 0, 100, 305, 5, 105)[None])
    yield awkward("a_set", chain)
    yield awkward("duplicates", chain[:2].repeat(5, 1)[None])
    rows = arc(make, 0, 10, 20, 100, 110)
    for name, number in {"nan": math.nan, "inf": math.inf, "minus_inf": -math.inf, "zero": 0.0}.items():
        bad = rows.clone()
        bad[1] = number
        yield awkward(f"a_row_of_{name}", bad[None])
    for name, sizes in {"empty_B": (0, 9, 3), "empty_N": (2, 0, 3), "empty_BN": (0, 0, 3)}.items():
        yield _modes(make, *sizes, name=name, kind="empty")


def _modes_errors(make: Maker) -> Iterator[ErrorInput]:
    good = dict(zip(("modes", "threshold", "min_size"), _modes(make, 2, 9, 3).args, strict=True))
    wrong = wrong_maker("assign_modes", good)
    yield from wrong_points("modes", good["modes"], wrong)
    yield from wrong_numbers("threshold", _NOT_FINITE, wrong)
    yield from wrong_integers("min_size", (0, -1, -(2**63)), wrong)


_ASSIGN_MODES = OpInfo(
    name="assign_modes",
    build=lambda make, sizes: _modes(make, sizes["B"], sizes["N"], sizes["D"], 0.9, sizes["least"]),
    size_ranges={"B": range(4), "N": range(20), "D": range(2, 8), "least": range(1, 5)},
    typical={"B": 2, "N": 9, "D": 3, "least": 3},
    smallest={"B": 1, "N": 2, "D": 2, "least": 1},
    large=({"B": 1, "N": 300, "D": 8, "least": 1}, {"B": 4, "N": 150, "D": 3, "least": 2}),
    draw_samples=_modes_samples,
    draw_errors=_modes_errors,
    native_args=lambda modes, threshold=0.9, min_size=1: _native(modes, threshold, min_size),
    native_is_narrow=True,
    backward_args=None,
    differentiable=(),
    autocast={"modes": "float32"},
    vmap_batched=("modes",),
    dynamic={"modes": {0: "B", 1: "N"}},
    flops=(16, 0),  # 4 pairs of 2 channels: 2 each
)

# ------------------------------------------------------------------------------------ mean_shift_cluster


def _points(
    make: Maker,
    batch: int,
    points: int,
    channels: int,
    kappa: float = 20.0,
    iterations: int = 4,
    threshold: float = 0.9,
    min_size: int = 1,
    *,
    count: int = 3,
    noise: float = 0.1,
    order: str = "mixed",
    name: str = "built",
    **settings: Any,
) -> SampleInput:
    x = groups(make, batch, points, channels, count=count, noise=noise, order=order)
    return SampleInput(name, (x, kappa, iterations, threshold, min_size), **settings)


def _build_points(make: Maker, sizes: Sizes) -> SampleInput:
    numbers = (sizes["B"], sizes["N"], sizes["D"], 20.0, sizes["T"], 0.9, sizes["least"])
    return _points(make, *numbers, noise=0.03)


def _points_samples(make: Maker) -> Iterator[SampleInput]:
    # B and N differ from each other and from all other sizes: see OpInfo.dynamic.
    for name, (batch, points) in {"": (5, 12), "_larger": (3, 20), "_fewer": (2, 11)}.items():
        x = groups(make, batch, points, 4, order="mixed")
        yield SampleInput(f"ordinary{name}", (x,), {"iterations": 4})

    def awkward(name: str, *sizes: Any, **settings: Any) -> SampleInput:
        return _points(make, *sizes, name=name, kind="awkward", **settings)

    yield awkward("min_size", 2, 14, 3, 20.0, 4, 0.9, 5)
    yield awkward("several_tiles", 1, 150, 6, 36.0, 5, 0.95, 3, count=11, noise=0.07)
    yield awkward("several_tiles_in_runs", 1, 150, 3, 100, 3, count=5, noise=0.05, order="runs")
    yield awkward("no_iterations", 2, 12, 3, 20.0, 0, noise=0.03)
    yield awkward("flat", 2, 12, 3, 0, 1)
    yield awkward("one_group", 1, 30, 3, count=1, noise=0.2)
    yield awkward("D1", 2, 9, 1, count=2)
    yield awkward("D64", 1, 20, 64, 36.0, 10, count=9, noise=0.05)
    yield awkward("one_point", 2, 1, 3)
    x = groups(make, 13, 4, order="mixed")
    yield SampleInput("a_set", (x, 20.0, 4), kind="awkward")
    yield SampleInput("defaults", (x,), kind="awkward")
    bad = groups(make, 2, 9, 3)
    for name, number in {"nan": math.nan, "inf": math.inf}.items():
        changed = bad.clone()
        changed[1, 4, 2] = number
        yield SampleInput(f"an_image_with_{name}", (changed, 20.0, 2), kind="awkward")
    for name, sizes in {"empty_B": (0, 9, 3), "empty_N": (2, 0, 3), "empty_BN": (0, 0, 3)}.items():
        yield _points(make, *sizes, name=name, kind="empty")


def _points_errors(make: Maker) -> Iterator[ErrorInput]:
    names = ("x", "kappa", "iterations", "threshold", "min_size")
    good = dict(zip(names, _points(make, 2, 9, 3).args, strict=True))
    wrong = wrong_maker("mean_shift_cluster", good)
    yield from wrong_points("x", good["x"], wrong)
    yield from wrong_numbers("kappa", (-1.0, *_NOT_FINITE), wrong)
    yield from wrong_integers("iterations", (-1, -(2**63)), wrong)
    yield from wrong_numbers("threshold", _NOT_FINITE, wrong)
    yield from wrong_integers("min_size", (0, -1), wrong)


_MEAN_SHIFT_CLUSTER = OpInfo(
    name="mean_shift_cluster",
    build=_build_points,
    size_ranges={"B": range(4), "N": range(20), "D": range(2, 8), "T": range(4), "least": range(1, 5)},
    typical={"B": 2, "N": 9, "D": 3, "T": 2, "least": 3},
    smallest={"B": 1, "N": 2, "D": 2, "T": 1, "least": 1},
    large=(
        {"B": 1, "N": 300, "D": 8, "T": 2, "least": 1},
        {"B": 4, "N": 150, "D": 3, "T": 2, "least": 2},
    ),
    draw_samples=_points_samples,
    draw_errors=_points_errors,
    native_args=lambda x, kappa=36.0, iterations=10, threshold=0.9, min_size=1: _native(
        x, kappa, iterations, threshold, min_size
    ),
    native_is_narrow=True,
    backward_args=None,
    differentiable=(),
    autocast={"x": "float32"},
    vmap_batched=("x",),
    dynamic={"x": {0: "B", 1: "N"}},
    flops=(48, 0),  # 4 pairs of 2 channels: 4 and 2 each
)

ENTRIES: tuple[OpInfo, ...] = (_ASSIGN_MODES, _MEAN_SHIFT_CLUSTER)
