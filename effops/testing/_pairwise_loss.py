"""Entry of the pairwise engine: the pixel-embedding loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from effops.ops.pairwise_embedding_loss import default_weights, sort_by_label
from effops.testing._info import ErrorInput, Maker, OpInfo, SampleInput, Sizes
from effops.testing._pairwise_inputs import (
    cast_like_op,
    groups,
    spread,
    with_batch,
    wrong_beside,
    wrong_numbers,
    wrong_points,
)
from effops.testing._wrong import saved_outputs, wrong_dtypes, wrong_kinds, wrong_maker, wrong_options

_OPTIONS = ("sum_w", "thesis", "none")

# ------------------------------------------------------------------------------------ samples


def _sample(
    make: Maker,
    batch: int,
    points: int,
    channels: int,
    alpha: float = 0.4,
    normalize: str = "sum_w",
    *,
    instances: int = 3,
    plain: bool = False,
    name: str = "built",
    **settings: Any,
) -> SampleInput:
    """Labels of -1 among the others; with weights, unless it is plain."""
    x = spread(make, batch, points, channels)
    labels = make.integers(batch, points, high=instances + 1) - 1
    weights = None if plain else make.uniform(batch, points, low=0.2, high=1.0)
    return SampleInput(name, (x, labels, alpha, weights, normalize), **settings)


def _build(make: Maker, sizes: Sizes) -> SampleInput:
    return _sample(
        make,
        sizes["B"],
        sizes["N"],
        sizes["D"],
        normalize=_OPTIONS[sizes["option"]],
        instances=sizes["instances"],
        plain=bool(sizes["plain"]),
    )


def _samples(make: Maker) -> Iterator[SampleInput]:
    # B and N differ from each other and from all other sizes: see OpInfo.dynamic.
    for name, (batch, points) in {"": (5, 12), "_larger": (3, 20), "_fewer": (2, 11)}.items():
        x, labels, _, weights, _ = _sample(make, batch, points, 4).args
        yield SampleInput(f"ordinary{name}", (x, labels), {"weights": weights})

    def awkward(name: str, *sizes: Any, **settings: Any) -> SampleInput:
        return _sample(make, *sizes, name=name, kind="awkward", **settings)

    for option in _OPTIONS:
        yield awkward(f"plain_{option}", 2, 13, 3, 0.5, option, plain=True)
        yield awkward(f"weighted_{option}", 2, 13, 3, 0.3, option)
    yield awkward("several_tiles", 1, 150, 5, instances=9, plain=True)
    yield awkward("one_instance", 2, 12, 3, instances=1)
    yield awkward("as_many_instances_as_points", 1, 30, 5, instances=500, plain=True)
    yield awkward("D1", 2, 9, 1, 0.25)
    yield awkward("D64", 1, 24, 64, plain=True)
    yield awkward("D512", 1, 5, 512)
    yield awkward("one_point", 3, 1, 3)
    for alpha in (-1, 0.0, 1.0, 3.0):  # beyond [0, 1] the hinge is always or never open
        yield awkward(f"alpha_{alpha}", 2, 12, 3, alpha)
    yield from _special_samples(make)
    for name, sizes in {"empty_B": (0, 9, 3), "empty_N": (2, 0, 3), "empty_BN": (0, 0, 3)}.items():
        yield _sample(make, *sizes, name=name, kind="empty")


def _special_samples(make: Maker) -> Iterator[SampleInput]:
    """A single image, and labels and weights that are easily got wrong."""
    x, weights = make.normal(2, 14, 3), make.uniform(2, 14, low=0.2, high=1.0)
    labels = make.integers(2, 14, high=4) - 1

    def awkward(name: str, *args: Any, smooth: bool = True) -> SampleInput:
        return SampleInput(name, args, kind="awkward", smooth=smooth)

    yield awkward("an_image", x[0], labels[0], 0.4, weights[0], "thesis")
    yield awkward("defaults", x, labels)
    yield awkward("all_ignored", x, torch.full_like(labels, -1), 0.4, weights)
    one_ignored = labels.clone()
    one_ignored[1] = -7
    yield awkward("an_image_ignored", x, one_ignored, 0.4, None, "thesis")
    ends = make.int64([-(2**63), -2, -1, 0, 1, 2**31, 2**62, 2**63 - 1])
    yield awkward("any_label", x, ends[make.integers(2, 14, high=8)], 0.4, weights)
    yield awkward("in_runs", x, labels.sort(dim=1).values, 0.4, weights)
    holes = torch.where(torch.arange(14, device=make.device) % 3 == 0, 0.0, weights)
    yield awkward("some_weights_0", x, labels, 0.4, holes)
    yield awkward("all_weights_0", x, labels, 0.4, 0 * weights, "none")
    unread = torch.where(labels < 0, math.nan, weights)
    yield awkward("ignored_weights_nan", x, labels, 0.4, unread, smooth=False)
    unseen = torch.where(labels[..., None] < 0, math.inf, x)
    yield awkward("ignored_points_inf", unseen, labels, 0.4, weights, smooth=False)
    apart = groups(make, 2, 12, 3, noise=0.03)
    which = torch.arange(12, device=make.device).expand(2, -1) // 4
    yield awkward("ideal", apart, which, 0.7)
    yield awkward("collapsed", x[:, :1].repeat(1, 12, 1), which, 0.5)


# ------------------------------------------------------------------------------------ native arguments


def _native(
    x: Any, labels: Any, alpha: Any = 0.5, weights: Any = None, normalize: Any = "sum_w"
) -> tuple[Any, ...]:
    """Labels become an order and instance numbers, as in the public function."""
    x, weights = cast_like_op(x, weights)
    if isinstance(x, Tensor) and x.dim() == 2:
        x, labels, weights = with_batch(x, labels, weights)
    order, segments = sort_by_label(labels)
    if weights is None:
        weights = default_weights(order, segments, x.dtype)
    return x, order, segments, weights, alpha, _OPTIONS.index(normalize)


def _backward_args(gradients: Sequence[Tensor], inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    op = torch.ops.effops.pairwise_embedding_loss.default
    _, costs = saved_outputs(op, inputs, (gradients[0],) * 2)
    return gradients[0], *inputs[:4], costs, *inputs[4:], True, True


# ------------------------------------------------------------------------------------ wrong inputs


def _errors(make: Maker) -> Iterator[ErrorInput]:
    """Starting from x [2, 9, 3], labels [2, 9] and weights [2, 9]."""
    names = ("x", "labels", "alpha", "weights", "normalize")
    good = dict(zip(names, _sample(make, 2, 9, 3).args, strict=True))
    wrong = wrong_maker("pairwise_embedding_loss", good)
    x, labels, weights = good["x"], good["labels"], good["weights"]
    yield from wrong_points("x", x, wrong)
    for name, tensor in {"B_1": x[:1], "B_0": x[:0], "short": x[:, 1:]}.items():
        yield wrong(f"x_{name}", ValueError, "labels", {"x": tensor}, native=False)
    yield wrong("x_an_image", ValueError, "labels", {"x": x[0]}, native=False)
    yield wrong("x_float64", TypeError, "weights", {"x": x.double()})
    dtypes = (torch.int32, torch.bool, torch.float32)
    yield from wrong_kinds("labels", wrong)
    for error in (*wrong_beside("labels", labels, wrong), *wrong_dtypes("labels", labels, dtypes, wrong)):
        yield dataclasses.replace(error, native=not error.on_one_device)  # the op gets no labels
    yield from wrong_beside("weights", weights, wrong)
    yield wrong("weights_short", ValueError, "weights", {"weights": weights[:, 1:]})
    yield from wrong_dtypes("weights", weights, (torch.float64, torch.bfloat16, torch.int64), wrong)
    yield from wrong_kinds("weights", wrong, optional=True)
    yield from wrong_numbers("alpha", (math.nan, math.inf, -math.inf), wrong)
    yield from wrong_options("normalize", wrong)


# ------------------------------------------------------------------------------------ entry

_FORM = {"option": 0, "instances": 3, "plain": 0}

_PAIRWISE_EMBEDDING_LOSS = OpInfo(
    name="pairwise_embedding_loss",
    build=_build,
    size_ranges={
        "B": range(4),
        "N": range(20),
        "D": range(2, 8),
        "instances": range(1, 6),
        "option": range(3),
        "plain": range(2),
    },
    typical={**_FORM, "B": 2, "N": 9, "D": 3},
    smallest={**_FORM, "B": 1, "N": 2, "D": 2},
    large=(
        {**_FORM, "B": 1, "N": 300, "D": 8},
        {**_FORM, "B": 3, "N": 150, "D": 5, "instances": 20, "option": 1, "plain": 1},
    ),
    other_paths=({**_FORM, "B": 2, "N": 10, "D": 5, "option": 2, "plain": 1},),
    draw_samples=_samples,
    draw_errors=_errors,
    native_args=_native,
    backward_args=_backward_args,
    native_computed=lambda outputs: outputs[0],
    differentiable=("x", "weights"),
    untried={"weights": (1e30, -1e30)},  # products overflow, and costs of 0 are rounded
    float32_results=True,
    autocast=dict.fromkeys(("x", "weights"), "float32"),
    vmap_batched=("x", "labels", "weights"),
    dynamic={label: {0: "B", 1: "N"} for label in ("x", "labels", "weights")},
    flops=(16, 32),  # 4 pairs of 2 channels: 2 and 4 each
    smallest_scale=0.1,
)

ENTRIES: tuple[OpInfo, ...] = (_PAIRWISE_EMBEDDING_LOSS,)
