"""Entry of the rowconv engine: one of several convolutions for each pixel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from effops.testing._info import ErrorInput, Maker, OpInfo, SampleInput, Sizes
from effops.testing._wrong import Wrong, wrong_dtypes, wrong_kinds, wrong_maker

_ARGUMENTS = ("x", "weights", "choice", "dilations", "bias")


def _select(
    make: Maker,
    batch: int,
    channels: int,
    outputs: int,
    height: int,
    width: int,
    dilations: Sequence[int] = (1, 2),
    *,
    kernel: int = 3,
    bias: bool = True,
    name: str = "built",
    **settings: Any,
) -> SampleInput:
    branches = len(dilations)
    return SampleInput(
        name,
        (
            make.normal(batch, channels, height, width),
            make.normal(branches, outputs, channels, kernel, kernel),
            make.integers(batch, height, width, high=branches + 1) - 1,
            list(dilations),
            make.normal(branches, outputs) if bias else None,
        ),
        **settings,
    )


def _build_select(make: Maker, sizes: Sizes) -> SampleInput:
    """The last branch may be the identity."""
    dilations = list(range(1, sizes["P"] + 1))
    if sizes["identity"] and dilations:
        dilations[-1] = 0
    outputs = sizes["C"] if sizes["identity"] else sizes["O"]
    shape = (sizes["N"], sizes["C"], outputs, sizes["H"], sizes["W"])
    sample = _select(make, *shape, dilations, kernel=sizes["k"] * 2 - 1, bias=bool(sizes["bias"]))
    return _channels_last(sample) if sizes["last"] else sample


def _channels_last(sample: SampleInput) -> SampleInput:
    x = sample.args[0].contiguous(memory_format=torch.channels_last)
    return replace(sample, args=(x, *sample.args[1:]))


def _select_samples(make: Maker) -> Iterator[SampleInput]:
    # N, H and W differ from each other and from all other sizes: see OpInfo.dynamic.
    yield _select(make, 8, 4, 5, 6, 7, name="ordinary")
    yield _select(make, 7, 4, 5, 9, 10, name="ordinary_larger")
    yield _select(make, 9, 4, 5, 8, 6, name="ordinary_fewer")

    def awkward(name: str, *sizes: Any, **settings: Any) -> SampleInput:
        return _select(make, *sizes, name=name, kind="awkward", **settings)

    yield awkward("C1", 2, 1, 1, 5, 6, kernel=5)
    yield awkward("C7", 2, 7, 3, 5, 6, dilations=[3], bias=False)
    yield awkward("C33", 1, 33, 70, 5, 6, kernel=1)
    yield awkward("C70", 1, 70, 33, 5, 6)
    yield awkward("identity", 2, 5, 5, 4, 6, dilations=[2, 0, 1])
    yield awkward("identity_alone", 2, 5, 5, 4, 6, dilations=[0], bias=False)
    yield awkward("far_apart", 2, 3, 3, 4, 6, dilations=[0, 2**30 - 1])
    yield awkward("many_branches", 2, 3, 4, 6, 7, dilations=[1, 2, 3] * 5)
    yield awkward("no_branches", 2, 3, 4, 3, 5, dilations=[])
    last = {"dilations": [1, 0], "kernel": 3}
    yield _channels_last(awkward("channels_last", 2, 16, 16, 5, 6, **last))
    sample = awkward("int32_choice", 2, 4, 3, 5, 6)
    x, weights, choice, *others = sample.args
    yield replace(sample, args=(x, weights, choice.int(), *others))
    for name, value in {"nowhere": -1, "one_branch": 1}.items():
        yield replace(sample, name=name, args=(x, weights, torch.full_like(choice, value), *others))
    for name, sizes in {
        "empty_N": (0, 4, 5, 6, 7),
        "empty_C": (2, 0, 5, 6, 7),
        "empty_O": (2, 4, 0, 6, 7),
        "empty_H": (2, 4, 5, 0, 7),
    }.items():
        yield _select(make, *sizes, bias=name != "empty_C", name=name, kind="empty")


def _select_native(x: Any, weights: Any, choice: Any, dilations: Any, bias: Any = None) -> tuple[Any, ...]:
    return x, weights, choice, bias, list(dilations)


def _select_backward(gradients: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    x, weights, choice, bias, dilations = inputs
    return *gradients, x, weights, choice, dilations, True, True, bias is not None, False


def _select_errors(make: Maker) -> Iterator[ErrorInput]:
    """Starting from x [2, 4, 6, 7], weights [2, 5, 4, 3, 3] and the dilations 1 and 2."""
    good = dict(zip(_ARGUMENTS, _select(make, 2, 4, 5, 6, 7).args, strict=True))
    wrong = wrong_maker("select_conv2d", good)
    yield from _wrong_tensors(good, wrong)
    value: Any
    for value in ([1], [1, 2, 3], [], [1, -1], [-(2**63), 1], [1, 0], [2**30, 1], [1, 2**31]):
        yield wrong(f"dilations_{value}", ValueError, "dilations", {"dilations": value})
    for value in (None, 1, "12", [1, 1.5], [None, 1], {}):
        yield wrong(f"dilations_{value!r}", TypeError, "dilations", {"dilations": value}, native=False)
    for number in (-2, 2, 2**31, 2**63 - 1, -(2**63)):
        choice = good["choice"].clone()
        choice[-1, -1, -1] = number
        yield wrong(f"choice_{number}", ValueError, "choice", {"choice": choice}, needs_values=True)


def _wrong_tensors(good: dict[str, Any], wrong: Wrong) -> Iterator[ErrorInput]:
    x, weights, choice, bias = (good[name] for name in ("x", "weights", "choice", "bias"))
    for name, (blamed, tensor) in {
        "x_rank": ("x", x[0]),
        "x_rank_5": ("x", x[None]),
        "x_N_1": ("choice", x[:1]),
        "x_of_3_channels": ("weights", x[:, 1:]),
        "x_narrow": ("choice", x[..., 1:]),
        "weights_rank": ("weights", weights[0]),
        "weights_rank_6": ("weights", weights[None]),
        "weights_of_3_channels": ("weights", weights[:, :, 1:]),
        "weights_even": ("weights", weights[..., 1:, 1:]),
        "weights_not_square": ("weights", weights[..., 1:]),
        "weights_without_taps": ("weights", weights[..., :0, :0]),
        "choice_rank": ("choice", choice[0]),
        "choice_rank_4": ("choice", choice[:, None]),
        "choice_N_1": ("choice", choice[:1]),
        "choice_short": ("choice", choice[:, 1:]),
        "choice_transposed": ("choice", choice.mT),
    }.items():
        yield wrong(name, ValueError, blamed, {name.split("_")[0]: tensor})
    for name, (blamed, changes) in {
        "weights_of_one_branch": ("bias", {"weights": weights[:1]}),
        "weights_of_4_outputs": ("bias", {"weights": weights[:, 1:]}),
        "bias_rank": ("bias", {"bias": bias[0]}),
        "bias_short": ("bias", {"bias": bias[:, 1:]}),
        "bias_of_one_branch": ("bias", {"bias": bias[:1]}),
    }.items():
        yield wrong(name, ValueError, blamed, changes, backward=False)
    wide = {"x": x[..., :1].expand(2, 4, 6, 2**31), "choice": choice[..., :1].expand(2, 6, 2**31)}
    yield wrong("too_wide", ValueError, "x", wide, needs_values=True)
    for name in ("x", "weights", "choice", "bias"):
        blamed = "weights" if name == "x" else name
        on_meta = {name: good[name].to("meta")}
        yield wrong(f"{name}_on_meta", ValueError, blamed, on_meta)
        yield from wrong_kinds(name, wrong, optional=name == "bias")
    yield from wrong_dtypes("x", x, (torch.int64, torch.bool, torch.complex64), wrong)
    yield wrong("x_float64", TypeError, "weights", {"x": x.double()})
    yield from wrong_dtypes("weights", weights, (torch.int64, torch.float64, torch.bfloat16), wrong)
    yield from wrong_dtypes("choice", choice, (torch.int16, torch.uint8, torch.bool, torch.float32), wrong)
    for dtype in (torch.int64, torch.float64, torch.float16):
        changes = {"bias": bias.to(dtype)}
        yield wrong(f"bias_{dtype}".replace("torch.", ""), TypeError, "bias", changes, backward=False)


_SETTINGS = {"P": 2, "k": 2, "identity": 0, "bias": 1, "last": 0}

_SELECT = OpInfo(
    name="select_conv2d",
    build=_build_select,
    size_ranges={
        "N": range(4),
        "C": range(20),
        "O": range(20),
        "H": range(8),
        "W": range(8),
        "P": range(4),
        "k": range(1, 4),  # kernel size 2 k - 1
        "identity": range(2),
        "bias": range(2),
        "last": range(2),
    },
    typical={**_SETTINGS, "N": 2, "C": 3, "O": 3, "H": 4, "W": 5, "P": 3, "identity": 1},
    smallest={**_SETTINGS, "N": 1, "C": 2, "O": 3, "H": 2, "W": 2},
    large=(
        {**_SETTINGS, "N": 2, "C": 16, "O": 24, "H": 40, "W": 50},
        {
            **_SETTINGS,
            "N": 1,
            "C": 33,
            "O": 33,
            "H": 40,
            "W": 50,
            "P": 3,
            "identity": 1,
            "bias": 0,
            "last": 1,
        },
    ),
    other_paths=({**_SETTINGS, "N": 2, "C": 8, "O": 16, "H": 5, "W": 4, "bias": 0, "last": 1},),
    draw_samples=_select_samples,
    draw_errors=_select_errors,
    native_args=_select_native,
    backward_args=_select_backward,
    differentiable=("x", "weights", "bias"),
    constant_gradients=("bias",),
    autocast=dict.fromkeys(("x", "weights", "bias"), "cast"),
    vmap_batched=_ARGUMENTS[:3] + _ARGUMENTS[4:],
    dynamic={"x": {0: "N", 2: "H", 3: "W"}, "choice": {0: "N", 1: "H", 2: "W"}},
    flops=(432, 864),  # 4 pixels, 2 to 3 channels, 9 taps: 2 * 4 * 2 * 3 * 9
    keeps_channels_last="x",
)

ENTRIES: tuple[OpInfo, ...] = (_SELECT,)
