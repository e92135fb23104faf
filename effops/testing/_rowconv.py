"""Entry of the rowconv engine: convolution of an SPS."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from effops.testing._info import ErrorInput, Maker, OpInfo, SampleInput, Sizes
from effops.testing._rowconv_inputs import (
    FIELDS,
    SPS_RANGES,
    fields_of,
    make_sps,
    wrong_cells,
    wrong_fields,
    wrong_ids,
)
from effops.testing._rowconv_sps import AWKWARD, DYNAMIC, EMPTY, ORDINARY
from effops.testing._wrong import Wrong, wrong_maker

_KERNELS, _DILATIONS = (3, 1, 5), (1, 2, 3)  # of up to three branches
_LARGE = {"R": 2, "H": 40, "W": 50, "NA": 2000, "NP": 900}
_SMALL = {"R": 1, "H": 4, "W": 5, "NA": 7, "NP": 3}


def _conv(
    make: Maker,
    sizes: Sizes,
    features: int = 4,
    outputs: int = 5,
    *,
    groups: int = 1,
    kernels: int | Sequence[int] = 3,
    dilation: int | Sequence[int] = 1,
    bias: bool = True,
    activation: str | None = None,
    wide: bool = False,
    name: str = "built",
    **settings: Any,
) -> SampleInput:
    """Lists of kernel sizes and dilations make the list form."""

    sps = make_sps(make, sizes, features, wide)
    sides = [kernels] if isinstance(kernels, int) else kernels
    weights: Any = [make.normal(outputs, features // groups, side, side) for side in sides]
    biases: Any = [make.normal(outputs) for _ in sides]
    if isinstance(kernels, int):
        (weights,), (biases,) = weights, biases
    inputs = (*fields_of(sps), weights, biases if bias else None, dilation, activation, groups)
    return SampleInput(name, inputs, smooth=activation is None, **settings)


def _build_conv(make: Maker, sizes: Sizes) -> SampleInput:
    """With D = 1 the form without lists."""
    branches, groups = sizes["D"], sizes["G"]
    return _conv(
        make,
        sizes,
        sizes["C"] * groups,
        sizes["O"] * groups,
        groups=groups,
        kernels=_KERNELS[:branches] if branches > 1 else 3,
        dilation=_DILATIONS[:branches] if branches > 1 else 2,
        bias=bool(sizes["bias"]),
        activation="relu" if sizes["relu"] else None,
    )


def _conv_samples(make: Maker) -> Iterator[SampleInput]:
    for name, sizes in ORDINARY.items():
        yield _conv(make, sizes, name=name)

    def awkward(name: str, sizes: Sizes, *arguments: Any, **settings: Any) -> SampleInput:
        return _conv(make, sizes, *arguments, name=name, kind="awkward", **settings)

    some = {"R": 2, "H": 5, "W": 6, "NA": 19, "NP": 8}
    for name, sizes in AWKWARD.items():
        yield awkward(name, sizes, 3, 2, dilation=2)
    yield awkward("C1", some, 1, 1, kernels=5)
    yield awkward("C7", some, 7, 7, bias=False, dilation=3, wide=True)
    yield awkward("C33", some, 33, 70, kernels=1)
    yield awkward("C70", some, 70, 33)
    yield awkward("groups", some, 6, 9, groups=3, dilation=2)
    yield awkward("depthwise", some, 33, 33, groups=33)
    yield awkward("relu", some, 7, 9, activation="relu")
    branches: dict[str, Any] = {"kernels": (3, 1, 5), "dilation": (1, 3, 2)}
    yield awkward("branches", some, 5, 3, **branches)
    yield awkward("branches_relu", some, 8, 17, activation="relu", **branches)
    yield awkward("branches_relu_without_bias", some, 8, 3, bias=False, activation="relu", **branches)
    yield awkward("one_branch_in_a_list", some, kernels=[3], dilation=[2])
    yield awkward("far_apart", some, dilation=2**30 - 1, kernels=3)
    for name, sizes in EMPTY.items():
        yield _conv(make, sizes, name=name, kind="empty")
    yield _conv(make, some, 0, 5, bias=False, name="empty_F", kind="empty")
    yield _conv(make, some, 4, 0, activation="relu", name="empty_O", kind="empty")


def _conv_native(*inputs: Any, **keywords: Any) -> tuple[Any, ...]:
    *fields, weight, bias, dilation, activation, groups = inputs
    activation = {None: 0, "relu": 1}[activation]
    if isinstance(weight, (list, tuple)):
        biases = [] if bias is None else list(bias)
        return *fields, list(weight), biases, list(dilation), activation, groups
    return *fields, [weight], [] if bias is None else [bias], [dilation], activation, groups


def _conv_backward(gradients: Sequence[Tensor], inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    *fields, weight, bias, dilation, activation, groups = inputs
    rows, outputs = len(gradients[0]), len(weight[0]) if len(weight) > 0 else 0
    shape = (len(weight) if activation else 0, rows, (outputs + 7) // 8)
    signs = torch.full(shape, 0xA5, dtype=torch.uint8, device=gradients[0].device)
    needs = (True, True, True, len(bias) > 0, False)
    return gradients[0], signs, *fields, weight, dilation, activation, groups, *needs


def _conv_errors(make: Maker) -> Iterator[ErrorInput]:
    """Starting from NA = 11, F = 4, O = 6, groups = 2 and two branches."""
    sps = make_sps(make, ORDINARY["ordinary"], 4)
    good = {
        **dict(zip(FIELDS, fields_of(sps), strict=True)),
        "weight": [make.normal(6, 2, 3, 3), make.normal(6, 2, 1, 1)],
        "bias": [make.normal(6), make.normal(6)],
        "dilation": [1, 2],
        "activation": "relu",
        "groups": 2,
    }
    wrong = wrong_maker("sps_conv2d", good)
    for name, error, blamed, fields in wrong_fields(sps):
        yield wrong(name, error, blamed, fields)
    for changes in (wrong_ids(sps), wrong_cells(sps)):
        for name, error, blamed, fields in changes:
            if name != "no_rows":  # without active rows nothing is read
                yield wrong(name, error, blamed, fields, needs_values=True)
    yield from _wrong_weights(good, wrong)
    yield from _wrong_biases(good, wrong)
    yield from _wrong_settings(wrong)


def _wrong_weights(good: dict[str, Any], wrong: Wrong) -> Iterator[ErrorInput]:
    first, second = good["weight"]
    weight: Any
    for name, weight in {
        "rank_3": [first[0], second],
        "second_rank_5": [first, second[None]],
        "of_other_features": [first[:, :1], second],
        "second_of_other_features": [first, second[:, :1]],
        "second_of_other_outputs": [first, second[:4]],
        "even": [first[:, :, 1:, 1:], second],
        "without_taps": [first, second[:, :, :0, :0]],
        "not_square": [first[..., :1], second],
        "second_on_meta": [first, second.to("meta")],
        "empty": [],
        "three": [first, second, second],
    }.items():
        blamed = "one bias per weight" if name == "three" else "weight"
        yield wrong(f"weight_{name}", ValueError, blamed, {"weight": weight}, backward=name != "three")
    for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.complex64):
        name = str(dtype).removeprefix("torch.")
        yield wrong(f"weight_{name}", TypeError, "weight", {"weight": [first.to(dtype), second]})
        yield wrong(f"weight_second_{name}", TypeError, "weight", {"weight": [first, second.to(dtype)]})
    for name, weight in {"none": None, "a_number": 3, "a_string": "w", "with_none": [first, None]}.items():
        yield wrong(f"weight_{name}", TypeError, "weight", {"weight": weight}, native=False)
    single = {"weight": first, "bias": None, "dilation": 1}
    yield wrong("a_list_of_biases", TypeError, "bias", {**single, "bias": good["bias"]}, native=False)
    yield wrong("a_list_of_dilations", TypeError, "dilation", {**single, "dilation": [1]}, native=False)


def _wrong_biases(good: dict[str, Any], wrong: Wrong) -> Iterator[ErrorInput]:
    first, second = good["bias"]
    for name, bias in {
        "rank_2": [first[None], second],
        "rank_0": [first, second[0]],
        "short": [first, second[1:]],
        "none": [first[:0], second],
        "on_meta": [first.to("meta"), second],
        "one": [first],
        "three": [first, second, second],
    }.items():
        yield wrong(f"bias_{name}", ValueError, "bias", {"bias": bias}, backward=False)
    for dtype in (torch.float64, torch.float16, torch.int64):
        name = str(dtype).removeprefix("torch.")
        yield wrong(f"bias_{name}", TypeError, "bias", {"bias": [first, second.to(dtype)]}, backward=False)
    for name, value in {"a_tensor": first, "a_number": 1.0, "with_none": [first, None]}.items():
        yield wrong(f"bias_{name}", TypeError, "bias", {"bias": value}, native=False)


def _wrong_settings(wrong: Wrong) -> Iterator[ErrorInput]:
    dilation: Any
    activation: Any
    groups: Any
    for dilation in ([1, 0], [-1, 1], [1], [1, 2, 3], [], [2**30, 1], [1, 2**31], [2**63 - 1, 1]):
        yield wrong(f"dilation_{dilation}", ValueError, "dilation", {"dilation": dilation})
    for dilation in (1, None, "1", [1, 1.5], [1, None]):
        yield wrong(f"dilation_{dilation!r}", TypeError, "dilation", {"dilation": dilation}, native=False)
    for activation in ("gelu", "ReLU", "", 2, 0.5, []):
        changes = {"activation": activation}
        yield wrong(f"activation_{activation!r}", ValueError, "activation", changes, native=False)
    for groups in (0, -1, 3, 4, 2**31, -(2**63)):
        yield wrong(f"groups_{groups}", ValueError, "groups", {"groups": groups})
    yield wrong("groups_1", ValueError, "weight", {"groups": 1})
    for groups in (None, 1.5, "2"):
        yield wrong(f"groups_{groups!r}", TypeError, "groups", {"groups": groups}, native=False)


_CONV = OpInfo(
    name="sps_conv2d",
    build=_build_conv,
    size_ranges={
        **SPS_RANGES,
        "C": range(20),
        "O": range(20),
        "G": range(1, 4),
        "D": range(1, 4),
        "bias": range(2),
        "relu": range(2),
    },
    typical={"R": 2, "H": 3, "W": 4, "NA": 6, "NP": 5, "C": 3, "O": 5, "G": 1, "D": 2, "bias": 1, "relu": 1},
    smallest={"R": 1, "H": 2, "W": 2, "NA": 2, "NP": 1, "C": 2, "O": 3, "G": 1, "D": 1, "bias": 1, "relu": 0},
    large=(
        {**_LARGE, "C": 16, "O": 24, "G": 1, "D": 2, "bias": 1, "relu": 1},
        {**_LARGE, "C": 1, "O": 1, "G": 32, "D": 1, "bias": 0, "relu": 0},
    ),
    other_paths=(
        {**_SMALL, "C": 1, "O": 1, "G": 9, "D": 1, "bias": 1, "relu": 0},
        {**_SMALL, "C": 16, "O": 16, "G": 1, "D": 1, "bias": 0, "relu": 0},
    ),
    draw_samples=_conv_samples,
    draw_errors=_conv_errors,
    native_args=_conv_native,
    backward_args=_conv_backward,
    native_computed=lambda outputs: outputs[0],
    differentiable=("active", "passive", "weight", "bias"),
    constant_gradients=("bias",),
    autocast={"active": "cast", "passive": "cast", "weight": "cast", "bias": "cast"},
    vmap_batched=(*FIELDS, "weight", "bias"),
    dynamic=DYNAMIC,
    flops=(216, 432),  # 2 rows, 2 to 3 channels, 9 taps: 2 * 2 * 2 * 3 * 9
)

ENTRIES: tuple[OpInfo, ...] = (_CONV,)
