"""Structure-preserving sparsity at the sizes of EffSeg's head: 100 masks, 40,000 active cells at each stage.

Three times, starting from maps of 14 x 14 active cells, the 10,000 best cells are kept and doubled: 128
channels on 28 x 28 cells, then 64 on 56 x 56 and 32 on 112 x 112, with passive rows that serve blocks of up
to 8 x 8 cells. "scattered": as many active cells, each alone somewhere. `points` are cells.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import memory
import peers_rowconv
import pytest
import roofline
import torch
from torch import Tensor

import effops
from effops import SPS

_MAPS, _KEPT = 100, 10_000
_SIDES = {128: 28, 64: 56, 32: 112}  # by the number of channels
_DILATIONS = [1, 3, 5]
_DIRECTIONS = ["forward", "forward+backward"]


@functools.cache
def _structure(side: int) -> SPS:
    """Without features: one channel."""
    if side == 14:
        whole = torch.ones(_MAPS, side, side, dtype=torch.bool)
        return effops.sps_from_dense(torch.zeros(_MAPS, 1, side, side), whole)
    coarse = _structure(side // 2)
    scores = torch.rand(len(coarse.active), generator=torch.Generator().manual_seed(side))
    return effops.sps_refine(coarse, scores, _KEPT)


@functools.cache
def _scattered(side: int) -> SPS:
    """As many rows, but the active cells lie singly, anywhere; runs of passive cells share a row."""
    like = _structure(side)
    order = torch.rand(like.index_map.numel(), generator=torch.Generator().manual_seed(side)).argsort()
    mask = torch.zeros(like.index_map.numel(), dtype=torch.bool)
    mask[order[: len(like.active)]] = True
    sps = effops.sps_from_dense(torch.zeros(_MAPS, 1, side, side), mask.view_as(like.index_map))
    rows, cells = len(like.passive), len(sps.passive)
    shared = len(sps.active) + (sps.index_map.long() - len(sps.active)) * rows // cells
    ids = torch.where(sps.index_map < len(sps.active), sps.index_map, shared).int()
    return replace(sps, passive=sps.passive[:rows], index_map=ids).validate()


def _sps(side: int, channels: int, dtype: torch.dtype, device: str, structure=_structure) -> SPS:
    sps, generator = structure(side), torch.Generator().manual_seed(channels)
    active, passive = (
        torch.randn(len(rows), channels, generator=generator) for rows in (sps.active, sps.passive)
    )
    return replace(sps.to(device), active=active.to(device, dtype), passive=passive.to(device, dtype))


def _parameters(channels: int, count: int, sps: SPS) -> list[Tensor]:
    """Weights, then biases; sums of about 1."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(channels, channels, 3, 3, generator=generator) for _ in range(count)]
    biases = [torch.randn(channels, generator=generator) for _ in range(count)]
    return [tensor.to(sps.active) for tensor in [*(w / (9 * channels) ** 0.5 for w in weights), *biases]]


def _effops(sps: SPS, dilations: list[int], activation: str | None) -> Callable[..., Tensor]:
    """A function of active, passive, the weights and the biases."""
    count = len(dilations)

    def run(active: Tensor, passive: Tensor, *parameters: Tensor) -> Tensor:
        fields = (active, passive, sps.index_map, sps.roi, sps.xy)
        if count == 1:
            return effops.sps_conv2d(*fields, *parameters, *dilations, activation)
        return effops.sps_conv2d(*fields, parameters[:count], parameters[count:], dilations, activation)

    return run


def _plain(sps: SPS, dilations: list[int], activation: str | None) -> Callable[..., Tensor]:
    count = len(dilations)

    def run(active: Tensor, passive: Tensor, *parameters: Tensor) -> Tensor:
        branches = (parameters[:count], parameters[count:], dilations, activation)
        return peers_rowconv.sps_conv2d(sps, active, passive, *branches)

    return run


def _work(sps: SPS, direction: str, branches: int = 1) -> roofline.Work | None:
    """The gradients of the rows and of the weights take a product each. The roofline is that of float32."""
    if sps.active.dtype != torch.float32:
        return None
    channels, passes = sps.active.shape[1], 1 if direction == "forward" else 3
    rows = 2 * len(sps.active) + len(sps.passive)
    flops = 2 * len(sps.active) * 9 * channels**2 * branches
    return roofline.Work(flops=passes * flops, streamed=passes * rows * channels * 4)


def memory_case(device: str, name: str) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """For memory.extra_bytes: 128 channels, with maps of 14 x 14 cells for the small call."""
    calls = []
    for side in (14, _SIDES[128]):
        sps = _sps(side, 128, torch.float32, device)
        function = {"effops": _effops, "PyTorch": _plain}[name](sps, [1], None)
        inputs = (sps.active, sps.passive, *_parameters(128, 1, sps))
        calls.append(functools.partial(function, *inputs))
    return calls[0], calls[1]


