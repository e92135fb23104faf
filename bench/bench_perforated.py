"""perforated_conv2d against the dense convolution, and select_conv2d against all of its branches."""

from __future__ import annotations

import itertools

import peers_rowconv
import pytest
import roofline
import torch
import torch.nn.functional as F
from torch import Tensor

import effops

_CHANNELS, _SIDE, _BLOCK = 256, 64, 8
_LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
_PATTERNS = ["random", "blocks"]
# batch, density, pattern, layout, direction
_CASES = [
    *itertools.product([1], [0.1, 0.25, 0.5, 0.9], _PATTERNS, _LAYOUTS, ["forward"]),
    *itertools.product([1], [0.25], _PATTERNS, _LAYOUTS, ["forward+backward"]),
]
_LARGE = list(itertools.product([8], [0.25], _PATTERNS, ["channels_last"], ["forward", "forward+backward"]))

_BRANCHES = [0, 1, 2, 4, 6, 8, 10]  # the dilations of the MultiPool module; 0 is the identity
_SELECT_CHANNELS, _SELECT_SIZE = 512, (60, 80)


def _mask(batch: int, density: float, pattern: str, device: str) -> Tensor:
    """With exactly this part of the positions, or of the blocks of 8 x 8."""
    side = _SIDE // _BLOCK if pattern == "blocks" else _SIDE
    order = torch.randperm(batch * side**2, generator=torch.Generator().manual_seed(3))
    mask = (order < round(density * len(order))).view(batch, side, side)
    scale = _SIDE // side
    return mask.repeat_interleave(scale, 1).repeat_interleave(scale, 2).to(device)


def _inputs(batch: int, groups: int, layout: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    """x, weight and bias; the weight in the layout of x, as cuDNN and oneDNN want it."""
    generator, inner = torch.Generator().manual_seed(0), _CHANNELS // groups
    x = torch.randn(batch, _CHANNELS, _SIDE, _SIDE, generator=generator)
    weight = torch.randn(_CHANNELS, inner, 3, 3, generator=generator) / (9 * inner) ** 0.5
    bias = torch.randn(_CHANNELS, generator=generator)
    maps = [tensor.to(device, dtype).contiguous(memory_format=_LAYOUTS[layout]) for tensor in (x, weight)]
    return [*maps, bias.to(device, dtype)]


def _work(mask: Tensor, x: Tensor, groups: int, direction: str) -> roofline.Work | None:
    if x.dtype != torch.float32:
        return None
    passes = 1 if direction == "forward" else 3
    flops = 2 * int(mask.sum()) * 9 * _CHANNELS**2 / groups
    return roofline.Work(flops=passes * flops, streamed=passes * 2 * 4 * x.numel())


def _race_perforated(case, dtype_name, device, race, benchmark, groups=1, planned=False):
    batch, density, pattern, layout, direction = case
    inputs = _inputs(batch, groups, layout, getattr(torch, dtype_name), device)
    mask = _mask(batch, density, pattern, device)

    def perforated(mask):
        return lambda x, w, b: effops.perforated_conv2d(x, w, mask, b, padding=1, groups=groups)

    functions = {
        "effops": perforated(effops.plan_mask(mask) if planned else mask),
        "dense conv2d": lambda x, w, b: F.conv2d(x, w, b, padding=1, groups=groups),
    }
    if groups == 1:
        functions["gather + mm"] = lambda x, w, b: peers_rowconv.perforated_conv2d(x, w, b, mask)
    if planned:
        functions["without a plan"] = perforated(mask)
    calls = peers_rowconv.checked_calls(functions, inputs, direction, kept=mask[:, None])
    others = {}
    if planned:
        others = {"without a plan": calls.pop("without a plan"), "plan_mask": lambda: effops.plan_mask(mask)}
    benchmark.group = "perforated_conv2d"
    kind = f"{', depthwise' if groups > 1 else ''}{', with a plan' if planned else ''}"
    shape = f"perforated {density}, {pattern}, {layout}{kind}{f', batch of {batch}' if batch > 1 else ''}"
    benchmark.extra_info.update(op="perforated_conv2d", shape=shape, dtype=dtype_name, direction=direction)
    race(
        calls.pop("effops"),
        calls,
        work=_work(mask, inputs[0], groups, direction),
        calls=1 if device == "cpu" else 10,
        others=others,
    )


@pytest.mark.parametrize("dtype_name", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [*_CASES, *_LARGE], ids=lambda case: "-".join(map(str, case)))
def test_perforated_conv2d(case, dtype_name, device, race, benchmark):
    if device == "cpu" and (dtype_name == "bfloat16" or case in _LARGE):
        pytest.skip("for GPUs")
    _race_perforated(case, dtype_name, device, race, benchmark)


@pytest.mark.parametrize("layout", _LAYOUTS)
def test_depthwise(layout, device, race, benchmark):
    case = (1, 0.25, "random", layout, "forward")
    _race_perforated(case, "float32", device, race, benchmark, groups=_CHANNELS)


@pytest.mark.parametrize("groups", [1, _CHANNELS], ids=["full", "depthwise"])
def test_reused_plan(groups, device, race, benchmark):
    """Beside the same without a plan, and making one."""
    case = (1, 0.25, "random", "channels_last", "forward")
    _race_perforated(case, "float32", device, race, benchmark, groups=groups, planned=True)


@pytest.mark.parametrize("dtype_name", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", _LAYOUTS)
def test_select_conv2d(layout, dtype_name, device, race, benchmark):
    """Each pixel chooses one of 7 branches at random."""
    if device == "cpu" and dtype_name == "bfloat16":
        pytest.skip("for GPUs")
    generator, channels = torch.Generator().manual_seed(0), _SELECT_CHANNELS
    x = torch.randn(1, channels, *_SELECT_SIZE, generator=generator)
    weights = (
        torch.randn(len(_BRANCHES), channels, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
    )
    bias = torch.randn(len(_BRANCHES), channels, generator=generator)
    choice = torch.randint(len(_BRANCHES), (1, *_SELECT_SIZE), generator=generator).to(device)
    x = x.contiguous(memory_format=_LAYOUTS[layout])
    inputs = [tensor.to(device, getattr(torch, dtype_name)) for tensor in (x, weights, bias)]
    functions = {
        "effops": lambda x, w, b: effops.select_conv2d(x, w, choice, _BRANCHES, b),
        "all branches": lambda x, w, b: peers_rowconv.select_conv2d(x, w, choice, _BRANCHES, b),
    }
    calls = peers_rowconv.checked_calls(functions, inputs, "forward")
    benchmark.group = "select_conv2d"
    shape = f"select_conv2d {layout}"
    benchmark.extra_info.update(op="select_conv2d", shape=shape, dtype=dtype_name, direction="forward")
    race(
        calls.pop("effops"),
        calls,
        calls=1 if device == "cpu" else 10,
    )
