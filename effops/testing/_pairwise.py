"""Entries of the pairwise engine: mean shift."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from effops.testing._info import (
    DEFAULT_TOLERANCES,
    ErrorInput,
    Maker,
    OpInfo,
    SampleInput,
    Sizes,
    Tolerance,
)
from effops.testing._pairwise_inputs import (
    cast_like_op,
    groups,
    spread,
    with_batch,
    wrong_beside,
    wrong_integers,
    wrong_numbers,
    wrong_points,
)
from effops.testing._wrong import Wrong, saved_outputs, wrong_dtypes, wrong_kinds, wrong_maker, wrong_options

# ------------------------------------------------------------------------------------ samples


def _sample(
    make: Maker,
    batch: int,
    points: int,
    channels: int,
    rows: int | None = None,
    *,
    kappa: float = 6.0,
    eta: float = 1.0,
    iterations: int = 2,
    plain: bool = False,
    return_all: bool = False,
    noise: float | None = 0.2,
    order: str = "runs",
    tol: float | None = None,
    name: str = "built",
    **settings: Any,
) -> SampleInput:
    """Points in groups if there is a noise, seeds if there are rows; all arguments unless plain."""
    shape = (batch, points, channels)
    x = spread(make, *shape) if noise is None else groups(make, *shape, noise=noise, order=order)
    number: Any = kappa if plain else torch.tensor(kappa, dtype=make.dtype, device=make.device)
    others: dict[str, Any] = {"eta": eta} if eta != 1 else {}
    others["iterations"] = iterations
    if not plain:
        others["weights"] = make.uniform(batch, points, low=0.5, high=1.5)
    if return_all:
        others["return_all"] = True
    if rows is not None:
        others["seeds"] = spread(make, batch, rows, channels)
    if tol is not None:
        others["tol"] = tol
    return SampleInput(name, (x, number), others, **settings)


def _build(make: Maker, sizes: Sizes) -> SampleInput:
    """Seeds, which points may surround evenly, go less than half of the way: their mean may be almost 0.

    They meet two points or more in an iteration or more: else gradients are 0, also beside NaN.
    """
    has_seeds = sizes["seeds"]
    return _sample(
        make,
        sizes["B"],
        max(sizes["N"], 2 * has_seeds),
        sizes["D"],
        sizes["M"] if has_seeds else None,
        kappa=(5.0, 12.0)[sizes["sharp"]],
        eta=0.4 if has_seeds else (1.0, 0.7)[sizes["lazy"]],
        iterations=sizes["T"],
        plain=bool(sizes["plain"]),
        return_all=bool(sizes["all"]),
        noise=None,
    )


def _samples(make: Maker) -> Iterator[SampleInput]:
    # B, N and M differ from each other and from all other sizes: see OpInfo.dynamic.
    yield _sample(make, 5, 12, 4, 7, name="ordinary")
    yield _sample(make, 3, 20, 4, 9, name="ordinary_larger")
    yield _sample(make, 2, 11, 4, 8, name="ordinary_fewer")

    def awkward(name: str, *sizes: Any, **settings: Any) -> SampleInput:
        return _sample(make, *sizes, name=name, kind="awkward", **settings)

    yield awkward("all_points", 2, 13, 3)
    yield awkward("all_points_mixed", 1, 40, 5, order="mixed", return_all=True)
    yield awkward("all_iterates", 2, 9, 3, 4, return_all=True, eta=0.5)
    yield awkward("plain", 2, 13, 3, plain=True)
    yield awkward("plain_seeds", 1, 17, 3, 5, plain=True, kappa=20.0)
    yield awkward("several_tiles", 1, 150, 5, plain=True, noise=0.1)
    yield awkward("several_tiles_sharp", 1, 150, 3, kappa=100.0, noise=0.05, iterations=3)
    yield awkward("D1", 1, 9, 1, noise=0.0)
    yield awkward("D17", 1, 21, 17, 3, noise=0.05)
    yield awkward("D64", 1, 20, 64, noise=0.05, kappa=36.0, iterations=5)
    yield awkward("D512", 1, 4, 512, noise=0.01, iterations=1)
    yield awkward("one_point", 2, 1, 3, return_all=True)
    yield awkward("lazy", 2, 10, 3, eta=0.25, iterations=4)
    yield awkward("still", 2, 10, 3, 4, eta=0.0)
    yield awkward("no_iterations", 2, 10, 3, iterations=0)
    yield awkward("no_iterations_all", 2, 10, 3, 4, iterations=0, return_all=True)
    yield awkward("flat", 2, 10, 3, 4, kappa=0.25, iterations=1)
    yield awkward("tol", 3, 12, 3, iterations=6, kappa=20.0, tol=1e-2, return_all=True)
    yield awkward("seeds_without_points", 2, 0, 3, 4)
    yield from _special_samples(make)
    for name, sizes in {"empty_B": (0, 9, 3), "empty_N": (2, 0, 3), "empty_M": (2, 9, 3, 0)}.items():
        yield _sample(make, *sizes, name=name, kind="empty")


def _special_samples(make: Maker) -> Iterator[SampleInput]:
    """Single sets, and weights and points that are easily got wrong."""
    x, seeds = groups(make, 14, 3, noise=0.2), spread(make, 5, 3)
    weights = make.uniform(14, low=0.5, high=1.5)
    kappa = torch.tensor(10.0, dtype=make.dtype, device=make.device)
    eta, iterations = 1.0, 2

    def awkward(name: str, *args: Any, smooth: bool = True, **others: Any) -> SampleInput:
        return SampleInput(name, args, others, kind="awkward", smooth=smooth)

    yield awkward("a_set", x, kappa, eta, iterations, weights, True)
    yield awkward("a_set_with_seeds", x, 10, eta, iterations, weights, seeds=seeds)
    yield awkward("defaults", x)
    yield awkward("precision", x, kappa, eta, iterations, precision="high")
    yield awkward("duplicates", x[:3].repeat(4, 1), kappa, eta, iterations, weights[:12])
    holes = torch.where(torch.arange(14, device=make.device) % 3 == 0, 0.0, weights)
    yield awkward("some_weights_0", x, kappa, eta, iterations, holes)
    yield awkward("all_weights_0", x, kappa, eta, iterations, 0 * weights, smooth=False)
    yield awkward("all_weights_0_seeds", x, kappa, eta, iterations, 0 * weights, seeds=seeds, smooth=False)


# ------------------------------------------------------------------------------------ native arguments


def _native(
    x: Any,
    kappa: Any = 36.0,
    eta: Any = 1.0,
    iterations: Any = 10,
    weights: Any = None,
    return_all: Any = False,
    *,
    seeds: Any = None,
    tol: Any = None,
    precision: Any = "high",
) -> tuple[Any, ...]:
    """``save`` stays False: autograd turns it on."""
    x, weights, seeds, kappa_tensor = cast_like_op(x, weights, seeds, kappa)
    if isinstance(x, Tensor) and x.dim() == 2:
        x, weights, seeds = with_batch(x, weights, seeds)
    number = 0.0
    if not isinstance(kappa_tensor, Tensor):
        number, kappa_tensor = kappa_tensor, None
    settings = (number, eta, iterations, -1.0 if tol is None else tol)
    return x, weights, seeds, kappa_tensor, *settings, {"high": 0, "medium": 1}[precision], return_all, False


def _backward_args(gradients: Sequence[Tensor], inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    op = torch.ops.effops.mean_shift.default
    output, iterates, sums, steps = saved_outputs(op, (*inputs[:-1], True), (gradients[0],) * 4)
    tensors, (kappa, eta, _, _, precision, return_all, _) = inputs[:4], inputs[4:]
    saved = (output if return_all else iterates, sums, steps)
    needs = (tensor is not None for tensor in tensors)
    return gradients[0], *tensors, *saved, kappa, eta, precision, return_all, *needs


# ------------------------------------------------------------------------------------ wrong inputs


def _errors(make: Maker) -> Iterator[ErrorInput]:
    """Starting from x [2, 9, 3], weights [2, 9], seeds [2, 4, 3] and a kappa tensor."""
    sample = _sample(make, 2, 9, 3, 4)
    (x, kappa), others = sample.args, sample.kwargs
    weights, seeds = others["weights"], others["seeds"]
    good = {"x": x, "kappa": kappa, "eta": 1.0, "iterations": 2, "weights": weights, "return_all": False}
    good["seeds"] = seeds
    wrong = wrong_maker("mean_shift", good, ("seeds", "tol", "precision"))
    yield from wrong_points("x", x, wrong)
    for name, tensor in {"B_1": x[:1], "B_0": x[:0], "short": x[:, 1:]}.items():
        yield wrong(f"x_{name}", ValueError, "weights", {"x": tensor})
    yield wrong("x_narrow", ValueError, "seeds", {"x": x[..., 1:]})
    yield wrong("x_a_set", ValueError, "weights", {"x": x[0]}, native=False)
    yield wrong("x_float64", TypeError, "weights", {"x": x.double()})
    yield from wrong_beside("weights", weights, wrong)
    yield wrong("weights_short", ValueError, "weights", {"weights": weights[:, 1:]})
    yield wrong("weights_of_1", ValueError, "weights", {"weights": weights[:, :1]})
    yield from wrong_dtypes("weights", weights, (torch.float64, torch.bfloat16, torch.int64), wrong)
    yield from wrong_kinds("weights", wrong, optional=True)
    yield from wrong_beside("seeds", seeds, wrong)
    yield wrong("seeds_narrow", ValueError, "seeds", {"seeds": seeds[..., 1:]})
    yield from wrong_dtypes("seeds", seeds, (torch.float64, torch.float16, torch.bool), wrong)
    yield from _wrong_kappas(kappa, wrong)
    yield from wrong_numbers("eta", (-0.1, 1.5, float("nan"), float("inf")), wrong)
    yield from wrong_integers("iterations", (-1, -(2**63)), wrong, backward=False)
    yield from wrong_numbers("tol", (float("nan"), float("inf")), wrong, backward=False)
    yield wrong("tol_-0.5", ValueError, "tol", {"tol": -0.5}, native=False)
    yield from wrong_options("precision", wrong)
    yield wrong("return_all_a_string", TypeError, "return_all", {"return_all": "yes"}, native=False)


def _wrong_kappas(good: Tensor, wrong: Wrong) -> Iterator[ErrorInput]:
    yield from wrong_numbers("kappa", (-1.0, float("nan"), float("inf"), -float("inf")), wrong)
    yield wrong("kappa_none", TypeError, "kappa", {"kappa": None}, native=False)
    for name, tensor in {"two": good.repeat(2), "none": good.repeat(0), "a_matrix": good.view(1, 1)}.items():
        yield wrong(f"kappa_tensor_{name}", ValueError, "kappa", {"kappa": tensor})
    yield from wrong_dtypes("kappa", good, (torch.int64, torch.bool, torch.complex64), wrong)
    yield wrong("kappa_on_meta", ValueError, "kappa", {"kappa": good.to("meta")})
    for number in (-1.0, float("nan"), float("inf")):
        tensor = torch.full_like(good, number)
        yield wrong(f"kappa_tensor_{number}", ValueError, "kappa", {"kappa": tensor}, needs_values=True)


# ------------------------------------------------------------------------------------ mean_shift

_FORM = {"seeds": 0, "M": 4, "all": 0, "plain": 0, "sharp": 0, "lazy": 0}

_MEAN_SHIFT = OpInfo(
    name="mean_shift",
    build=_build,
    size_ranges={
        "B": range(4),
        "N": range(20),
        "D": range(2, 8),
        "T": range(1, 4),
        "M": range(1, 6),
        **dict.fromkeys(("seeds", "all", "plain", "sharp", "lazy"), range(2)),
    },
    typical={**_FORM, "B": 2, "N": 7, "D": 3, "T": 2},
    smallest={**_FORM, "B": 1, "N": 2, "D": 2, "T": 1},
    large=(
        {**_FORM, "B": 1, "N": 300, "D": 8, "T": 2},
        {**_FORM, "B": 3, "N": 150, "D": 5, "T": 2, "seeds": 1, "M": 70, "sharp": 1},
    ),
    other_paths=({**_FORM, "B": 2, "N": 9, "D": 5, "T": 2, "seeds": 1, "all": 1},),
    draw_samples=_samples,
    draw_errors=_errors,
    native_args=_native,
    backward_args=_backward_args,
    native_computed=lambda outputs: outputs[0],
    native_is_narrow=True,
    differentiable=("x", "kappa", "weights", "seeds"),
    untried={"x": (0.0,), "seeds": (0.0,)},  # gradients of rows of zeros are divided by 1e-12
    autocast=dict.fromkeys(("x", "kappa", "weights", "seeds"), "float32"),
    vmap_batched=("x", "kappa", "weights", "seeds"),
    dynamic={"x": {0: "B", 1: "N"}, "weights": {0: "B", 1: "N"}, "seeds": {0: "B", 1: "M"}},
    flops=(32, 80),  # 1 iteration, 4 pairs of 2 channels: 4 and 10 each
    # An error of a similarity is kappa times that in a kernel value, and each iteration multiplies the errors
    # of points between two modes by up to kappa.
    tolerances={**DEFAULT_TOLERANCES, torch.float32: Tolerance(2e-5, 2e-4)},
    smallest_scale=0.1,
)

ENTRIES: tuple[OpInfo, ...] = (_MEAN_SHIFT,)
