"""Entries of the ops of the sampling engine that read pyramids, lists of maps [B, C, H_l, W_l]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from effops.testing._info import ErrorInput, Maker, OpInfo, SampleInput, Sizes

Shapes = Sequence[tuple[int, int]]

_TWO_LEVELS: Shapes = ((6, 7), (2, 5))


def _level_shapes(sizes: Sizes) -> Shapes:
    side = sizes["side"]
    return [(max(side - level, 0), max(side + 1 - level, 0)) for level in range(sizes["L"])]


def _maps(make: Maker, shapes: Shapes, batch: int, channels: int) -> list[Tensor]:
    return [make.normal(batch, channels, height, width) for height, width in shapes]


def _with(names: Sequence[str], sample: SampleInput, name: str, **changes: Any) -> SampleInput:
    """The sample with other arguments."""
    arguments = dict(zip(names, sample.args, strict=True)) | changes
    return SampleInput(name, tuple(arguments.values()), sample.kwargs, "awkward", sample.smooth)


def _wrong_pyramids(maps: list[Tensor]) -> Iterator[tuple[str, type[Exception], Any]]:
    """Pyramids that every op refuses, starting from two good maps."""
    first, second = maps
    yield "empty", ValueError, []
    yield "rank_3", ValueError, [first, second[0]]
    yield "rank_5", ValueError, [first, second[None]]
    yield "first_rank_3", ValueError, [first[0], second]
    yield "B_1", ValueError, [first, second[:1]]
    yield "first_B_1", ValueError, [first[:1], second]
    yield "C_1", ValueError, [first, second[:, :1]]
    yield "C_0", ValueError, [first, second[:, :0]]
    yield "int64", TypeError, [first.long(), second.long()]
    yield "bool", TypeError, [first.bool(), second.bool()]
    yield "complex64", TypeError, [first.to(torch.complex64)] * 2
    yield "mixed_float64", TypeError, [first, second.double()]
    yield "mixed_bfloat16", TypeError, [first, second.bfloat16()]
    yield "a_number", TypeError, 3
    yield "none", TypeError, None
    yield "with_none", TypeError, [first, None]
    yield "with_a_number", TypeError, [first, 3]
    yield "too_wide", ValueError, [first[..., :1].expand(-1, -1, -1, 2**24), second]


# ------------------------------------------------------------------------------------ point_sample

_POINT_ARGUMENTS = ("pyramid", "batch", "level", "xy")


def _points(
    make: Maker,
    shapes: Shapes = _TWO_LEVELS,
    *,
    batch: int = 3,
    channels: int = 4,
    points: int = 9,
    name: str = "built",
    **settings: Any,
) -> SampleInput:
    return SampleInput(
        name,
        (
            _maps(make, shapes, batch, channels),
            make.integers(points, high=batch),
            make.integers(points, high=len(shapes)),
            make.uniform(points, 2, low=-0.2, high=1.2),
        ),
        **settings,
    )


def _build_points(make: Maker, sizes: Sizes) -> SampleInput:
    points = sizes["N"] if sizes["B"] > 0 else 0
    return _points(make, _level_shapes(sizes), batch=sizes["B"], channels=sizes["C"], points=points)


def _point_samples(make: Maker) -> Iterator[SampleInput]:
    # B, N, H and W differ from each other and from all other sizes: see OpInfo.dynamic.
    yield _points(make, name="ordinary")
    yield _points(make, ((8, 10), (2, 5)), name="ordinary_larger", batch=6, points=12)
    yield _points(make, ((9, 6), (2, 5)), name="ordinary_fewer", batch=3, points=7)

    def awkward(name: str, shapes: Shapes = _TWO_LEVELS, **sizes: int) -> SampleInput:
        return _points(make, shapes, name=name, kind="awkward", **sizes)

    yield awkward("all_ones", [(1, 1)], batch=1, channels=1, points=1)
    yield awkward("primes", [(7, 5), (3, 2), (5, 11)], batch=5, channels=13, points=31)
    for channels in (1, 7, 16, 32, 33, 71, 130):
        yield awkward(f"C{channels}", channels=channels)
        yield awkward(f"C{channels}_packed", channels=channels, points=200)
    yield awkward("thin_maps", [(1, 61), (61, 1), (1, 1)], points=40)
    yield awkward("many_points", [(3, 4)], batch=1, channels=3, points=1100)
    yield awkward("many_maps", [(2, 3)] * 20, batch=2, points=60)
    yield from _point_coordinates(make)
    yield from _point_layouts(make)
    yield _points(make, name="empty_B", kind="empty", batch=0, points=0)
    yield _points(make, name="empty_C", kind="empty", channels=0)
    yield _points(make, name="empty_N", kind="empty", points=0)


def _point_coordinates(make: Maker) -> Iterator[SampleInput]:
    # Sides that are powers of two, so that the pixel coordinates are exact in every dtype.
    base = _points(make, [(8, 16), (4, 4)], points=64)
    scale = torch.tensor([[16.0, 8.0], [4.0, 4.0]], device=make.device)[base.args[2]]
    pixels = (-1, -1 + 2**-4, -0.5, 0, 1, 2.5, 3, 3.5, 4 - 2**-4, 4, 7, 7.5, 8, 15, 15.5, 16, 17)
    at_pixels = (make.choice(pixels, 64, 2).float() + 0.5) / scale
    borders = _with(_POINT_ARGUMENTS, base, "borders", xy=at_pixels.to(make.dtype))
    yield SampleInput("borders", borders.args, kind="awkward", smooth=False)
    yield _with(_POINT_ARGUMENTS, base, "far_outside", xy=make.uniform(64, 2, low=-40, high=40))
    extreme = make.choice((-6e4, -1e3, 0.3, 0.6, 1e3, 6e4), 64, 2)
    yield _with(_POINT_ARGUMENTS, base, "very_far_outside", xy=extreme)
    yield _with(_POINT_ARGUMENTS, base, "float32_xy", xy=base.args[3].float())


def _point_layouts(make: Maker) -> Iterator[SampleInput]:
    base = _points(make, channels=64, points=30)
    first, second = base.args[0]
    last = first.to(memory_format=torch.channels_last)
    yield _with(_POINT_ARGUMENTS, base, "mixed_layouts", pyramid=[last, second])
    yield _with(_POINT_ARGUMENTS, base, "tuple", pyramid=(first, second))
    wide = make.normal(3, 66, 2, 5).to(memory_format=torch.channels_last)[:, 1:65]
    yield _with(_POINT_ARGUMENTS, base, "unaligned_channels_last", pyramid=[last, wide])


def _point_errors(make: Maker) -> Iterator[ErrorInput]:
    """Starting from maps [3, 4, 6, 7] and [3, 4, 2, 5] and 9 points."""
    good = dict(zip(_POINT_ARGUMENTS, _points(make).args, strict=True))

    def wrong(name: str, error: Any, blamed: str, **settings: Any) -> ErrorInput:
        changes = settings.pop("changes")
        match = rf"^point_sample: expected .*\b{blamed}\b"
        return ErrorInput(name, tuple((good | changes).values()), error, match, **settings)

    for name, error, pyramid in _wrong_pyramids(good["pyramid"]):
        blamed = "maps" if name == "too_wide" else "pyramid"
        settings = {"needs_values": True} if name == "too_wide" else {}
        yield wrong(f"pyramid_{name}", error, blamed, changes={"pyramid": pyramid}, **settings)
    for argument in ("batch", "level", "xy"):
        tensor = good[argument]
        culprit = "level" if argument == "batch" else argument
        yield wrong(f"{argument}_rank_low", ValueError, argument, changes={argument: tensor[0]})
        yield wrong(f"{argument}_rank_high", ValueError, argument, changes={argument: tensor[None]})
        yield wrong(f"{argument}_short", ValueError, culprit, changes={argument: tensor[:8]})
        yield wrong(f"{argument}_none", ValueError, culprit, changes={argument: tensor[:0]})
        yield wrong(f"{argument}_on_meta", ValueError, argument, changes={argument: tensor.to("meta")})
        yield wrong(
            f"{argument}_complex", TypeError, argument, changes={argument: tensor.to(torch.complex64)}
        )
        yield wrong(f"{argument}_bool", TypeError, argument, changes={argument: tensor.bool()})
        yield wrong(f"{argument}_missing", TypeError, argument, changes={argument: None})
        yield wrong(f"{argument}_a_list", TypeError, argument, changes={argument: tensor.tolist()})
    yield wrong("xy_of_three", ValueError, "xy", changes={"xy": make.normal(9, 3)})
    yield wrong("xy_float64", TypeError, "xy", changes={"xy": good["xy"].double()})
    yield wrong("xy_float16", TypeError, "xy", changes={"xy": good["xy"].half()})
    yield wrong("batch_int32", TypeError, "batch", changes={"batch": good["batch"].int()})
    yield wrong("level_int32", TypeError, "level", changes={"level": good["level"].int()})
    for argument, end in (("batch", 3), ("level", 2)):
        for value in (-1, end, 2**31, 2**32, 2**63 - 1, -(2**63)):
            ids = good[argument].clone()
            ids[-1] = value
            changes = {argument: ids}
            yield wrong(f"{argument}_{value}", ValueError, argument, changes=changes, needs_values=True)
    no_images = {"pyramid": [feature[:0] for feature in good["pyramid"]]}
    yield wrong("no_images", ValueError, "batch", changes=no_images, needs_values=True)


_POINT_SAMPLE = OpInfo(
    name="point_sample",
    build=_build_points,
    size_ranges={"B": range(4), "C": range(40), "L": range(1, 4), "N": range(40), "side": range(9)},
    typical={"B": 2, "C": 5, "L": 2, "N": 7, "side": 4},
    smallest={"B": 1, "C": 4, "L": 1, "N": 2, "side": 2},
    large=(
        {"B": 2, "C": 70, "L": 2, "N": 6000, "side": 40},  # packed
        {"B": 2, "C": 9, "L": 2, "N": 1500, "side": 80},  # read and summed where they lie
    ),
    draw_samples=_point_samples,
    draw_errors=_point_errors,
    native_args=lambda *inputs: inputs,
    backward_args=lambda gradients, inputs: (*gradients, *inputs, True, True, False),
    differentiable=("pyramid", "xy"),
    coordinates={"xy": slice(None)},
    float32_beside_half=("xy",),
    autocast={"pyramid": "cast", "xy": "float32"},
    vmap_batched=("pyramid", "batch", "level", "xy"),
    dynamic={
        "pyramid[0]": {0: "B", 2: "H", 3: "W"},
        "pyramid[1]": {0: "B"},
        "batch": {0: "N"},
        "level": {0: "N"},
        "xy": {0: "N"},
    },
    flops=(104, 208),  # 2 points of 4 channels: 2 * (8 * 4 + 20), 2 * (16 * 4 + 40)
)

# ------------------------------------------------------------------------------------ roi_align

_ROI_ARGUMENTS = ("pyramid", "rois", "level", "output_size", "sampling_ratio", "aligned")


def _boxes(make: Maker, rois: int, batch: int, extent: float, largest: float) -> Tensor:
    """Rows (image, x1, y1, x2, y2) with centres in [0, extent)."""
    centre = make.uniform(rois, 2, high=extent)
    half = make.uniform(rois, 2, low=0.25, high=max(largest / 2, 0.5))
    image = make.integers(rois, high=batch).to(centre.dtype)[:, None]
    return torch.cat([image, centre - half, centre + half], dim=1)


def _rois(
    make: Maker,
    shapes: Shapes = _TWO_LEVELS,
    *,
    batch: int = 3,
    channels: int = 4,
    rois: int = 9,
    output_size: tuple[int, int] = (2, 1),
    sampling_ratio: int = 2,
    aligned: bool = True,
    largest: float | None = None,
    name: str = "built",
    **settings: Any,
) -> SampleInput:
    extent = float(max(max(shape) for shape in shapes))
    return SampleInput(
        name,
        (
            _maps(make, shapes, batch, channels),
            _boxes(make, rois, batch, extent, extent if largest is None else largest),
            make.integers(rois, high=len(shapes)),
            output_size,
            sampling_ratio,
            aligned,
        ),
        {"strides": [2**level for level in range(len(shapes))]},
        **settings,
    )


def _build_rois(make: Maker, sizes: Sizes) -> SampleInput:
    rois = sizes["R"] if sizes["B"] > 0 else 0
    shapes, bins = _level_shapes(sizes), (sizes["h"], sizes["w"])
    return _rois(make, shapes, batch=sizes["B"], channels=sizes["C"], rois=rois, output_size=bins)


def _roi_samples(make: Maker) -> Iterator[SampleInput]:
    # B, R, H and W differ from each other and from all other sizes: see OpInfo.dynamic.
    yield _rois(make, name="ordinary")
    yield _rois(make, ((8, 10), (2, 5)), name="ordinary_larger", batch=6, rois=12)
    yield _rois(make, ((9, 6), (2, 5)), name="ordinary_fewer", batch=3, rois=7)

    def awkward(name: str, shapes: Shapes = _TWO_LEVELS, **settings: Any) -> SampleInput:
        return _rois(make, shapes, name=name, kind="awkward", **settings)

    yield awkward("all_ones", [(1, 1)], batch=1, channels=1, rois=1, output_size=(1, 1))
    yield awkward("primes", [(7, 5), (3, 11)], batch=5, channels=13, rois=11, output_size=(3, 2))
    for channels in (1, 7, 16, 33, 71, 130):
        yield awkward(f"C{channels}", channels=channels, rois=2)
        yield awkward(f"C{channels}_packed", channels=channels, rois=20, output_size=(3, 3))
    yield awkward("adaptive", sampling_ratio=0, rois=15)
    yield awkward("adaptive_not_aligned", sampling_ratio=0, aligned=False, rois=15)
    yield awkward("one_sample", sampling_ratio=1, output_size=(4, 3))
    yield awkward("many_samples", sampling_ratio=7, largest=30.0)
    yield awkward("negative_ratio", sampling_ratio=-1)
    yield awkward("not_aligned", aligned=False)
    yield awkward("small_boxes", output_size=(7, 7), largest=1.0, rois=15)
    yield awkward("large_boxes", sampling_ratio=0, output_size=(2, 2), largest=100.0)
    yield awkward("thin_maps", [(1, 61), (61, 1)], output_size=(3, 1))
    yield awkward("many_maps", [(2, 3)] * 20, batch=2, rois=40)
    yield from _roi_boxes(make)
    yield _rois(make, name="empty_B", kind="empty", batch=0, rois=0)
    yield _rois(make, name="empty_C", kind="empty", channels=0)
    yield _rois(make, name="empty_R", kind="empty", rois=0)


def _roi_boxes(make: Maker) -> Iterator[SampleInput]:
    # Powers of two and whole numbers, so that all positions are exact in every dtype.
    base = _rois(make, [(8, 16), (4, 4)], rois=32, output_size=(2, 4), sampling_ratio=2)
    image, *_ = base.args[1].split(1, dim=1)
    ends = make.choice((-2.0, -1.0, 0.0, 1.0, 4.0, 8.0, 9.0, 16.0, 17.0), 32, 4)
    borders = torch.cat([image, ends], dim=1)  # among them inverted and empty boxes
    yield _with(_ROI_ARGUMENTS, base, "borders", rois=borders)
    yield _with(_ROI_ARGUMENTS, base, "borders_adaptive", rois=borders, sampling_ratio=0)
    yield _with(_ROI_ARGUMENTS, base, "one_number", output_size=3)
    far = torch.cat([image, make.uniform(32, 4, low=-300, high=300)], dim=1)
    yield _with(_ROI_ARGUMENTS, base, "far_outside", rois=far)
    yield _with(_ROI_ARGUMENTS, base, "float32_rois", rois=base.args[1].float())
    fractional = base.args[1] + torch.tensor([0.75, 0, 0, 0, 0], device=make.device, dtype=make.dtype)
    yield _with(_ROI_ARGUMENTS, base, "fractional_images", rois=fractional)
    last = [feature.to(memory_format=torch.channels_last) for feature in base.args[0]]
    yield _with(_ROI_ARGUMENTS, base, "channels_last_tuple", pyramid=tuple(last))


def _roi_native(
    pyramid: Any,
    rois: Any,
    level: Any,
    output_size: Any,
    sampling_ratio: Any = 0,
    aligned: Any = True,
    *,
    strides: Any,
) -> tuple[Any, ...]:
    height, width = (output_size, output_size) if isinstance(output_size, int) else output_size
    return pyramid, rois, level, height, width, sampling_ratio, aligned, list(strides)


def _roi_errors(make: Maker) -> Iterator[ErrorInput]:
    """Starting from maps [3, 4, 6, 7] and [3, 4, 2, 5] and 9 RoIs."""
    sample = _rois(make)
    good = dict(zip(_ROI_ARGUMENTS, sample.args, strict=True))

    def wrong(name: str, error: Any, blamed: str, changes: dict[str, Any], **settings: Any) -> ErrorInput:
        arguments = good | {"strides": sample.kwargs["strides"]} | changes
        strides = {"strides": arguments.pop("strides")}
        match = rf"^roi_align: expected .*\b{blamed}\b"
        return ErrorInput(name, tuple(arguments.values()), error, match, strides, **settings)

    for name, error, pyramid in _wrong_pyramids(good["pyramid"]):
        blamed = "maps" if name == "too_wide" else "pyramid"
        settings = {"needs_values": True} if name == "too_wide" else {}
        yield wrong(f"pyramid_{name}", error, blamed, {"pyramid": pyramid}, **settings)
    for argument in ("rois", "level"):
        tensor = good[argument]
        yield wrong(f"{argument}_rank_low", ValueError, argument, {argument: tensor[0]})
        yield wrong(f"{argument}_rank_high", ValueError, argument, {argument: tensor[None]})
        yield wrong(f"{argument}_short", ValueError, "level", {argument: tensor[:8]})
        yield wrong(f"{argument}_none", ValueError, "level", {argument: tensor[:0]})
        yield wrong(f"{argument}_on_meta", ValueError, argument, {argument: tensor.to("meta")})
        yield wrong(f"{argument}_complex", TypeError, argument, {argument: tensor.to(torch.complex64)})
        yield wrong(f"{argument}_bool", TypeError, argument, {argument: tensor.bool()})
        yield wrong(f"{argument}_missing", TypeError, argument, {argument: None})
        yield wrong(f"{argument}_a_list", TypeError, argument, {argument: tensor.tolist()})
    yield wrong("rois_of_four", ValueError, "rois", {"rois": make.normal(9, 4)})
    yield wrong("rois_float64", TypeError, "rois", {"rois": good["rois"].double()})
    yield wrong("rois_bfloat16", TypeError, "rois", {"rois": good["rois"].bfloat16()})
    yield wrong("level_int32", TypeError, "level", {"level": good["level"].int()})
    yield from _roi_wrong_settings(wrong)
    for value in (-1, 2, 2**31, 2**32, 2**63 - 1, -(2**63)):
        level = good["level"].clone()
        level[-1] = value
        yield wrong(f"level_{value}", ValueError, "level", {"level": level}, needs_values=True)
    for image in (-1.0, -0.5, 3.0, 1e30, float("nan"), float("inf"), float("-inf")):
        rois = good["rois"].clone()
        rois[-1, 0] = image
        yield wrong(f"image_{image}", ValueError, "rois", {"rois": rois}, needs_values=True)
    no_images = {"pyramid": [feature[:0] for feature in good["pyramid"]]}
    yield wrong("no_images", ValueError, "rois", no_images, needs_values=True)


def _roi_wrong_settings(wrong: Any) -> Iterator[ErrorInput]:
    size: Any
    for size in (0, -1, (0, 2), (2, 0), (2, -3)):
        yield wrong(f"output_size_{size}", ValueError, "output_size", {"output_size": size})
    for size in ((2,), (2, 2, 2), ()):
        yield wrong(f"output_size_{size}", ValueError, "output_size", {"output_size": size}, native=False)
    for size in (2.5, None, "2", (2, 2.5), (None, 2)):
        yield wrong(f"output_size_{size!r}", TypeError, "output_size", {"output_size": size}, native=False)
    yield wrong("sampling_ratio_2.5", TypeError, "sampling_ratio", {"sampling_ratio": 2.5}, native=False)
    yield wrong("sampling_ratio_none", TypeError, "sampling_ratio", {"sampling_ratio": None}, native=False)
    yield wrong("aligned_a_string", TypeError, "aligned", {"aligned": "yes"}, native=False)
    nan, inf = float("nan"), float("inf")
    strides: Any
    for strides in ([1.0], [1.0, 2.0, 4.0], [], [1.0, 0.0], [1.0, -2.0], [1.0, nan], [inf, 2.0]):
        yield wrong(f"strides_{strides}", ValueError, "strides", {"strides": strides})
    for strides in (2.0, None, ["1", "2"], [1.0, None]):
        yield wrong(f"strides_{strides}", TypeError, "strides", {"strides": strides}, native=False)


_ROI_ALIGN = OpInfo(
    name="roi_align",
    build=_build_rois,
    size_ranges={
        "B": range(4),
        "C": range(40),
        "L": range(1, 4),
        "R": range(12),
        "side": range(9),
        "h": range(1, 5),
        "w": range(1, 5),
    },
    typical={"B": 2, "C": 5, "L": 2, "R": 7, "side": 4, "h": 3, "w": 2},
    smallest={"B": 1, "C": 2, "L": 1, "R": 1, "side": 2, "h": 2, "w": 2},
    large=(
        {"B": 2, "C": 70, "L": 2, "R": 500, "side": 60, "h": 7, "w": 5},  # packed
        {"B": 1, "C": 16, "L": 2, "R": 500, "side": 600, "h": 7, "w": 5},  # read and summed where they lie
    ),
    draw_samples=_roi_samples,
    draw_errors=_roi_errors,
    native_args=_roi_native,
    backward_args=lambda gradients, inputs: (*gradients, *inputs, False),
    differentiable=("pyramid",),
    coordinates={"rois": slice(1, None)},
    float32_beside_half=("rois",),
    autocast={"pyramid": "cast", "rois": "float32"},
    vmap_batched=("pyramid", "rois", "level"),
    dynamic={
        "pyramid[0]": {0: "B", 2: "H", 3: "W"},
        "pyramid[1]": {0: "B"},
        "rois": {0: "R"},
        "level": {0: "R"},
    },
    flops=(256, 264),  # 8 bins of 2 * 2 samples: 8 * 4 * 8, 8 * (4 * 8 + 1)
)

ENTRIES: tuple[OpInfo, ...] = (_POINT_SAMPLE, _ROI_ALIGN)
