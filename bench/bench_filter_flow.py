"""Filters of their own for every pixel: predictive filter flow, CARAFE, RAFT's upsampling.

Predictive filter flow has a softmax over 17 x 17 taps at every one of 512 x 512 pixels: at best it takes as
long as reading the logits, and its gradient as reading them once more and writing theirs. Reading and copying
them is timed in turns with the op.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import memory
import peers_localfilter
import pytest
import torch
from peers_rowconv import checked_calls
from roofline import Work
from torch import Tensor

import effops
from effops import compat

_KERNEL, _SIDE = 17, 512
_DIRECTIONS = ["forward", "forward+backward"]
_Function = Callable[..., Any]
_PEERS: dict[str, _Function] = {
    "unfold": peers_localfilter.filter_flow_unfold,
    "softmax + shifts": peers_localfilter.filter_flow_shifts,
    "exp in shifts": peers_localfilter.filter_flow_exp_shifts,
}


def _inputs(side: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, channels, side, side, generator=generator) for channels in (3, _KERNEL**2)]
    return [tensor.to(device, dtype) for tensor in maps]


def _passes(direction: str) -> int:
    """Over the filters: the backward pass reads them and writes their gradient."""
    return 1 if direction == "forward" else 3


def _work(filters: Tensor, channels: int, direction: str) -> Work | None:
    """The roofline is that of float32."""
    if filters.dtype != torch.float32:
        return None
    passes, out = _passes(direction), channels * filters[:, 0].numel()
    streamed = passes * filters.numel() + (out if passes == 1 else 2 * out)
    return Work(flops=passes * 2 * channels * filters.numel(), streamed=4 * streamed)


def _bandwidth(filters: Tensor) -> dict[str, Callable[[], Tensor]]:
    """One pass over the filters that reads them, and two that copy them."""
    words, target = filters.view(torch.float32), torch.empty_like(filters)
    return {"read": words.sum, "copy": lambda: target.copy_(filters)}


def _note_bandwidth(benchmark: Any, times: dict[str, float], direction: str) -> None:
    passes = _passes(direction)
    benchmark.extra_info["rate_of_read"] = round(passes * times["read"] / times["effops"], 2)
    benchmark.extra_info["rate_of_copy"] = round(passes * times["copy"] / 2 / times["effops"], 2)


def _note(benchmark: Any, op: str, shape: str, dtype_name: str, direction: str) -> None:
    benchmark.group = op
    benchmark.extra_info.update(op=op, shape=shape, dtype=dtype_name, direction=direction)


def memory_case(device: str, name: str, direction: str) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """For memory.extra_bytes; gradients count as extra memory."""
    functions: dict[str, _Function] = {"effops": effops.filter_flow, **_PEERS}
    function = functions[name]

    def both(*leaves: Tensor) -> Tensor:
        out: Tensor = function(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))
        return out.detach()

    calls: list[Callable[[], Tensor]] = []
    for side in (2 * _KERNEL, _SIDE):
        inputs = _inputs(side, torch.float32, device)
        if direction == "forward":
            calls.append(functools.partial(function, *inputs))
        else:
            calls.append(functools.partial(both, *(tensor.requires_grad_() for tensor in inputs)))
    return calls[0], calls[1]


def _extra_memory(device: str, direction: str, filters: Tensor) -> dict[str, float]:
    """In units of the filters."""
    size = filters.numel() * filters.element_size()
    names = ("effops", "unfold", "exp in shifts")
    needed = {n: memory.extra_bytes("bench_filter_flow", "memory_case", device, n, direction) for n in names}
    return {name: round(extra / size, 3) for name, extra in needed.items()}


@pytest.mark.parametrize("direction", _DIRECTIONS)
@pytest.mark.parametrize("dtype_name", ["float32", "bfloat16"])
def test_filter_flow(dtype_name, direction, device, race, benchmark):
    """In bfloat16 beside float32."""
    if device == "cpu" and dtype_name == "bfloat16" and direction != "forward":
        pytest.skip("for GPUs")
    inputs = _inputs(_SIDE, getattr(torch, dtype_name), device)
    functions: dict[str, _Function] = {"effops": effops.filter_flow, **_PEERS}
    functions["compiled unfold"] = torch.compile(peers_localfilter.filter_flow_unfold, dynamic=False)
    if dtype_name == "bfloat16" and direction != "forward":  # they add up gradients in bfloat16
        del functions["unfold"], functions["compiled unfold"]
    calls = checked_calls(functions, inputs, direction)
    others = {**_bandwidth(inputs[1]), "new memory": lambda: torch.ones_like(inputs[1])}
    if dtype_name == "bfloat16":
        single = {"float32": effops.filter_flow}
        others |= checked_calls(single, _inputs(_SIDE, torch.float32, device), direction)
    _note(benchmark, "filter_flow", f"K={_KERNEL}, {_SIDE} x {_SIDE}", dtype_name, direction)
    times = race(
        calls.pop("effops"),
        calls,
        points=_SIDE**2,
        work=_work(inputs[1], 3, direction),
        calls=1 if device == "cpu" else 10,
        others=others,
    )
    _note_bandwidth(benchmark, times, direction)
    if direction != "forward":  # on the CPU the system hands out the memory of the gradient page by page
        benchmark.extra_info["share_of_new_memory"] = round(times["new memory"] / times["effops"], 2)
    if dtype_name == "bfloat16":
        benchmark.extra_info["float32_over_bfloat16"] = round(times["float32"] / times["effops"], 2)
    else:
        benchmark.extra_info["extra_memory"] = _extra_memory(device, direction, inputs[1])


@pytest.mark.parametrize("direction", _DIRECTIONS)
def test_return_flow(direction, device, race, benchmark):
    """Beside the same without the flow."""
    inputs = _inputs(_SIDE, torch.float32, device)
    functions = {
        "effops": lambda image, filters: effops.filter_flow(image, filters, return_flow=True),
        "unfold": peers_localfilter.filter_and_flow_unfold,
        "exp in shifts": peers_localfilter.filter_and_flow_shifts,
    }
    calls = checked_calls(functions, inputs, direction)
    without = checked_calls({"without the flow": effops.filter_flow}, inputs, direction)
    shape = f"K={_KERNEL}, {_SIDE} x {_SIDE}, with the flow"
    _note(benchmark, "filter_flow", shape, "float32", direction)
    race(
        calls.pop("effops"),
        calls,
        points=_SIDE**2,
        work=_work(inputs[1], 5, direction),
        calls=1 if device == "cpu" else 10,
        others=without,
    )


@pytest.mark.parametrize("direction", _DIRECTIONS)
def test_expected_flow(direction, device, race, benchmark):
    _, filters = _inputs(_SIDE, torch.float32, device)
    functions = {
        "effops": effops.expected_flow,
        "softmax + mm": peers_localfilter.expected_flow,
        "a few rows at a time": peers_localfilter.expected_flow_rows,
    }
    calls = checked_calls(functions, [filters], direction)
    _note(benchmark, "expected_flow", f"expected_flow K={_KERNEL}, {_SIDE} x {_SIDE}", "float32", direction)
    times = race(
        calls.pop("effops"),
        calls,
        points=_SIDE**2,
        work=_work(filters, 2, direction),
        calls=1 if device == "cpu" else 10,
        others=_bandwidth(filters),
    )
    _note_bandwidth(benchmark, times, direction)


@pytest.mark.parametrize("direction", _DIRECTIONS)
def test_carafe(direction, device, race, benchmark):
    channels, side, kernel, scale = 64, 64, 5, 2
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, channels, side, side, generator=generator).to(device)
    logits = torch.randn(1, kernel**2, scale * side, scale * side, generator=generator)
    masks = logits.softmax(1).to(device)
    peers: dict[str, _Function] = {
        "unfold": peers_localfilter.carafe_unfold,
        "mm of each pixel": peers_localfilter.carafe_products,
        "shifts": peers_localfilter.carafe_shifts,
    }
    functions: dict[str, _Function] = {"effops": lambda x, m: compat.carafe(x, m, kernel, 1, scale)}
    functions |= {name: functools.partial(peer, scale=scale) for name, peer in peers.items()}
    calls = checked_calls(functions, [features, masks], direction)
    shape = f"CARAFE K={kernel}, C={channels}, {side} x {side} to {scale * side} x {scale * side}"
    _note(benchmark, "carafe", shape, "float32", direction)
    points = (scale * side) ** 2
    race(
        calls.pop("effops"),
        calls,
        points=points,
        work=_work(masks, channels, direction),
        calls=1 if device == "cpu" else 10,
    )


@pytest.mark.parametrize("direction", _DIRECTIONS)
def test_convex_upsample(direction, device, race, benchmark):
    """RAFT on 440 x 1024. Beside filter_flow, with the mask as filters already."""
    height, width, scale = 55, 128, 8
    generator = torch.Generator().manual_seed(0)
    flow = torch.randn(1, 2, height, width, generator=generator).to(device)
    mask = torch.randn(1, 9 * scale**2, height, width, generator=generator).to(device)
    functions: dict[str, _Function] = {
        "effops": compat.convex_upsample,
        "unfold": functools.partial(peers_localfilter.convex_upsample_unfold, scale=scale),
        "shifts": functools.partial(peers_localfilter.convex_upsample_shifts, scale=scale),
    }
    calls = checked_calls(functions, [flow, mask], direction)
    filters = torch.nn.functional.pixel_shuffle(mask, scale)
    alone = {"filter_flow": functools.partial(effops.filter_flow, upsample=scale)}
    others = checked_calls(alone, [flow, filters], direction)
    shape = f"RAFT {height} x {width} to {scale * height} x {scale * width}"
    _note(benchmark, "convex_upsample", shape, "float32", direction)
    race(
        calls.pop("effops"),
        calls,
        points=scale**2 * height * width,
        work=_work(filters, 2, direction),
        calls=1 if device == "cpu" else 10,
        others=others,
    )