@pytest.mark.parametrize("direction", _DIRECTIONS)
@pytest.mark.parametrize("dtype_name", ["float32", "bfloat16"])
@pytest.mark.parametrize("channels", _SIDES)
@pytest.mark.parametrize("structure", [_structure, _scattered], ids=["refined", "scattered"])
def test_sps_conv2d(structure, channels, dtype_name, direction, device, race, benchmark):
    """Beside the matrix product alone, of rows of all taps that are there already."""
    if device == "cpu" and dtype_name == "bfloat16" and direction != "forward":
        pytest.skip("for GPUs")
    side = _SIDES[channels]
    sps = _sps(side, channels, getattr(torch, dtype_name), device, structure)
    functions = {"effops": _effops(sps, [1], None), "PyTorch": _plain(sps, [1], None)}
    if channels == 128:  # half of the cells are active: at the later stages there are far fewer
        functions["dense conv2d"] = functools.partial(peers_rowconv.sps_conv2d_of_all, sps)
    inputs = [sps.active, sps.passive, *_parameters(channels, 1, sps)]
    calls = peers_rowconv.checked_calls(functions, inputs, direction)
    others = {}
    if direction == "forward":
        taps = torch.randn(len(sps.active), 9 * channels, device=device).to(sps.active)
        matrix = torch.randn(9 * channels, channels, device=device).to(sps.active)
        others["mm"] = lambda: torch.mm(taps, matrix)
    benchmark.group = "sps_conv2d"
    shape = f"sps_conv2d C={channels}, {side} x {side}" + (", scattered" if structure is _scattered else "")
    benchmark.extra_info.update(op="sps_conv2d", shape=shape, dtype=dtype_name, direction=direction)
    times = race(
        calls.pop("effops"),
        calls,
        work=_work(sps, direction),
        calls=1 if device == "cpu" else 10,
        others=others,
    )
    if others:
        benchmark.extra_info["rate_of_mm"] = round(times["mm"] / times["effops"], 2)
    if (structure, channels, dtype_name, direction) == (_structure, 128, "float32", "forward"):
        needed = {
            name: memory.extra_bytes("bench_sps", "memory_case", device, name)
            for name in ("effops", "PyTorch")
        }
        benchmark.extra_info["extra_megabytes"] = {name: round(n / 1e6, 1) for name, n in needed.items()}


@pytest.mark.parametrize("direction", _DIRECTIONS)
@pytest.mark.parametrize("dtype_name", ["float32", "bfloat16"])
@pytest.mark.parametrize("channels", _SIDES)
def test_three_dilations(channels, dtype_name, direction, device, race, benchmark):
    """EffSeg's fusion of three dilated convolutions, beside one of them."""
    if device == "cpu" and (dtype_name == "bfloat16" or direction != "forward"):
        pytest.skip("for GPUs")
    side = _SIDES[channels]
    sps = _sps(side, channels, getattr(torch, dtype_name), device)
    functions = {"effops": _effops(sps, _DILATIONS, "relu"), "PyTorch": _plain(sps, _DILATIONS, "relu")}
    rows, parameters = [sps.active, sps.passive], _parameters(channels, 3, sps)
    calls = peers_rowconv.checked_calls(functions, [*rows, *parameters], direction)
    single = {"one dilation": _effops(sps, _DILATIONS[:1], "relu")}
    others = peers_rowconv.checked_calls(single, [*rows, *parameters[::3]], direction)
    benchmark.group = "sps_conv2d"
    shape = f"sps_conv2d dilations 1, 3, 5, C={channels}, {side} x {side}"
    benchmark.extra_info.update(op="sps_conv2d", shape=shape, dtype=dtype_name, direction=direction)
    times = race(
        calls.pop("effops"),
        calls,
        work=_work(sps, direction, branches=3),
        calls=1 if device == "cpu" else 10,
        others=others,
    )
    benchmark.extra_info["three_dilations_over_one"] = round(times["effops"] / times["one dilation"], 2)


def _note(benchmark, op: str, shape: str) -> None:
    benchmark.group = op
    benchmark.extra_info.update(op=op, shape=f"{op} {shape}", dtype="float32", direction="forward")


@pytest.mark.parametrize("channels", [32, 64])
def test_sps_refine(channels, device, race, benchmark):
    sps = _sps(56, channels, torch.float32, device)
    scores = torch.rand(len(sps.active), generator=torch.Generator().manual_seed(2)).to(device)
    peers_rowconv.check_same_sps(
        peers_rowconv.sps_refine(sps, scores, _KEPT), effops.sps_refine(sps, scores, _KEPT)
    )
    _note(benchmark, "sps_refine", f"C={channels}, 56 x 56")
    race(
        lambda: effops.sps_refine(sps, scores, _KEPT),
        {"PyTorch": lambda: peers_rowconv.sps_refine(sps, scores, _KEPT)},
        points=sps.index_map.numel(),
    )


def test_sps_from_dense(device, race, benchmark):
    sps = _sps(56, 64, torch.float32, device)
    x, mask = effops.sps_to_dense(sps), sps.index_map < len(sps.active)
    peers_rowconv.check_same_sps(peers_rowconv.sps_from_dense(x, mask), effops.sps_from_dense(x, mask))
    _note(benchmark, "sps_from_dense", "C=64, 56 x 56")
    race(
        lambda: effops.sps_from_dense(x, mask),
        {"PyTorch": lambda: peers_rowconv.sps_from_dense(x, mask)},
        points=mask.numel(),
    )


def test_sps_to_dense(device, race, benchmark):
    sps = _sps(56, 64, torch.float32, device)
    assert torch.equal(peers_rowconv.sps_to_dense(sps), effops.sps_to_dense(sps))
    _note(benchmark, "sps_to_dense", "C=64, 56 x 56")
    race(
        lambda: effops.sps_to_dense(sps),
        {"PyTorch": lambda: peers_rowconv.sps_to_dense(sps)},
        points=sps.index_map.numel(),
    )
