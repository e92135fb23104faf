"""Entries of the rowconv engine, the ops on masks: the plan of one, and the convolution where it keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from effops import reference
from effops._mask_plan import MaskPlan
from effops.testing._info import FLOAT_DTYPES, ErrorInput, Maker, OpInfo, SampleInput, Sizes
from effops.testing._wrong import Wrong, wrong_dtypes, wrong_kinds, wrong_maker

_FILLS = ("zero", "keep", "nearest")


def _mask(make: Maker, *shape: int, share: float = 0.4) -> Tensor:
    """Of the sample's dtype; the given share of it is not 0."""
    kept = make.bits(*shape, ones=share)
    return kept if make.dtype == torch.bool else make.normal(*shape) * kept


# ------------------------------------------------------------------------------------ plan_mask


def _plan_samples(make: Maker) -> Iterator[SampleInput]:
    def sample(name: str, *shape: int, share: float = 0.4, kind: Any = "awkward") -> SampleInput:
        return SampleInput(name, (_mask(make, *shape, share=share),), kind=kind)

    yield sample("ordinary", 3, 6, 7, kind="ordinary")
    yield sample("ordinary_larger", 4, 9, 8, kind="ordinary")
    yield sample("ordinary_fewer", 2, 5, 6, kind="ordinary")
    yield sample("one_kept", 1, 1, 1, share=1.0)
    yield sample("none_kept", 2, 3, 5, share=0.0)
    yield sample("all_kept", 2, 3, 5, share=1.0)
    yield sample("several_blocks", 2, 70, 31)
    yield sample("sparse", 1, 60, 50, share=0.01)
    yield sample("thin", 7, 1, 33)
    options = (float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-7, 6e4)
    numbers = make.choice((0, 1) if make.dtype == torch.bool else options, 2, 9, 8)
    yield SampleInput("special", (numbers,), kind="awkward")
    yield sample("empty_N", 0, 3, 4, kind="empty")
    yield sample("empty_H", 2, 0, 4, kind="empty")
    yield sample("empty_W", 2, 3, 0, kind="empty")


def _plan_errors(make: Maker) -> Iterator[ErrorInput]:
    good = make.normal(3, 6, 7)
    wrong = wrong_maker("plan_mask", {"mask": good})
    ranks = {"0": good[0, 0, 0], "1": good[0, 0], "2": good[0], "4": good[None], "5": good[None, None]}
    for rank, tensor in ranks.items():
        yield wrong(f"rank_{rank}", ValueError, "mask", {"mask": tensor})
        yield wrong(f"rank_{rank}_bool", ValueError, "mask", {"mask": tensor > 0})
    integers = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    yield from wrong_dtypes("mask", good, (*integers, torch.complex64, torch.float8_e4m3fn), wrong)
    yield from wrong_kinds("mask", wrong)


_PLAN = OpInfo(
    name="plan_mask",
    build=lambda make, sizes: SampleInput("built", (_mask(make, sizes["N"], sizes["H"], sizes["W"]),)),
    size_ranges={"N": range(4), "H": range(20), "W": range(20)},
    typical={"N": 2, "H": 5, "W": 7},
    smallest={"N": 1, "H": 2, "W": 2},
    large=({"N": 3, "H": 400, "W": 500}, {"N": 200, "H": 40, "W": 50}),
    draw_samples=_plan_samples,
    draw_errors=_plan_errors,
    native_args=lambda *inputs: inputs,
    backward_args=None,
    computed=lambda plan: (plan.positions, plan.rows),
    differentiable=(),
    dynamic={"mask": {0: "N", 1: "H", 2: "W"}},
    flops=(4, 0),  # 4 positions
    dtypes=(*FLOAT_DTYPES, torch.bool),
    data_dependent_shape=True,
)

# ------------------------------------------------------------------------------------ perforated_conv2d

_ARGUMENTS = ("x", "weight", "mask", "bias", "stride", "padding", "dilation", "groups", "fill", "base")


def _pair(value: int | Sequence[int]) -> Sequence[int]:
    return (value, value) if isinstance(value, int) else value


