"""Entries of the localfilter engine: attention to windows, and its two halves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from effops.testing._info import ErrorInput, Maker, OpInfo, SampleInput, Sizes
from effops.testing._localfilter_inputs import (
    ROUNDED_TOLERANCES,
    channels_last,
    too_wide,
    wrong_factors,
    wrong_maps,
)
from effops.testing._wrong import Wrong, saved_outputs, wrong_dtypes, wrong_maker, wrong_options

_SIDES = {"N": range(3), "C": range(7), "H": range(7), "W": range(20)}


def _maps(make: Maker, last: str, **shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Maps of the shapes, channels_last if ``last`` has their letter."""
    maps = {name: make.normal(*shape) for name, shape in shapes.items()}
    return tuple(channels_last(tensor) if name in last else tensor for name, tensor in maps.items())


def _wrong_windows(wrong: Wrong) -> Iterator[ErrorInput]:
    yield from wrong_factors("window", wrong)
    yield from wrong_factors("dilation", wrong)
    for name, changes in {
        "2_30": {"dilation": 2**30},
        "and_window": {"window": 2**16 + 1, "dilation": 2**15},
    }.items():
        yield wrong(f"dilation_{name}", ValueError, "dilation", changes)


# ------------------------------------------------------------------------------------ local_attention

_BORDERS = ("mask", "zero")


def _attention(
    make: Maker,
    batch: int,
    channels: int,
    values: int,
    height: int,
    width: int,
    window: int = 3,
    dilation: int = 1,
    scale: float | None = None,
    border: str = "mask",
    *,
    last: str = "",
    name: str = "built",
    **settings: Any,
) -> SampleInput:
    shape, sides = (batch, channels, height, width), (height, width)
    maps = _maps(make, last, q=shape, k=shape, v=(batch, values, *sides))
    return SampleInput(name, (*maps, window, dilation, scale, border), **settings)


def _build_attention(make: Maker, sizes: Sizes) -> SampleInput:
    return _attention(
        make,
        sizes["N"],
        sizes["C"],
        sizes["V"],
        sizes["H"],
        sizes["W"],
        sizes["k"],
        sizes["dilation"],
        border=_BORDERS[sizes["zero"]],
        last=("", "qkv", "q", "kv")[sizes["last"]],
    )


def _attention_samples(make: Maker) -> Iterator[SampleInput]:
    # N, H and W differ from each other and from all other sizes: see OpInfo.dynamic.
    yield _attention(make, 5, 4, 2, 6, 7, name="ordinary")
    yield _attention(make, 3, 4, 2, 8, 10, name="ordinary_larger")
    yield _attention(make, 2, 4, 2, 7, 6, name="ordinary_fewer")

    def awkward(name: str, *sizes: Any, **settings: Any) -> SampleInput:
        return _attention(make, *sizes, name=name, kind="awkward", **settings)

    yield awkward("even_window", 2, 3, 1, 4, 5, 4, 2, 0.5, "zero")
    yield awkward("one_tap", 2, 3, 2, 4, 5, 1, 1, None, "zero")
    yield awkward("beyond_the_image", 1, 2, 3, 3, 4, 9, 1, -2.0, "zero")
    yield awkward("wide", 1, 5, 3, 3, 45, 5, 1, None, "zero")
    yield awkward("C33", 1, 33, 35, 3, 18, 3, 3)
    yield awkward("channels_last", 2, 3, 5, 4, 6, last="qkv")
    yield awkward("channels_last_values", 1, 4, 33, 2, 20, 2, 1, 1.0, "zero", last="v")
    yield awkward("no_key_channels", 2, 0, 3, 4, 5)
    for name, sizes in {
        "empty_N": (0, 2, 3, 4, 5),
        "empty_V": (2, 2, 0, 4, 5),
        "empty_W": (2, 2, 3, 4, 0),
    }.items():
        yield _attention(make, *sizes, name=name, kind="empty")


def _attention_native(
    q: Any, k: Any, v: Any, window: Any, dilation: Any = 1, scale: Any = None, border: Any = "mask"
) -> tuple[Any, ...]:
    if scale is None:
        scale = max(q.shape[1], 1) ** -0.5 if isinstance(q, Tensor) and q.dim() == 4 else 1.0
    return q, k, v, window, dilation, scale, {"mask": 3, "zero": 0}.get(border, border)


