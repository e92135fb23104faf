"""Entries of the sampling engine: bilinear reads at computed points of a pyramid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from effops.testing._info import ErrorInput, Maker, OpInfo, SampleInput, Sizes


def level_shapes(levels: int, side: int) -> list[tuple[int, int]]:
    """Sizes (H, W) of the maps of a pyramid, never square, at least 1 x 1."""
    return [(max(side - level, 1), max(side + 1 - level, 1)) for level in range(levels)]


# ------------------------------------------------------------------------------------ ms_deform_attn


def _attention(
    make: Maker,
    shapes: Sequence[tuple[int, int]],
    *,
    batch: int = 2,
    queries: int = 3,
    heads: int = 2,
    points: int = 2,
    channels: int = 4,
    name: str = "built",
    spare_rows: int = 0,
    overlap: int = 0,
    **settings: Any,
) -> SampleInput:
    """Arguments of ms_deform_attn for the levels; all but the first begin `overlap` rows early."""
    areas = [height * width for height, width in shapes]
    starts = [max(sum(areas[:level]) - overlap, 0) for level in range(len(areas))]
    points_shape = (batch, queries, heads, len(shapes), points)
    return SampleInput(
        name,
        (
            make.normal(batch, sum(areas) + spare_rows, heads, channels),
            make.int64(shapes).reshape(-1, 2),
            make.int64(starts),
            make.uniform(*points_shape, 2, low=-0.2, high=1.2),
            make.normal(*points_shape),
        ),
        **settings,
    )


def _build_attention(make: Maker, sizes: Sizes) -> SampleInput:
    return _attention(
        make,
        level_shapes(sizes["L"], sizes["side"]),
        batch=sizes["B"],
        queries=sizes["Q"],
        heads=sizes["M"],
        points=sizes["P"],
        channels=sizes["D"],
        overlap=sizes["overlap"],
    )


def _with(sample: SampleInput, name: str, **changes: Any) -> SampleInput:
    """The sample with other arguments."""
    arguments = dict(zip(_ATTENTION_ARGUMENTS, sample.args, strict=True)) | changes
    return SampleInput(name, tuple(arguments.values()), kind="awkward", smooth=sample.smooth)


_ATTENTION_ARGUMENTS = (
    "value",
    "spatial_shapes",
    "level_start_index",
    "sampling_locations",
    "attention_weights",
)
_TWO_LEVELS = ((4, 5), (2, 3))


def _attention_samples(make: Maker) -> Iterator[SampleInput]:
    # B, Q and S differ from each other and from all other sizes: see OpInfo.dynamic.
    yield _attention(make, _TWO_LEVELS, name="ordinary", batch=3, queries=5)
    yield _attention(make, _TWO_LEVELS, name="ordinary_larger", batch=5, queries=8, spare_rows=5)
    yield _attention(make, _TWO_LEVELS, name="ordinary_fewer_queries", batch=4, queries=2)
    yield from _attention_sizes(make)
    yield from _attention_metadata(make)
    yield from _attention_locations(make)
    yield from _attention_dtypes(make)
    yield from _attention_empty(make)


def _attention_sizes(make: Maker) -> Iterator[SampleInput]:
    def awkward(name: str, shapes: Sequence[tuple[int, int]], **sizes: int) -> SampleInput:
        return _attention(make, shapes, name=name, kind="awkward", **sizes)

    yield awkward("all_ones", [(1, 1)], batch=1, queries=1, heads=1, points=1, channels=1)
    yield awkward("primes", [(7, 5), (3, 2), (5, 3)], batch=3, queries=11, heads=5, points=3, channels=13)
    yield awkward("L5_P1", [(8, 9), (7, 5), (4, 4), (2, 2), (1, 1)], points=1, channels=8)
    for channels in (1, 7, 16, 32, 33, 71, 130, 256):
        yield awkward(f"D{channels}", _TWO_LEVELS, channels=channels)
    yield awkward("thin_levels", [(1, 61), (61, 1), (1, 1)], queries=5)
    yield awkward("spare_rows", _TWO_LEVELS, spare_rows=9)
    # The kernels work on tiles of 256 points and tasks of 512 queries; few points are read in place.
    yield awkward("many_points", _TWO_LEVELS, batch=1, heads=1, points=150)
    yield awkward("many_queries", [(3, 4)], batch=1, queries=515, heads=1, points=1, channels=3)
    yield awkward("few_points", [(16, 17), (8, 9)], queries=1, points=1, channels=32)
    yield awkward("few_points_odd_D", [(16, 17)], queries=1, points=1, channels=33)


def _attention_metadata(make: Maker) -> Iterator[SampleInput]:
    base = _attention(make, _TWO_LEVELS)
    rows = [list(shape) for shape in _TWO_LEVELS]
    yield _with(base, "no_starts", level_start_index=None)
    yield _with(base, "list_shapes", spatial_shapes=rows)
    yield _with(base, "tuple_shapes_no_starts", spatial_shapes=_TWO_LEVELS, level_start_index=None)
    yield _with(
        base,
        "cpu_metadata",
        spatial_shapes=torch.tensor(rows),
        level_start_index=torch.tensor([0, 20]),
    )
    yield _with(base, "overlapping_levels", level_start_index=make.int64([3, 0]))
    yield _with(base, "reversed_levels", level_start_index=make.int64([6, 0]))
    yield _with(base, "one_level_twice", spatial_shapes=[(4, 5)] * 2, level_start_index=make.int64([2, 2]))


def _attention_locations(make: Maker) -> Iterator[SampleInput]:
    # Sides that are powers of two, so that the pixel coordinates are exact in every dtype.
    base = _attention(make, [(8, 16), (4, 4)], queries=16)
    shape = base.args[3].shape
    scale = torch.tensor([[16.0, 8.0], [4.0, 4.0]], device=make.device)[:, None]  # (W, H) of each level
    pixels = (-1, -1 + 2**-4, -0.5, 0, 1, 2.5, 3, 3.5, 4 - 2**-4, 4, 7, 7.5, 8, 15, 15.5, 16, 17)
    at_pixels = (make.choice(pixels, *shape).float() + 0.5) / scale
    borders = _with(base, "borders", sampling_locations=at_pixels.to(make.dtype))
    yield SampleInput("borders", borders.args, kind="awkward", smooth=False)
    yield _with(base, "far_outside", sampling_locations=make.uniform(*shape, low=-40, high=40))
    extreme = make.choice((-6e4, -1e3, 0.3, 0.6, 1e3, 6e4), *shape)
    yield _with(base, "very_far_outside", sampling_locations=extreme)


def _attention_dtypes(make: Maker) -> Iterator[SampleInput]:
    base = _attention(make, _TWO_LEVELS, channels=19)
    locations, weights = base.args[3].float(), base.args[4].float()
    yield _with(base, "float32_locations", sampling_locations=locations)
    yield _with(base, "float32_weights", attention_weights=weights)
    yield _with(base, "float32_both", sampling_locations=locations, attention_weights=weights)


def _attention_empty(make: Maker) -> Iterator[SampleInput]:
    def empty(name: str, shapes: Sequence[tuple[int, int]] = _TWO_LEVELS, **sizes: int) -> SampleInput:
        return _attention(make, shapes, name=f"empty_{name}", kind="empty", **sizes)

    yield empty("B", batch=0)
    yield empty("Q", queries=0)
    yield empty("M", heads=0)
    yield empty("D", channels=0)
    yield empty("P", points=0)
    yield empty("L", [], spare_rows=4)
    yield empty("L_and_S", [])
    yield empty("all", [], batch=0, queries=0, heads=0, points=0, channels=0)


def _attention_native(
    value: Tensor, shapes: Any, starts: Tensor | None, locations: Tensor, weights: Tensor
) -> tuple[Any, ...]:
    if not isinstance(shapes, Tensor):
        shapes = torch.tensor(shapes, dtype=torch.int64).reshape(-1, 2)
    return value, shapes, starts, locations, weights


Wrong = Callable[..., ErrorInput]


def _attention_errors(make: Maker) -> Iterator[ErrorInput]:
    """Starting from value [2, 26, 2, 4], 2 levels of 20 and 6 rows, 3 queries, 2 points."""
    good = dict(zip(_ATTENTION_ARGUMENTS, _attention(make, _TWO_LEVELS).args, strict=True))

    def wrong(name: str, error: Any, blamed: str, changes: dict[str, Any], **settings: Any) -> ErrorInput:
        match = rf"^ms_deform_attn: expected .*\b{blamed}\b"
        return ErrorInput(name, tuple((good | changes).values()), error, match, **settings)

    yield from _attention_wrong_shapes(good, wrong)
    yield from _attention_wrong_devices(good, wrong)
    yield from _attention_wrong_types(good, wrong)
    yield from _attention_wrong_lists(wrong)
    yield from _attention_wrong_levels(make, wrong)


def _attention_wrong_shapes(good: dict[str, Tensor], wrong: Wrong) -> Iterator[ErrorInput]:
    """Every rank and every size that two arguments share, wrong in one of them."""
    # The first argument that shows a size fixes it: the next one is blamed.
    blamed = {"value": "sampling_locations", "spatial_shapes": "level_start_index"}
    for argument, shared in (
        ("value", {0: "B", 2: "M"}),
        ("spatial_shapes", {0: "L", 1: "2"}),
        ("level_start_index", {0: "L"}),
        ("sampling_locations", {0: "B", 1: "Q", 2: "M", 3: "L", 4: "P", 5: "2"}),
        ("attention_weights", {0: "B", 1: "Q", 2: "M", 3: "L", 4: "P"}),
    ):
        tensor = good[argument]
        for rank in (tensor[0], tensor[None]):
            yield wrong(f"{argument}_rank_{rank.dim()}", ValueError, argument, {argument: rank})
        for dim, letter in shared.items():
            first = tensor.narrow(dim, 0, 1)
            culprit = argument if letter == "2" else blamed.get(argument, argument)
            if letter in "QP" and argument == "sampling_locations":
                culprit = "attention_weights"
            for changed in (first, torch.cat([tensor, first], dim), tensor.narrow(dim, 0, 0)):
                name = f"{argument}_{letter}_{changed.shape[dim]}"
                yield wrong(name, ValueError, culprit, {argument: changed})


def _attention_wrong_devices(good: dict[str, Tensor], wrong: Wrong) -> Iterator[ErrorInput]:
    for argument, tensor in good.items():
        culprit = "sampling_locations" if argument == "value" else argument
        yield wrong(f"{argument}_on_meta", ValueError, culprit, {argument: tensor.to("meta")})


def _attention_wrong_types(good: dict[str, Tensor], wrong: Wrong) -> Iterator[ErrorInput]:
    refused = {
        "value": (torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn),
        "spatial_shapes": (torch.int32, torch.float32, torch.bool),
        "level_start_index": (torch.int32, torch.float32, torch.bool),
        "sampling_locations": (torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64),
        "attention_weights": (torch.float64, torch.bfloat16, torch.int32, torch.bool, torch.complex64),
    }
    for argument, dtypes in refused.items():
        for dtype in dtypes:
            name = f"{argument}_{str(dtype).removeprefix('torch.')}"
            yield wrong(name, TypeError, argument, {argument: good[argument].to(dtype)})
        yield wrong(f"{argument}_a_number", TypeError, argument, {argument: 3})
        yield wrong(f"{argument}_a_string", (TypeError, ValueError), argument, {argument: "wrong"})
        if argument != "level_start_index":  # None: consecutive levels
            yield wrong(f"{argument}_none", (TypeError, ValueError), argument, {argument: None})
        if argument != "spatial_shapes":  # lists are tested below
            yield wrong(f"{argument}_a_list", TypeError, argument, {argument: good[argument].tolist()})
    half = good["value"].half()
    for argument, dtype in (("sampling_locations", torch.bfloat16), ("attention_weights", torch.float64)):
        changes = {"value": half, argument: good[argument].to(dtype)}
        yield wrong(f"{argument}_other_beside_float16", TypeError, argument, changes)


def _attention_wrong_lists(wrong: Wrong) -> Iterator[ErrorInput]:
    for name, shapes in {
        "flat": [4, 5],
        "triples": [(4, 5, 1), (2, 3, 1)],
        "singles": [(4,), (2,)],
        "ragged": [(4, 5), (2,)],
        "nested": [[(4, 5)], [(2, 3)]],
        "strings": [("4", "5"), ("2", "3")],
        "nones": [(4, None), (2, 3)],
        "fractions": [(4.5, 5.0), (2.0, 3.0)],
        "beyond_int64": [(2**64, 1), (2, 3)],
    }.items():
        changes: dict[str, Any] = {"spatial_shapes": shapes}
        yield wrong(f"list_of_{name}", (TypeError, ValueError), "spatial_shapes", changes, native=False)
    yield wrong("list_too_short", ValueError, "level_start_index", {"spatial_shapes": [(4, 5)]})
    yield wrong("list_empty", ValueError, "level_start_index", {"spatial_shapes": []})
    changes = {"spatial_shapes": [(2, 3)] * 3, "level_start_index": None}
    yield wrong("list_too_long", ValueError, "sampling_locations", changes)


def _attention_wrong_levels(make: Maker, wrong: Wrong) -> Iterator[ErrorInput]:
    """Levels that leave the 26 rows of value, or would if a product or sum wrapped around."""
    changes: dict[str, Any]
    for name, first in {
        "H_zero": (0, 5),
        "W_zero": (4, 0),
        "H_negative": (-4, 5),
        "W_negative": (4, -5),
        "both_negative": (-4, -5),
        "too_high": (6, 5),
        "too_wide": (4, 7),
        "H_2_62": (2**62, 4),
        "W_2_62": (4, 2**62),
        "area_wraps_to_0": (2**32, 2**32),
        "area_wraps_to_20": (2**62 + 1, 20),
        "H_wraps_int32": (2**32 + 4, 5),
        "W_wraps_int32": (4, 2**32 + 5),
        "H_max": (2**63 - 1, 1),
        "H_min": (-(2**63), 1),
        "W_2_24": (1, 2**24),
    }.items():
        for label, starts in (("", make.int64([0, 20])), ("_no_starts", None)):
            changes = {"spatial_shapes": make.int64([first, (2, 3)]), "level_start_index": starts}
            yield wrong(f"level_{name}{label}", ValueError, "spatial_shapes", changes, needs_values=True)
    for name, start in {
        "negative": -1,
        "one_too_far": 21,
        "at_end": 26,
        "beyond_end": 27,
        "max": 2**63 - 1,
        "end_wraps": 2**63 - 6,
        "min": -(2**63),
        "wraps_int32": 2**32,
    }.items():
        changes = {"level_start_index": make.int64([0, start])}
        yield wrong(f"start_{name}", ValueError, "level_start_index", changes, needs_values=True)
    changes = {"spatial_shapes": [(4, 5), (3, 3)], "level_start_index": None}
    yield wrong("list_beyond_rows", ValueError, "spatial_shapes", changes, needs_values=True)
    no_rows = {"value": make.normal(2, 0, 2, 4)}
    yield wrong("no_rows", ValueError, "spatial_shapes", no_rows, needs_values=True)


_MS_DEFORM_ATTN = OpInfo(
    name="ms_deform_attn",
    build=_build_attention,
    size_ranges={
        "B": range(4),
        "Q": range(6),
        "M": range(4),
        "L": range(4),
        "P": range(4),
        "D": range(40),
        "side": range(1, 9),
        "overlap": range(9),
    },
    typical={"B": 2, "Q": 3, "M": 2, "L": 2, "P": 2, "D": 5, "side": 4, "overlap": 0},
    smallest={"B": 1, "Q": 2, "M": 1, "L": 1, "P": 2, "D": 4, "side": 2, "overlap": 0},
    large=(
        {"B": 2, "Q": 1100, "M": 2, "L": 2, "P": 3, "D": 9, "side": 80, "overlap": 0},
        {"B": 2, "Q": 600, "M": 3, "L": 2, "P": 1, "D": 16, "side": 80, "overlap": 0},  # read in place
        {"B": 1, "Q": 1500, "M": 2, "L": 4, "P": 4, "D": 8, "side": 12, "overlap": 140},
    ),
    other_paths=({"B": 2, "Q": 1, "M": 3, "L": 2, "P": 1, "D": 32, "side": 9, "overlap": 0},),  # in place
    draw_samples=_attention_samples,
    draw_errors=_attention_errors,
    native_args=_attention_native,
    backward_args=lambda gradients, inputs: (*gradients, *inputs, True, True, True, False),
    differentiable=("value", "sampling_locations", "attention_weights"),
    linear_in=("value", "attention_weights"),
    coordinates={"sampling_locations": slice(None)},
    float32_beside_half=("sampling_locations", "attention_weights"),
    autocast={"value": "cast", "sampling_locations": "float32", "attention_weights": "cast"},
    vmap_batched=("value", "sampling_locations", "attention_weights"),
    vmap_shared=("spatial_shapes", "level_start_index"),
    dynamic={
        "value": {0: "B", 1: "S"},
        "sampling_locations": {0: "B", 1: "Q"},
        "attention_weights": {0: "B", 1: "Q"},
    },
    flops=(208, 416),  # 4 points of 4 channels: 4 * (8 * 4 + 20), 4 * (16 * 4 + 40)
)

# ------------------------------------------------------------------------------------ all entries

ENTRIES: tuple[OpInfo, ...] = (_MS_DEFORM_ATTN,)