def _masked(
    make: Maker,
    batch: int,
    channels: int,
    outputs: int,
    height: int,
    width: int,
    *,
    kernel: int | tuple[int, int] = 3,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    bias: bool = True,
    fill: str = "zero",
    is_float: bool = False,
    share: float = 0.4,
    name: str = "built",
    **settings: Any,
) -> SampleInput:
    sides = [
        (side + 2 * p - d * (k - 1) - 1) // s + 1
        for side, k, s, p, d in zip(
            (height, width), _pair(kernel), _pair(stride), _pair(padding), _pair(dilation), strict=True
        )
    ]
    mask = _mask(make, batch, *sides, share=share) if is_float else make.bits(batch, *sides, ones=share)
    return SampleInput(
        name,
        (
            make.normal(batch, channels, height, width),
            make.normal(outputs, channels // groups, *_pair(kernel)),
            mask,
            make.normal(outputs) if bias else None,
            stride,
            padding,
            dilation,
            groups,
            fill,
            make.normal(batch, outputs, *sides) if fill == "keep" else None,
        ),
        smooth=not is_float or share == 1,  # no gradient to a 0 of a mask, where the result jumps
        **settings,
    )


def _build_masked(make: Maker, sizes: Sizes) -> SampleInput:
    kernel, dilation, groups = sizes["k"], sizes["dilation"], sizes["G"]
    sample = _masked(
        make,
        sizes["N"],
        sizes["C"] * groups,
        sizes["O"] * groups,
        sizes["H"],
        sizes["W"],
        kernel=kernel,
        stride=sizes["stride"],
        padding=kernel // 2 * dilation,
        dilation=dilation,
        groups=groups,
        bias=bool(sizes["bias"]),
        fill=_FILLS[sizes["fill"]],
        is_float=bool(sizes["float"]),
    )
    return _channels_last(sample) if sizes["last"] else sample


def _channels_last(sample: SampleInput) -> SampleInput:
    x = sample.args[0].contiguous(memory_format=torch.channels_last)
    return replace(sample, args=(x, *sample.args[1:]))


def _planned(sample: SampleInput) -> SampleInput:
    x, weight, mask, *others = sample.args
    return replace(sample, args=(x, weight, reference.plan_mask(mask), *others))


def _masked_samples(make: Maker) -> Iterator[SampleInput]:
    # N, H and W differ from each other and from all other sizes: see OpInfo.dynamic.
    yield _masked(make, 8, 4, 5, 6, 7, name="ordinary")
    yield _masked(make, 7, 4, 5, 9, 10, name="ordinary_larger")
    yield _masked(make, 2, 4, 5, 8, 6, name="ordinary_fewer")

    def awkward(name: str, *sizes: int, **settings: Any) -> SampleInput:
        return _masked(make, *(sizes or (2, 4, 3, 5, 6)), name=name, kind="awkward", **settings)

    pairs = {"kernel": (3, 2), "stride": (2, 1), "padding": (0, 3), "dilation": (1, 2)}
    yield awkward("pairs", 2, 3, 2, 7, 5, **pairs)
    yield awkward("pairs_nearest_float", 2, 3, 2, 7, 5, fill="nearest", is_float=True, **pairs)
    yield awkward("stride_beyond_the_kernel", 2, 3, 2, 9, 8, kernel=2, stride=3, padding=0)
    yield awkward("one_position", 2, 3, 4, 5, 4, kernel=(5, 4), padding=0, share=1.0)
    yield awkward("C1", 2, 1, 1, 5, 6, is_float=True, share=1.0)
    yield awkward("C7", 2, 7, 7, 5, 6, kernel=5, padding=2, bias=False)
    yield awkward("C33", 2, 33, 70, 5, 6, kernel=1, padding=0)
    yield awkward("C70", 1, 70, 33, 5, 6, is_float=True)
    yield awkward("groups", 2, 6, 9, 5, 6, groups=3, dilation=2, padding=2)
    yield awkward("depthwise", 2, 33, 33, 5, 6, groups=33, is_float=True)
    yield awkward("keep", fill="keep")
    yield awkward("keep_float", fill="keep", is_float=True)
    yield awkward("nearest", fill="nearest", share=0.1)
    yield awkward("nearest_float", fill="nearest", is_float=True, share=1.0)
    yield _planned(awkward("plan", fill="nearest"))
    yield _planned(awkward("plan_float", fill="keep", is_float=True))
    yield _channels_last(awkward("channels_last", 2, 16, 8, 5, 6, fill="keep", is_float=True))
    yield _channels_last(awkward("channels_last_depthwise", 2, 9, 9, 5, 6, groups=9, bias=False))
    yield awkward("all_zero", fill="nearest", share=0.0)
    yield awkward("all_one", share=1.0)
    # Large enough for the dense convolution; without padding, which that one multiplies.
    yield awkward("mostly_kept", 1, 20, 40, 16, 18, padding=0, share=0.95, fill="keep")
    yield _channels_last(
        awkward("mostly_kept_float", 2, 20, 40, 13, 15, padding=0, share=0.95, fill="nearest", is_float=True)
    )
    sample = awkward("float32_mask", is_float=True)
    yield replace(sample, args=(*sample.args[:2], sample.args[2].float(), *sample.args[3:]))
    for name, sizes in {
        "empty_N": (0, 4, 5, 6, 7),
        "empty_C": (2, 0, 5, 6, 7),
        "empty_O": (2, 4, 0, 6, 7),
    }.items():
        yield _masked(make, *sizes, bias=name != "empty_C", fill="nearest", name=name, kind="empty")


def _masked_native(
    x: Any,
    weight: Any,
    mask: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
    fill: Any = "zero",
    base: Any = None,
) -> tuple[Any, ...]:
    plan = mask if isinstance(mask, MaskPlan) else MaskPlan(mask, None, None)  # type: ignore[arg-type]
    numbers = [list(_pair(value)) for value in (stride, padding, dilation)]
    fills = (groups, _FILLS.index(fill), plan.positions, plan.rows, False)
    return x, weight, plan.mask, bias, base, *numbers, *fills


def _masked_backward(gradients: Sequence[Tensor], inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    x, weight, mask, bias, base, *settings, _ = inputs
    need_mask = isinstance(mask, Tensor) and mask.is_floating_point()
    needs = (True, True, need_mask, bias is not None, base is not None, False)
    return *gradients, x, weight, mask, bias, *settings, *needs


def _masked_errors(make: Maker) -> Iterator[ErrorInput]:
    """Starting from x [2, 4, 6, 7], weight [6, 2, 3, 3], groups 2 and a mask [2, 6, 7], fill "keep"."""
    sample = _masked(make, 2, 4, 6, 6, 7, groups=2, fill="keep", is_float=True)
    good = dict(zip(_ARGUMENTS, sample.args, strict=True))
    wrong = wrong_maker("perforated_conv2d", good)
    yield from _wrong_tensors(good, wrong)
    yield from _wrong_plans(good, wrong)
    yield from _wrong_settings(good, wrong)


def _wrong_tensors(good: dict[str, Any], wrong: Wrong) -> Iterator[ErrorInput]:
    x, weight, mask, bias, base = (good[name] for name in ("x", "weight", "mask", "bias", "base"))
    changed = {
        "x_rank": ("x", x[0]),
        "x_rank_5": ("x", x[None]),
        "x_N_1": ("mask", x[:1]),
        "x_of_3_channels": ("groups", x[:, 1:]),
        "x_of_6_channels": ("weight", torch.cat([x, x[:, :2]], dim=1)),
        "x_narrow": ("mask", x[..., 1:]),
        "x_without_rows": ("x", x[:, :, :0]),
        "weight_rank": ("weight", weight[0]),
        "weight_of_1_channel": ("weight", weight[:, :1]),
        "weight_of_5_outputs": ("groups", weight[1:]),
        "weight_of_4_outputs": ("bias", weight[2:]),
        "weight_without_taps": ("weight", weight[..., :0]),
        "weight_larger_than_x": ("x", weight.new_zeros(6, 2, 9, 3)),
        "weight_of_other_sides": ("mask", weight[:, :, 1:]),
        "mask_rank": ("mask", mask[0]),
        "mask_rank_4": ("mask", mask[:, None]),
        "mask_N_1": ("mask", mask[:1]),
        "mask_short": ("mask", mask[:, 1:]),
        "mask_transposed": ("mask", mask.mT),
        "bias_rank": ("bias", bias[None]),
        "bias_short": ("bias", bias[1:]),
        "bias_none": ("bias", bias[:0]),
    }
    for name, (blamed, tensor) in changed.items():
        yield wrong(name, ValueError, blamed, {name.split("_")[0]: tensor})
    for name, tensor in {
        "rank": base[0],
        "N_1": base[:1],
        "short": base[:, 1:],
        "transposed": base.mT,
    }.items():
        yield wrong(f"base_{name}", ValueError, "base", {"base": tensor}, backward=False)
    for name in ("x", "weight", "mask", "bias", "base"):
        blamed = "weight" if name == "x" else name
        yield wrong(f"{name}_on_meta", ValueError, blamed, {name: good[name].to("meta")})
        yield from wrong_kinds(name, wrong, optional=name in ("bias", "base"))
    yield from wrong_dtypes("x", x, (torch.int64, torch.bool, torch.complex64), wrong)
    yield wrong("x_float64", TypeError, "weight", {"x": x.double()})
    for name in ("weight", "bias"):
        yield from wrong_dtypes(name, good[name], (torch.int64, torch.float64, torch.bfloat16), wrong)
    yield from wrong_dtypes("mask", mask, (torch.uint8, torch.int64, torch.float64, torch.float16), wrong)
    for dtype in (torch.float64, torch.bool):
        changes = {"base": base.to(dtype)}
        yield wrong(f"base_{dtype}".replace("torch.", ""), TypeError, "base", changes, backward=False)
    wide = {"x": x[..., :1].expand(2, 4, 6, 2**31), "mask": mask[..., :1].expand(2, 6, 2**31)}
    wide |= {"fill": "zero", "base": None}
    yield wrong("too_wide", ValueError, "x", wide, needs_values=True)
    yield wrong("base_missing", ValueError, "base", {"base": None}, backward=False)
    for fill in ("zero", "nearest"):
        yield wrong(f"base_with_{fill}", ValueError, "base", {"fill": fill}, backward=False)


def _wrong_plans(good: dict[str, Any], wrong: Wrong) -> Iterator[ErrorInput]:
    plan: MaskPlan = reference.plan_mask(good["mask"])
    positions, rows = plan.positions, plan.rows
    for name, error, blamed, fields in (
        ("rank_2", ValueError, "positions", {"positions": positions[None]}),
        ("int32", TypeError, "positions", {"positions": positions.int()}),
        ("without", ValueError, "positions and rows", {"positions": None}),
        ("without_rows", ValueError, "positions and rows", {"rows": None}),
        ("rows_rank_2", ValueError, "rows", {"rows": rows[0]}),
        ("rows_short", ValueError, "rows", {"rows": rows[:, 1:]}),
        ("rows_float", TypeError, "rows", {"rows": rows.float()}),
        ("on_meta", ValueError, "positions", {"positions": positions.to("meta")}),
        ("of_another_mask", ValueError, "mask", {"mask": plan.mask[:1], "rows": rows[:1]}),
        ("integer_mask", TypeError, "mask", {"mask": plan.mask.long()}),
    ):
        yield wrong(f"plan_{name}", error, blamed, {"mask": replace(plan, **fields)})
    for value in (-1, rows.numel(), 2**62, -(2**63)):
        wild = positions.clone()
        wild[-1] = value
        changes = {"mask": replace(plan, positions=wild)}
        yield wrong(f"position_{value}", ValueError, "positions", changes, needs_values=True)
    for value in (-2, len(positions), 2**62, -(2**63)):
        wild = rows.clone()
        wild[-1, -1, -1] = value
        changes = {"mask": replace(plan, rows=wild)}
        yield wrong(f"row_{value}", ValueError, "rows", changes, needs_values=True)


def _wrong_settings(good: dict[str, Any], wrong: Wrong) -> Iterator[ErrorInput]:
    value: Any
    for name, least in (("stride", 1), ("padding", 0), ("dilation", 1)):
        for value in (least - 1, -3, (1, least - 1), (2**31, 1), (1, 2**63 - 1), (-(2**63), 1)):
            yield wrong(f"{name}_{value}", ValueError, name, {name: value})
        for value in ((1,), (1, 1, 1), ()):
            yield wrong(f"{name}_{value}", ValueError, name, {name: value})
        for value in (None, 1.5, "1", (1, 1.5), (None, 1)):
            yield wrong(f"{name}_{value!r}", TypeError, name, {name: value}, native=False)
    yield wrong("stride_2", ValueError, "mask", {"stride": 2})
    yield wrong("padding_2", ValueError, "mask", {"padding": 2})
    yield wrong("dilation_4", ValueError, "x", {"dilation": 4})
    yield wrong("dilation_2_30", ValueError, "dilation", {"dilation": 2**30})
    groups: Any
    for groups in (0, -1, 3, 4, 2**31, -(2**63)):
        yield wrong(f"groups_{groups}", ValueError, "groups", {"groups": groups})
    yield wrong("groups_1", ValueError, "weight", {"groups": 1})
    for groups in (None, 1.5, "2"):
        yield wrong(f"groups_{groups!r}", TypeError, "groups", {"groups": groups}, native=False)
    for value in ("none", "Zero", "", None, 0, []):
        yield wrong(f"fill_{value!r}", ValueError, "fill", {"fill": value}, native=False)


_SETTINGS = {"G": 1, "k": 3, "stride": 1, "dilation": 1, "fill": 0, "float": 0, "bias": 0, "last": 0}

_PERFORATED = OpInfo(
    name="perforated_conv2d",
    build=_build_masked,
    size_ranges={
        "N": range(4),
        "C": range(12),
        "O": range(12),
        "H": range(1, 9),
        "W": range(1, 9),
        "G": range(1, 4),
        "k": range(1, 4),
        "stride": range(1, 4),
        "dilation": range(1, 3),
        "fill": range(3),
        "float": range(2),
        "bias": range(2),
        "last": range(2),
    },
    typical={**_SETTINGS, "N": 2, "C": 3, "O": 5, "H": 4, "W": 6, "fill": 1, "float": 1, "bias": 1},
    smallest={**_SETTINGS, "N": 1, "C": 2, "O": 3, "H": 2, "W": 2},
    large=(
        {**_SETTINGS, "N": 2, "C": 16, "O": 24, "H": 40, "W": 50, "fill": 2, "float": 1, "bias": 1},
        {**_SETTINGS, "N": 1, "C": 1, "O": 1, "H": 60, "W": 50, "G": 32, "last": 1},
    ),
    other_paths=(
        {**_SETTINGS, "N": 2, "C": 8, "O": 16, "H": 5, "W": 4, "fill": 2, "last": 1},
        {**_SETTINGS, "N": 2, "C": 1, "O": 1, "H": 5, "W": 4, "G": 9, "stride": 2, "float": 1},
    ),
    draw_samples=_masked_samples,
    draw_errors=_masked_errors,
    native_args=_masked_native,
    backward_args=_masked_backward,
    differentiable=("x", "weight", "mask", "bias", "base"),
    constant_gradients=("base",),
    float32_beside_half=("mask",),
    autocast={**dict.fromkeys(("x", "weight", "bias", "base"), "cast"), "mask": "float32"},
    vmap_batched=("x", "weight", "mask", "bias", "base"),
    dynamic={"x": {0: "N", 2: "H", 3: "W"}, "mask": {0: "N", 1: "H", 2: "W"}},
    flops=(432, 864),  # 4 positions, 2 to 3 channels, 9 taps: 2 * 4 * 2 * 3 * 9
    keeps_channels_last="x",
)

ENTRIES: tuple[OpInfo, ...] = (_PLAN, _PERFORATED)
