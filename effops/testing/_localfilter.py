"""Entries of the localfilter engine: per-pixel filters, and the flow that they stand for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from effops.testing._info import ErrorInput, Maker, OpInfo, SampleInput, Sizes, Tolerance
from effops.testing._localfilter_inputs import (
    ROUNDED_TOLERANCES,
    channels_last,
    too_wide,
    window_weights,
    wrong_factors,
    wrong_maps,
    wrong_ranks,
)
from effops.testing._wrong import Wrong, saved_outputs, wrong_dtypes, wrong_kinds, wrong_maker, wrong_options

_NORMALIZE = ("softmax", "none", "sum")  # by the schema's numbers
_PADDING = ("zeros", "replicate", "reflect", "renormalize")

# ------------------------------------------------------------------------------------ filter_flow


def _filtered(
    make: Maker,
    batch: int,
    channels: int,
    height: int,
    width: int,
    kernel: int = 3,
    normalize: str = "softmax",
    padding: str = "zeros",
    *,
    flow: bool = False,
    stride: int = 1,
    upsample: int = 1,
    dilation: int = 1,
    groups: int = 1,
    last: str = "",
    mixed: bool = False,
    name: str = "built",
    **settings: Any,
) -> SampleInput:
    """``last`` names what is channels_last; mixed filters have another dtype than the image, if they may."""
    image = make.normal(batch, channels, height, width)
    sides = (-(-height * upsample // stride), -(-width * upsample // stride))
    positive = normalize == "sum" or (normalize, padding) == ("none", "renormalize")
    filters = window_weights(make, batch, groups * kernel * kernel, *sides, positive)
    if mixed and make.dtype != torch.float64:
        filters = filters.to(torch.bfloat16 if make.dtype == torch.float32 else torch.float32)
    return SampleInput(
        name,
        (
            channels_last(image) if "image" in last else image,
            channels_last(filters) if "filters" in last else filters,
            normalize,
            padding,
            flow,
        ),
        {"stride": stride, "upsample": upsample, "dilation": dilation, "groups": groups},
        **settings,
    )


def _build_filtered(make: Maker, sizes: Sizes) -> SampleInput:
    return _filtered(
        make,
        sizes["N"],
        sizes["C"] * sizes["G"],
        sizes["H"],
        sizes["W"],
        sizes["k"],
        _NORMALIZE[sizes["normalize"]],
        _PADDING[sizes["padding"]],
        flow=bool(sizes["flow"]),
        stride=(1, 2, 1)[sizes["factor"]],
        upsample=(1, 1, 2)[sizes["factor"]],
        dilation=sizes["dilation"],
        groups=sizes["G"],
        last=("", "image", "filters", "image, filters")[sizes["last"]],
        mixed=bool(sizes["mixed"]),
    )


def _filtered_samples(make: Maker) -> Iterator[SampleInput]:
    # N, H and W differ from each other and from all other sizes: see OpInfo.dynamic.
    yield _filtered(make, 5, 4, 6, 7, flow=True, name="ordinary")
    yield _filtered(make, 3, 4, 8, 10, flow=True, name="ordinary_larger")
    yield _filtered(make, 2, 4, 7, 5, flow=True, name="ordinary_fewer")

    def awkward(name: str, *sizes: Any, **settings: Any) -> SampleInput:
        return _filtered(make, *sizes, name=name, kind="awkward", **settings)

    yield awkward("even_window", 2, 1, 5, 6, 2, "none", "replicate")
    yield awkward("reflected_often", 2, 3, 2, 4, 7, "sum", "reflect", flow=True)
    yield awkward("renormalized", 2, 3, 5, 4, 4, "softmax", "renormalize", flow=True, dilation=2)
    yield awkward("renormalized_as_given", 1, 2, 4, 19, 3, "none", "renormalize", flow=True)
    yield awkward("one_tap", 2, 5, 4, 5, 1, "softmax", "zeros", flow=True)
    yield awkward("wide", 1, 3, 3, 45, 5, "softmax", "zeros")
    yield awkward("wide_sum", 1, 3, 2, 50, 3, "sum", "renormalize", flow=True, dilation=3)
    yield awkward("groups", 2, 6, 5, 4, 3, "none", "zeros", groups=3, dilation=2, flow=True)
    yield awkward("stride", 2, 3, 7, 20, 3, "softmax", "replicate", stride=2, flow=True)
    yield awkward("stride_beyond_the_window", 1, 2, 9, 10, 2, "sum", "zeros", stride=3)
    yield awkward("upsample", 1, 4, 5, 9, 3, "none", "reflect", upsample=2, groups=2, flow=True)
    yield awkward("upsample_renormalized", 2, 2, 3, 4, 3, "softmax", "renormalize", upsample=3, mixed=True)
    both = "image, filters"
    yield awkward("channels_last", 2, 5, 4, 6, 3, "softmax", "reflect", flow=True, last=both)
    yield awkward("channels_last_C33", 1, 33, 3, 18, 2, "sum", "replicate", last=both, mixed=True)
    yield awkward("channels_last_image", 1, 3, 3, 40, 3, "none", "zeros", flow=True, last="image")
    yield awkward("channels_last_filters", 2, 3, 4, 5, 3, "softmax", "zeros", last="filters", groups=3)
    for name, sizes in {"empty_N": (0, 3, 4, 5), "empty_C": (2, 0, 4, 5), "empty_H": (2, 3, 0, 5)}.items():
        yield _filtered(make, *sizes, groups=3, name=name, kind="empty")


def _filtered_native(
    image: Any,
    filters: Any,
    normalize: Any = "softmax",
    padding_mode: Any = "zeros",
    return_flow: Any = False,
    *,
    stride: Any = 1,
    upsample: Any = 1,
    dilation: Any = 1,
    groups: Any = 1,
) -> tuple[Any, ...]:
    numbers = (_NORMALIZE.index(normalize), _PADDING.index(padding_mode))
    return image, filters, *numbers, stride, upsample, dilation, groups, return_flow


def _filtered_backward(gradients: Sequence[Tensor], inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    image, filters, *settings, return_flow = inputs
    grad_output, grad_flow = (*gradients, None)[:2]
    op = torch.ops.effops.filter_flow.default
    output, flow, normalizer = saved_outputs(op, inputs, (grad_output, grad_flow, grad_output))
    if not return_flow:
        grad_flow = flow = None
    return grad_output, grad_flow, image, filters, output, flow, normalizer, *settings, True, True


def _filtered_errors(make: Maker) -> Iterator[ErrorInput]:
    """Starting from image [2, 4, 6, 7] and filters [2, 18, 6, 7] in two groups."""
    sample = _filtered(make, 2, 4, 6, 7, groups=2, flow=True)
    names = ("image", "filters", "normalize", "padding_mode", "return_flow")
    good = {**dict(zip(names, sample.args, strict=True)), **sample.kwargs}
    wrong = wrong_maker("filter_flow", good, keywords=tuple(sample.kwargs))
    image, filters = good["image"], good["filters"]
    yield from wrong_maps("image", "filters", image, wrong)
    yield from wrong_maps("filters", "filters", filters, wrong)
    yield wrong("image_of_3_channels", ValueError, "groups", {"image": image[:, 1:]})
    for channels in (0, 1, 9, 10, 17):
        few = filters[:, :channels]
        yield wrong(f"filters_of_{channels}_channels", ValueError, "filters", {"filters": few})
    for dtype in (torch.float64, torch.float8_e4m3fn):
        yield from wrong_dtypes("filters", filters, (dtype,), wrong)
    yield wrong("image_float64", TypeError, "filters", {"image": image.double()})
    halves = {"image": image.half(), "filters": filters.bfloat16()}
    yield wrong("two_halves", TypeError, "filters", halves)
    yield wrong("half_beside_double", TypeError, "filters", {**halves, "filters": filters.double()})
    wide = dict(zip(("image", "filters"), too_wide(image, filters), strict=True))
    yield wrong("too_wide", ValueError, "image", wide, needs_values=True)
    yield from _wrong_filter_settings(wrong)


def _wrong_filter_settings(wrong: Wrong) -> Iterator[ErrorInput]:
    for argument in ("stride", "upsample", "dilation"):
        yield from wrong_factors(argument, wrong)
    for argument in ("stride", "upsample"):
        yield wrong(f"{argument}_2", ValueError, "filters", {argument: 2})
        yield wrong(f"{argument}_most", ValueError, "filters", {argument: 2**31 - 1})
    yield wrong("both_factors", ValueError, "stride or upsample", {"stride": 2, "upsample": 2})
    yield wrong("dilation_2_30", ValueError, "dilation", {"dilation": 2**30})
    groups: Any
    for groups in (0, -1, 3, 2**31, 2**63 - 1, -(2**63)):
        yield wrong(f"groups_{groups}", ValueError, "groups", {"groups": groups})
    for groups in (1, 4):
        yield wrong(f"groups_{groups}", ValueError, "filters", {"groups": groups})
    for groups in (None, 1.5, "2", [2]):
        yield wrong(f"groups_{groups!r}", TypeError, "groups", {"groups": groups}, native=False)
    yield from wrong_options("normalize", wrong)
    yield from wrong_options("padding_mode", wrong)
    value: Any
    for value in ("yes", [1], {}):
        yield wrong(f"return_flow_{value!r}", TypeError, "return_flow", {"return_flow": value}, native=False)


_SETTINGS = {
    "G": 1,
    "k": 3,
    "normalize": 0,
    "padding": 0,
    "factor": 0,
    "dilation": 1,
    "flow": 0,
    "last": 0,
    "mixed": 0,
}

_FILTER_FLOW = OpInfo(
    name="filter_flow",
    build=_build_filtered,
    size_ranges={
        "N": range(3),
        "C": range(5),
        "H": range(7),
        "W": range(20),
        "G": range(1, 4),
        "k": range(1, 5),
        "normalize": range(3),
        "padding": range(4),
        "factor": range(3),
        "dilation": range(1, 4),
        "flow": range(2),
        "last": range(4),
        "mixed": range(2),
    },
    typical={**_SETTINGS, "N": 2, "C": 2, "H": 4, "W": 5, "G": 2, "flow": 1},
    smallest={**_SETTINGS, "N": 1, "C": 2, "H": 2, "W": 2},
    large=(
        {**_SETTINGS, "N": 1, "C": 3, "H": 80, "W": 90, "k": 5, "flow": 1},
        {**_SETTINGS, "N": 5, "C": 4, "H": 24, "W": 30, "G": 2, "padding": 1, "flow": 1, "last": 3},
    ),
    other_paths=(
        {**_SETTINGS, "N": 1, "C": 3, "H": 3, "W": 18, "normalize": 1, "padding": 2},
        {**_SETTINGS, "N": 2, "C": 5, "H": 3, "W": 4, "normalize": 2, "padding": 3, "last": 3, "flow": 1},
    ),
    draw_samples=_filtered_samples,
    draw_errors=_filtered_errors,
    native_args=_filtered_native,
    backward_args=_filtered_backward,
    native_computed=lambda outputs: outputs[:1] if outputs[1].dim() == 1 else outputs[:2],
    differentiable=("image", "filters"),
    linear_in=("image",),
    linear_outputs=1,
    float32_beside_half=("filters",),
    float32_results=True,
    tolerances=ROUNDED_TOLERANCES,
    tolerance_beside_half=Tolerance(5e-5, 5e-2),
    autocast={"image": "cast", "filters": "float32"},
    vmap_batched=("image", "filters"),
    dynamic={label: {0: "N", 2: "H", 3: "W"} for label in ("image", "filters")},
    flops=(144, 288),  # 4 pixels, 9 taps, 2 channels: 2 * 4 * 9 * 2
    smallest_scale=0.1,
    keeps_channels_last="image",
    own_formats=("filters",),
)

# ------------------------------------------------------------------------------------ expected_flow


def _flow(
    make: Maker,
    batch: int,
    height: int,
    width: int,
    kernel: int = 3,
    normalize: str = "softmax",
    *,
    dilation: int = 1,
    groups: int = 1,
    last: bool = False,
    name: str = "built",
    **settings: Any,
) -> SampleInput:
    channels = groups * kernel * kernel
    filters = window_weights(make, batch, channels, height, width, normalize == "sum")
    args = (channels_last(filters) if last else filters, normalize)
    return SampleInput(name, args, {"dilation": dilation, "groups": groups}, **settings)


def _build_flow(make: Maker, sizes: Sizes) -> SampleInput:
    return _flow(
        make,
        sizes["N"],
        sizes["H"],
        sizes["W"],
        sizes["k"],
        _NORMALIZE[sizes["normalize"]],
        dilation=sizes["dilation"],
        groups=sizes["G"],
        last=bool(sizes["last"]),
    )


def _flow_samples(make: Maker) -> Iterator[SampleInput]:
    yield _flow(make, 5, 6, 7, name="ordinary")
    yield _flow(make, 3, 8, 10, name="ordinary_larger")
    yield _flow(make, 4, 7, 6, name="ordinary_fewer")

    def awkward(name: str, *sizes: Any, **settings: Any) -> SampleInput:
        return _flow(make, *sizes, name=name, kind="awkward", **settings)

    yield awkward("even_window", 2, 3, 4, 2, "sum", groups=2)
    yield awkward("as_given", 2, 3, 4, 4, "none", dilation=3)
    yield awkward("one_tap", 2, 3, 4, 1, groups=3)
    yield awkward("wide", 1, 2, 45, 5, "softmax", dilation=2)
    yield awkward("channels_last", 2, 3, 5, 3, "softmax", groups=2, last=True)
    yield awkward("channels_last_as_given", 1, 2, 33, 3, "none", last=True)
    for name, sizes in {"empty_N": (0, 4, 5), "empty_H": (2, 0, 5), "empty_W": (2, 4, 0)}.items():
        yield _flow(make, *sizes, name=name, kind="empty")


def _flow_native(
    filters: Any, normalize: Any = "softmax", *, dilation: Any = 1, groups: Any = 1
) -> tuple[Any, ...]:
    return filters, _NORMALIZE.index(normalize), dilation, groups


def _flow_backward(gradients: Sequence[Tensor], inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    filters, *settings = inputs
    op = torch.ops.effops.expected_flow.default
    saved = saved_outputs(op, inputs, (gradients[0], gradients[0]))
    return gradients[0], filters, *saved, *settings


def _flow_errors(make: Maker) -> Iterator[ErrorInput]:
    """Starting from filters [2, 18, 4, 5] in two groups."""
    sample = _flow(make, 2, 4, 5, groups=2)
    filters = sample.args[0]
    good = {"filters": filters, "normalize": "softmax", **sample.kwargs}
    wrong = wrong_maker("expected_flow", good, keywords=tuple(sample.kwargs))
    yield from wrong_ranks("filters", filters, wrong)
    yield from wrong_kinds("filters", wrong)
    yield from wrong_dtypes("filters", filters, (torch.int64, torch.bool, torch.complex64), wrong)
    yield from wrong_dtypes("filters", filters, (torch.uint8, torch.int32, torch.float8_e4m3fn), wrong)
    for channels in (0, 1, 2 * 4 - 1, 9, 17):
        few = filters[:, :channels]
        yield wrong(f"filters_of_{channels}_channels", ValueError, "filters", {"filters": few})
    (wide,) = too_wide(filters)
    yield wrong("too_wide", ValueError, "filters", {"filters": wide}, needs_values=True)
    yield from wrong_factors("dilation", wrong)
    yield wrong("dilation_2_30", ValueError, "dilation", {"dilation": 2**30})
    groups: Any
    for groups in (0, -1, -(2**63)):
        yield wrong(f"groups_{groups}", ValueError, "groups", {"groups": groups})
    for groups in (1, 3, 4, 2**31, 2**63 - 1):
        yield wrong(f"groups_{groups}", ValueError, "filters", {"groups": groups})
    for groups in (None, 1.5, "2", [2]):
        yield wrong(f"groups_{groups!r}", TypeError, "groups", {"groups": groups}, native=False)
    yield from wrong_options("normalize", wrong)


_FLOW_SETTINGS = {"G": 1, "k": 3, "normalize": 0, "dilation": 1, "last": 0}

_EXPECTED_FLOW = OpInfo(
    name="expected_flow",
    build=_build_flow,
    size_ranges={
        "N": range(3),
        "H": range(7),
        "W": range(20),
        "G": range(1, 4),
        "k": range(1, 6),
        "normalize": range(3),
        "dilation": range(1, 4),
        "last": range(2),
    },
    typical={**_FLOW_SETTINGS, "N": 2, "H": 4, "W": 5, "G": 2},
    smallest={**_FLOW_SETTINGS, "N": 1, "H": 2, "W": 2},
    large=(
        {**_FLOW_SETTINGS, "N": 1, "H": 90, "W": 100, "k": 5},
        {**_FLOW_SETTINGS, "N": 5, "H": 24, "W": 40, "G": 2, "normalize": 2, "last": 1},
    ),
    other_paths=({**_FLOW_SETTINGS, "N": 1, "H": 2, "W": 18, "normalize": 1, "last": 1},),
    draw_samples=_flow_samples,
    draw_errors=_flow_errors,
    native_args=_flow_native,
    backward_args=_flow_backward,
    native_computed=lambda outputs: outputs[0],
    differentiable=("filters",),
    float32_results=True,
    tolerance_beside_half=Tolerance(5e-5, 5e-5),
    autocast={"filters": "float32"},
    vmap_batched=("filters",),
    dynamic={"filters": {0: "N", 2: "H", 3: "W"}},
    flops=(144, 216),  # 4 pixels, 9 taps, dx and dy: 2 * 4 * 9 * 2
    smallest_scale=0.1,
    keeps_channels_last="filters",
)

ENTRIES: tuple[OpInfo, ...] = (_FILTER_FLOW, _EXPECTED_FLOW)