def _attention_backward(gradients: Sequence[Tensor], inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    maps, settings = inputs[:3], inputs[3:]
    op = torch.ops.effops.local_attention.default
    saved = saved_outputs(op, inputs, (gradients[0], gradients[0]))
    return gradients[0], *maps, *saved, *settings, True, True, True


def _attention_errors(make: Maker) -> Iterator[ErrorInput]:
    """Starting from q and k [2, 4, 5, 6] and v [2, 3, 5, 6]."""
    names = ("q", "k", "v", "window", "dilation", "scale", "border")
    good = dict(zip(names, _attention(make, 2, 4, 3, 5, 6).args, strict=True))
    wrong = wrong_maker("local_attention", good)
    for name, blamed in {"q": "k", "k": "k", "v": "v"}.items():
        yield from wrong_maps(name, blamed, good[name], wrong)
    for name in ("q", "k"):
        yield wrong(f"{name}_of_3_channels", ValueError, "k", {name: good[name][:, 1:]})
    yield wrong("q_float64", TypeError, "k", {"q": good["q"].double()})
    for name in ("k", "v"):
        yield from wrong_dtypes(name, good[name], (torch.float64, torch.bfloat16), wrong)
    wide = dict(zip("qkv", too_wide(good["q"], good["k"], good["v"]), strict=True))
    yield wrong("too_wide", ValueError, "q", wide, needs_values=True)
    yield from _wrong_windows(wrong)
    yield from wrong_options("border", wrong)
    scale: Any
    for scale in ("1", [1.0], 1j, {}):
        yield wrong(f"scale_{scale!r}", TypeError, "scale", {"scale": scale}, native=False)


_WINDOW = {"k": 3, "dilation": 1, "last": 0}

_LOCAL_ATTENTION = OpInfo(
    name="local_attention",
    build=_build_attention,
    size_ranges={
        **_SIDES,
        "V": range(7),
        "k": range(1, 6),
        "dilation": range(1, 4),
        "zero": range(2),
        "last": range(4),
    },
    typical={**_WINDOW, "N": 2, "C": 3, "V": 2, "H": 4, "W": 5, "zero": 1},
    smallest={**_WINDOW, "N": 1, "C": 2, "V": 3, "H": 2, "W": 2, "zero": 0},
    large=(
        {**_WINDOW, "N": 1, "C": 8, "V": 6, "H": 50, "W": 60, "k": 5, "zero": 0},
        {**_WINDOW, "N": 5, "C": 5, "V": 8, "H": 24, "W": 20, "zero": 1, "last": 1},
    ),
    other_paths=({**_WINDOW, "N": 1, "C": 5, "V": 4, "H": 3, "W": 18, "zero": 0, "last": 1},),
    draw_samples=_attention_samples,
    draw_errors=_attention_errors,
    native_args=_attention_native,
    backward_args=_attention_backward,
    native_computed=lambda outputs: outputs[0],
    differentiable=("q", "k", "v"),
    linear_in=("v",),
    autocast=dict.fromkeys(("q", "k", "v"), "cast"),
    vmap_batched=("q", "k", "v"),
    dynamic={label: {0: "N", 2: "H", 3: "W"} for label in ("q", "k", "v")},
    # 4 pixels, 9 taps; C and V channels, 2 + 3, then 3 C + 2 V: 2 * 4 * 9 * 5 and 2 * 4 * 9 * 12
    flops=(360, 864),
    tolerances=ROUNDED_TOLERANCES,
    smallest_scale=0.1,
    keeps_channels_last="q",
    own_formats=("k", "v"),
)

# ------------------------------------------------------------------------------------ neighborhood_dot


def _dot(
    make: Maker,
    batch: int,
    channels: int,
    height: int,
    width: int,
    window: int = 3,
    dilation: int = 1,
    *,
    last: str = "",
    name: str = "built",
    **settings: Any,
) -> SampleInput:
    shape = (batch, channels, height, width)
    return SampleInput(name, (*_maps(make, last, q=shape, k=shape), window, dilation), **settings)


def _build_dot(make: Maker, sizes: Sizes) -> SampleInput:
    numbers = (sizes[name] for name in ("N", "C", "H", "W", "k", "dilation"))
    return _dot(make, *numbers, last=("", "qk", "q", "k")[sizes["last"]])


def _dot_samples(make: Maker) -> Iterator[SampleInput]:
    yield _dot(make, 5, 4, 6, 7, name="ordinary")
    yield _dot(make, 3, 4, 8, 10, name="ordinary_larger")
    yield _dot(make, 2, 4, 7, 6, name="ordinary_fewer")

    def awkward(name: str, *sizes: Any, **settings: Any) -> SampleInput:
        return _dot(make, *sizes, name=name, kind="awkward", **settings)

    yield awkward("even_window", 2, 1, 4, 5, 4, 2)
    yield awkward("beyond_the_image", 1, 3, 3, 4, 7)
    yield awkward("wide", 1, 5, 2, 45, 3)
    yield awkward("C33_one_tap", 1, 33, 3, 18, 1)
    yield awkward("channels_last", 2, 3, 4, 6, 3, 3, last="qk")
    yield awkward("channels_last_keys", 1, 33, 2, 20, 2, last="k")
    for name, sizes in {"empty_N": (0, 2, 4, 5), "empty_C": (2, 0, 4, 5), "empty_H": (2, 2, 0, 5)}.items():
        yield _dot(make, *sizes, name=name, kind="empty")


def _dot_errors(make: Maker) -> Iterator[ErrorInput]:
    """Starting from q and k [2, 4, 5, 6]."""
    good = dict(zip(("q", "k", "window", "dilation"), _dot(make, 2, 4, 5, 6).args, strict=True))
    wrong = wrong_maker("neighborhood_dot", good)
    for name in ("q", "k"):
        yield from wrong_maps(name, "k", good[name], wrong)
        yield wrong(f"{name}_of_3_channels", ValueError, "k", {name: good[name][:, 1:]})
    yield wrong("q_float64", TypeError, "k", {"q": good["q"].double()})
    yield from wrong_dtypes("k", good["k"], (torch.float64, torch.bfloat16), wrong)
    wide = dict(zip("qk", too_wide(good["q"], good["k"]), strict=True))
    yield wrong("too_wide", ValueError, "q", wide, needs_values=True)
    yield from _wrong_windows(wrong)


_NEIGHBORHOOD_DOT = OpInfo(
    name="neighborhood_dot",
    build=_build_dot,
    size_ranges={**_SIDES, "k": range(1, 6), "dilation": range(1, 4), "last": range(4)},
    typical={**_WINDOW, "N": 2, "C": 3, "H": 4, "W": 5},
    smallest={**_WINDOW, "N": 1, "C": 2, "H": 2, "W": 2},
    large=(
        {**_WINDOW, "N": 1, "C": 8, "H": 50, "W": 60, "k": 5},
        {**_WINDOW, "N": 5, "C": 5, "H": 24, "W": 30, "last": 1},
    ),
    other_paths=({**_WINDOW, "N": 1, "C": 5, "H": 3, "W": 18, "last": 1},),
    draw_samples=_dot_samples,
    draw_errors=_dot_errors,
    native_args=lambda q, k, window, dilation=1: (q, k, window, dilation),
    backward_args=lambda gradients, inputs: (gradients[0], *inputs, True, True),
    differentiable=("q", "k"),
    linear_in=("q", "k"),
    autocast=dict.fromkeys(("q", "k"), "cast"),
    vmap_batched=("q", "k"),
    dynamic={label: {0: "N", 2: "H", 3: "W"} for label in ("q", "k")},
    flops=(144, 288),  # 4 pixels, 9 taps, 2 channels: 2 * 4 * 9 * 2
    smallest_scale=0.1,
    keeps_channels_last="q",
    own_formats=("k",),
)

# ------------------------------------------------------------------------------------ neighborhood_mix


def _mix(
    make: Maker,
    batch: int,
    channels: int,
    height: int,
    width: int,
    window: int = 3,
    dilation: int = 1,
    *,
    last: str = "",
    name: str = "built",
    **settings: Any,
) -> SampleInput:
    weights = (batch, window * window, height, width)
    maps = _maps(make, last, w=weights, v=(batch, channels, height, width))
    return SampleInput(name, (*maps, dilation), **settings)


def _build_mix(make: Maker, sizes: Sizes) -> SampleInput:
    numbers = (sizes[name] for name in ("N", "C", "H", "W", "k", "dilation"))
    return _mix(make, *numbers, last=("", "wv", "w", "v")[sizes["last"]])


def _mix_samples(make: Maker) -> Iterator[SampleInput]:
    yield _mix(make, 5, 4, 6, 7, name="ordinary")
    yield _mix(make, 3, 4, 8, 10, name="ordinary_larger")
    yield _mix(make, 2, 4, 7, 6, name="ordinary_fewer")

    def awkward(name: str, *sizes: Any, **settings: Any) -> SampleInput:
        return _mix(make, *sizes, name=name, kind="awkward", **settings)

    yield awkward("even_window", 2, 1, 4, 5, 4, 2)
    yield awkward("beyond_the_image", 1, 3, 3, 4, 7)
    yield awkward("wide", 1, 3, 3, 45, 5)
    yield awkward("one_tap", 1, 33, 3, 18, 1)
    yield awkward("channels_last", 2, 5, 4, 6, 3, 3, last="wv")
    yield awkward("channels_last_values", 1, 33, 2, 20, 2, last="v")
    for name, sizes in {"empty_N": (0, 2, 4, 5), "empty_C": (2, 0, 4, 5), "empty_W": (2, 2, 4, 0)}.items():
        yield _mix(make, *sizes, name=name, kind="empty")


def _mix_errors(make: Maker) -> Iterator[ErrorInput]:
    """Starting from weights [2, 9, 5, 6] and v [2, 4, 5, 6]."""
    good = dict(zip(("weights", "v", "dilation"), _mix(make, 2, 4, 5, 6).args, strict=True))
    wrong = wrong_maker("neighborhood_mix", good)
    for name in ("weights", "v"):
        yield from wrong_maps(name, "v", good[name], wrong)
    for channels in (0, 2, 3, 5, 8):
        few = good["weights"][:, :channels]
        yield wrong(f"weights_of_{channels}_channels", ValueError, "weights", {"weights": few})
    yield wrong("weights_float64", TypeError, "v", {"weights": good["weights"].double()})
    yield from wrong_dtypes("v", good["v"], (torch.float64, torch.float16), wrong)
    wide = dict(zip(("weights", "v"), too_wide(good["weights"], good["v"]), strict=True))
    yield wrong("too_wide", ValueError, "v", wide, needs_values=True)
    yield from wrong_factors("dilation", wrong)
    yield wrong("dilation_2_30", ValueError, "dilation", {"dilation": 2**30})


_NEIGHBORHOOD_MIX = OpInfo(
    name="neighborhood_mix",
    build=_build_mix,
    size_ranges={**_SIDES, "k": range(1, 6), "dilation": range(1, 4), "last": range(4)},
    typical={**_WINDOW, "N": 2, "C": 3, "H": 4, "W": 5},
    smallest={**_WINDOW, "N": 1, "C": 2, "H": 2, "W": 2},
    large=(
        {**_WINDOW, "N": 1, "C": 3, "H": 80, "W": 90, "k": 5},
        {**_WINDOW, "N": 5, "C": 8, "H": 24, "W": 30, "last": 1},
    ),
    other_paths=({**_WINDOW, "N": 1, "C": 5, "H": 3, "W": 18, "last": 1},),
    draw_samples=_mix_samples,
    draw_errors=_mix_errors,
    native_args=lambda weights, v, dilation=1: (weights, v, dilation),
    backward_args=lambda gradients, inputs: (gradients[0], *inputs, True, True),
    differentiable=("weights", "v"),
    linear_in=("weights", "v"),
    autocast=dict.fromkeys(("weights", "v"), "cast"),
    vmap_batched=("weights", "v"),
    dynamic={label: {0: "N", 2: "H", 3: "W"} for label in ("weights", "v")},
    flops=(144, 288),  # 4 pixels, 9 taps, 2 channels: 2 * 4 * 9 * 2
    smallest_scale=0.1,
    keeps_channels_last="v",
    own_formats=("weights",),
)

ENTRIES: tuple[OpInfo, ...] = (_LOCAL_ATTENTION, _NEIGHBORHOOD_DOT, _NEIGHBORHOOD_MIX)
