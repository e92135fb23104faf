"""Entries of the rowconv engine, the ops that make, read and change an SPS."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch

from effops._sps import SPS
from effops.testing._info import ErrorInput, Maker, OpInfo, SampleInput, Sizes
from effops.testing._rowconv_inputs import (
    SPS_RANGES,
    Change,
    fields_of,
    make_sps,
    wrong_fields,
    wrong_ids,
)
from effops.testing._wrong import Wrong, wrong_dtypes, wrong_kinds, wrong_maker

#: Ordinary samples: R, H, W, NA and NP differ from each other and from all other sizes, see OpInfo.dynamic.
ORDINARY: Mapping[str, Sizes] = MappingProxyType(
    {
        "ordinary": {"R": 8, "H": 6, "W": 7, "NA": 11, "NP": 13},
        "ordinary_larger": {"R": 4, "H": 9, "W": 8, "NA": 25, "NP": 21},
        "ordinary_fewer": {"R": 3, "H": 5, "W": 6, "NA": 14, "NP": 9},
    }
)
#: Numbers of rows that take other ways.
AWKWARD: Mapping[str, Sizes] = MappingProxyType(
    {
        "one_cell": {"R": 1, "H": 1, "W": 1, "NA": 1, "NP": 0},
        "all_active": {"R": 2, "H": 3, "W": 5, "NA": 30, "NP": 0},
        "all_passive": {"R": 2, "H": 3, "W": 5, "NA": 0, "NP": 7},
        "one_passive_row": {"R": 3, "H": 4, "W": 5, "NA": 4, "NP": 1},
        "unused_rows": {"R": 1, "H": 3, "W": 2, "NA": 2, "NP": 50},
        "thin_maps": {"R": 5, "H": 1, "W": 31, "NA": 20, "NP": 17},
    }
)
EMPTY: Mapping[str, Sizes] = MappingProxyType(
    {
        "empty_R": {"R": 0, "H": 4, "W": 5, "NA": 0, "NP": 0},
        "empty_H": {"R": 2, "H": 0, "W": 5, "NA": 0, "NP": 3},
    }
)
#: Of an SPS argument.
DYNAMIC: Mapping[str, Mapping[int, str]] = MappingProxyType(
    {
        "active": {0: "NA"},
        "passive": {0: "NP"},
        "index_map": {0: "R", 1: "H", 2: "W"},
        "roi": {0: "NA"},
        "xy": {0: "NA"},
    }
)
_DYNAMIC_SPS = {f"sps.{field}": sizes for field, sizes in DYNAMIC.items()}
_BATCHED_SPS = tuple(_DYNAMIC_SPS)
_FEATURES = ("sps.active", "sps.passive")
_LARGE = {"R": 4, "H": 60, "W": 50, "NA": 4000, "NP": 3000, "F": 33}


def _wrong_sps(good: SPS, changes: Iterator[Change], wrong: Wrong, **settings: Any) -> Iterator[ErrorInput]:
    for name, error, blamed, fields in changes:
        yield wrong(name, error, blamed, {"sps": replace(good, **fields)}, **settings)


def _no_sps(good: SPS, wrong: Wrong) -> Iterator[ErrorInput]:
    values: dict[str, Any] = {"none": None, "a_tensor": good.active, "a_tuple": fields_of(good), "a_dict": {}}
    for name, value in values.items():
        yield wrong(f"sps_{name}", TypeError, "sps", {"sps": value}, native=False)


# ------------------------------------------------------------------------------------ sps_from_dense


def _dense(
    make: Maker,
    maps: int,
    features: int,
    height: int,
    width: int,
    *,
    share: float = 0.4,
    name: str = "built",
    **settings: Any,
) -> SampleInput:
    x = make.normal(maps, features, height, width)
    return SampleInput(name, (x, make.bits(maps, height, width, ones=share)), **settings)


def _dense_samples(make: Maker) -> Iterator[SampleInput]:
    # R, H and W differ from each other and from F: see OpInfo.dynamic.
    yield _dense(make, 3, 4, 6, 7, name="ordinary")
    yield _dense(make, 5, 4, 9, 8, name="ordinary_larger")
    yield _dense(make, 2, 4, 5, 6, name="ordinary_fewer")

    def awkward(name: str, *sizes: int, share: float = 0.4) -> SampleInput:
        return _dense(make, *sizes, share=share, name=name, kind="awkward")

    yield awkward("one_cell", 1, 1, 1, 1, share=1.0)
    for features in (1, 7, 33, 70):
        yield awkward(f"F{features}", 2, features, 5, 3)
    yield awkward("several_blocks", 2, 3, 40, 31)
    yield awkward("all_active", 2, 5, 4, 3, share=1.0)
    yield awkward("all_passive", 2, 5, 4, 3, share=0.0)
    yield awkward("thin_maps", 3, 4, 1, 61)
    for number, name in enumerate(("empty_R", "empty_F", "empty_H", "empty_W")):
        sizes = [2, 3, 4, 5]
        sizes[number] = 0
        yield _dense(make, *sizes, name=name, kind="empty")


def _dense_errors(make: Maker) -> Iterator[ErrorInput]:
    """Starting from x [3, 4, 6, 7]."""
    good = dict(zip(("x", "mask"), _dense(make, 3, 4, 6, 7).args, strict=True))

    def make_wrong(*args: Any, **settings: Any) -> ErrorInput:
        return wrong_maker("sps_from_dense", good)(*args, backward=False, **settings)

    x, mask = good["x"], good["mask"]
    for name, tensor in {"rank_3": x[0], "rank_5": x[None]}.items():
        yield make_wrong(f"x_{name}", ValueError, "x", {"x": tensor})
    for name, tensor in {"R_1": x[:1], "H_short": x[:, :, 1:], "W_none": x[..., :0]}.items():
        yield make_wrong(f"x_{name}", ValueError, "mask", {"x": tensor})
    for name, tensor in {
        "rank_2": mask[0],
        "rank_4": mask[:, None],
        "R_1": mask[:1],
        "H_short": mask[:, 1:],
        "W_none": mask[..., :0],
        "transposed": mask.mT,
        "on_meta": mask.to("meta"),
    }.items():
        yield make_wrong(f"mask_{name}", ValueError, "mask", {"mask": tensor})
    wide = {"x": x[..., :1].expand(3, 4, 6, 2**31), "mask": mask[..., :1].expand(3, 6, 2**31)}
    yield make_wrong("too_wide", ValueError, "x", wide, needs_values=True)
    yield make_wrong("x_on_meta", ValueError, "mask", {"x": x.to("meta")})
    yield from wrong_dtypes("x", x, (torch.int64, torch.uint8, torch.complex64, torch.bool), make_wrong)
    yield from wrong_dtypes("mask", mask, (torch.uint8, torch.int64, torch.float32), make_wrong)
    yield from wrong_kinds("x", make_wrong)
    yield from wrong_kinds("mask", make_wrong)


_FROM_DENSE = OpInfo(
    name="sps_from_dense",
    build=lambda make, sizes: _dense(make, sizes["R"], sizes["F"], sizes["H"], sizes["W"]),
    size_ranges={"R": range(4), "F": range(40), "H": range(9), "W": range(9)},
    typical={"R": 2, "F": 5, "H": 4, "W": 3},
    smallest={"R": 1, "F": 3, "H": 2, "W": 2},
    large=({"R": 3, "F": 70, "H": 50, "W": 40},),
    other_paths=({"R": 1, "F": 33, "H": 7, "W": 5},),
    draw_samples=_dense_samples,
    draw_errors=_dense_errors,
    native_args=lambda *inputs: inputs,
    backward_args=lambda gradients, inputs: (*gradients, torch.ops.effops.sps_from_dense(*inputs)[2]),
    differentiable=("x",),
    linear_in=("x",),
    constant_gradients=("x",),
    autocast={"x": "cast"},
    dynamic={"x": {0: "R", 2: "H", 3: "W"}, "mask": {0: "R", 1: "H", 2: "W"}},
    flops=(4, 12),  # 4 cells; 4 * 3 elements
    data_dependent_shape=True,
)

# ------------------------------------------------------------------------------------ sps_to_dense


def _sparse(
    make: Maker, sizes: Sizes, features: int, wide: bool = False, name: str = "built", **settings: Any
) -> SampleInput:
    return SampleInput(name, (make_sps(make, sizes, features, wide),), **settings)


def _sparse_samples(make: Maker) -> Iterator[SampleInput]:
    for name, sizes in ORDINARY.items():
        yield _sparse(make, sizes, 4, name=name)
    for name, sizes in AWKWARD.items():
        yield _sparse(make, sizes, 5, name=name, kind="awkward")
    for features in (1, 7, 33, 70):
        sizes = {"R": 2, "H": 4, "W": 5, "NA": 9, "NP": 6}
        yield _sparse(make, sizes, features, wide=features > 7, name=f"F{features}", kind="awkward")
    for name, sizes in EMPTY.items():
        yield _sparse(make, sizes, 4, name=name, kind="empty")
    yield _sparse(make, ORDINARY["ordinary"], 0, name="empty_F", kind="empty")


def _sparse_errors(make: Maker) -> Iterator[ErrorInput]:
    good = make_sps(make, ORDINARY["ordinary"], 4)
    wrong = wrong_maker("sps_to_dense", {"sps": good})
    yield from _wrong_sps(good, wrong_fields(good), wrong)
    yield from _wrong_sps(good, wrong_ids(good), wrong, needs_values=True)
    yield from _no_sps(good, wrong)


_TO_DENSE = OpInfo(
    name="sps_to_dense",
    build=lambda make, sizes: _sparse(make, sizes, sizes["F"]),
    size_ranges={**SPS_RANGES, "F": range(40)},
    typical={"R": 2, "H": 3, "W": 4, "NA": 6, "NP": 5, "F": 5},
    smallest={"R": 1, "H": 2, "W": 2, "NA": 2, "NP": 1, "F": 3},
    large=(_LARGE,),
    other_paths=({"R": 1, "H": 7, "W": 5, "NA": 12, "NP": 3, "F": 33},),
    draw_samples=_sparse_samples,
    draw_errors=_sparse_errors,
    native_args=fields_of,
    backward_args=lambda gradients, inputs: (*gradients, *inputs, True, True, False),
    differentiable=_FEATURES,
    autocast=dict.fromkeys(_FEATURES, "cast"),
    vmap_batched=_BATCHED_SPS,
    dynamic=_DYNAMIC_SPS,
    flops=(4, 12),  # 4 cells; 4 * 3 elements
)

# ------------------------------------------------------------------------------------ sps_refine


def _refine(
    make: Maker,
    sizes: Sizes,
    features: int,
    num_refine: int,
    *,
    upsample: bool = True,
    wide: bool = False,
    name: str = "built",
    **settings: Any,
) -> SampleInput:
    sps = make_sps(make, sizes, features, wide)
    keywords = {} if upsample else {"upsample": False}
    return SampleInput(name, (sps, make.normal(len(sps.active)), num_refine), keywords, **settings)


def _refine_samples(make: Maker) -> Iterator[SampleInput]:
    for name, sizes in ORDINARY.items():
        yield _refine(make, sizes, 4, 5, name=name)

    def awkward(name: str, sizes: Sizes, *arguments: Any, **settings: Any) -> SampleInput:
        return _refine(make, sizes, *arguments, name=name, kind="awkward", **settings)

    for name, sizes in AWKWARD.items():
        yield awkward(name, sizes, 5, 3)
    some = {"R": 2, "H": 4, "W": 5, "NA": 19, "NP": 6}
    for features, num_refine in ((1, 0), (7, 1), (33, 18), (70, 19)):
        yield awkward(f"keep_{num_refine}_of_19", some, features, num_refine, wide=features > 7)
    yield awkward("keep_all", some, 3, 2**40)
    yield awkward("same_resolution", some, 5, 8, upsample=False)
    options = {
        "ties": (0.0, -0.0, 1.0, -1.0),
        "non_finite": (float("nan"), float("inf"), float("-inf"), 1.0, -1.0),
        "extremes": (6e4, -6e4, 1e-7, -1e-7, 0.0),
    }
    for name, numbers in options.items():
        sps, _, num_refine = awkward(name, some, 3, 7).args
        yield SampleInput(name, (sps, make.choice(numbers, 19), num_refine), kind="awkward")
    sps, scores, num_refine = awkward("float32_scores", some, 3, 7).args
    yield SampleInput("float32_scores", (sps, scores.float(), num_refine), kind="awkward")
    for name, sizes in EMPTY.items():
        yield _refine(make, sizes, 4, 3, name=name, kind="empty")
    yield _refine(make, ORDINARY["ordinary"], 0, 3, name="empty_F", kind="empty")


def _refine_errors(make: Maker) -> Iterator[ErrorInput]:
    """Starting from 11 active rows. The backward op sees none of it."""
    sps = make_sps(make, ORDINARY["ordinary"], 4)
    scores = make.normal(11)
    good = {"sps": sps, "scores": scores, "num_refine": 5, "upsample": True}

    def wrong(*args: Any, **settings: Any) -> ErrorInput:
        return wrong_maker("sps_refine", good)(*args, backward=False, **settings)

    yield from _wrong_sps(sps, wrong_fields(sps), wrong)
    ids = (change for change in wrong_ids(sps) if change[0] != "no_rows")  # which have no scores
    yield from _wrong_sps(sps, ids, wrong, needs_values=True)
    wide = {"index_map": sps.index_map[:1, :1, :1].expand(1, 2**30, 1)}
    change = ("too_wide_to_double", ValueError, "index_map", wide)
    yield from _wrong_sps(sps, iter([change]), wrong, needs_values=True)
    yield from _no_sps(sps, wrong)
    for name, tensor in {
        "rank_0": scores[0],
        "rank_2": scores[None],
        "short": scores[1:],
        "of_no_row": scores[:0],
        "on_meta": scores.to("meta"),
    }.items():
        yield wrong(f"scores_{name}", ValueError, "scores", {"scores": tensor})
    yield from wrong_dtypes("scores", scores, (torch.int64, torch.bool, torch.complex64), wrong)
    yield from wrong_kinds("scores", wrong)
    for number in (-1, -(2**31), -(2**63)):
        yield wrong(f"num_refine_{number}", ValueError, "num_refine", {"num_refine": number})
    values: dict[str, Any] = {"none": None, "a_string": "3", "a_fraction": 1.5, "a_list": [1]}
    for name, value in values.items():
        yield wrong(f"num_refine_{name}", TypeError, "num_refine", {"num_refine": value}, native=False)
    for name, value in {"a_list": [True], "a_string": "yes"}.items():
        yield wrong(f"upsample_{name}", TypeError, "upsample", {"upsample": value}, native=False)


def _refine_native(sps: SPS, scores: Any, num_refine: Any, upsample: Any = True) -> tuple[Any, ...]:
    return *fields_of(sps), scores, num_refine, upsample


def _refine_backward(gradients: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    new_ids = torch.ops.effops.sps_refine(*inputs)[5]
    return *gradients, new_ids, len(inputs[1]), inputs[7], True, True


_REFINE = OpInfo(
    name="sps_refine",
    build=lambda make, sizes: _refine(make, sizes, sizes["F"], sizes["K"], upsample=bool(sizes["upsample"])),
    size_ranges={**SPS_RANGES, "F": range(40), "K": range(30), "upsample": range(2)},
    typical={"R": 2, "H": 3, "W": 4, "NA": 6, "NP": 5, "F": 5, "K": 4, "upsample": 1},
    smallest={"R": 1, "H": 2, "W": 2, "NA": 2, "NP": 1, "F": 3, "K": 1, "upsample": 1},
    large=({**_LARGE, "K": 2500, "upsample": 1}, {**_LARGE, "K": 2500, "upsample": 0}),
    other_paths=({"R": 1, "H": 7, "W": 5, "NA": 12, "NP": 3, "F": 33, "K": 5, "upsample": 0},),
    draw_samples=_refine_samples,
    draw_errors=_refine_errors,
    native_args=_refine_native,
    backward_args=_refine_backward,
    native_computed=lambda outputs: outputs[:5],
    differentiable=_FEATURES,
    constant_gradients=_FEATURES,
    float32_beside_half=("scores",),
    autocast=dict.fromkeys(_FEATURES, "cast"),
    vmap_batched=(*_BATCHED_SPS, "scores"),
    dynamic={**_DYNAMIC_SPS, "scores": {0: "NA"}},
    flops=(6, 18),  # 2 scores and 4 cells; 4 new active and 2 new passive rows of 3
)

ENTRIES: tuple[OpInfo, ...] = (_FROM_DENSE, _TO_DENSE, _REFINE)
