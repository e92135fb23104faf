"""Local attention and its two halves: 9 x 9 neighbourhoods of 128 x 128 pixels."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import memory
import peers_localfilter
import pytest
import torch
from peers_rowconv import checked_calls
from roofline import Work
from torch import Tensor

import effops

_WINDOW, _SIDE = 9, 128
# channels, dtype, direction
_CASES = list(itertools.product([32, 90], ["float32", "bfloat16"], ["forward", "forward+backward"]))


def _maps(channels: int, count: int, dtype: torch.dtype, device: str, side: int = _SIDE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(channels)
    maps = [torch.randn(1, channels, side, side, generator=generator) for _ in range(count)]
    return [tensor.to(device, dtype) for tensor in maps]


def _attention(side: int, dtype: torch.dtype, device: str) -> dict[str, Callable[..., Tensor]]:
    """Functions of q, k and v."""
    hidden = peers_localfilter.hidden_taps(side, side, _WINDOW, dtype, device)
    in_blocks = peers_localfilter.hidden_in_blocks(hidden)
    return {
        "effops": functools.partial(effops.local_attention, window=_WINDOW),
        "unfold": functools.partial(peers_localfilter.local_attention_unfold, hidden=hidden),
        "shifts": functools.partial(peers_localfilter.local_attention_shifts, hidden=hidden),
        "blocks": functools.partial(
            peers_localfilter.local_attention_blocks, window=_WINDOW, hidden=in_blocks
        ),
    }


def memory_case(
    device: str, name: str, channels: str, direction: str
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """For memory.extra_bytes; gradients count as extra memory."""

    def both(function: Callable[..., Tensor], *leaves: Tensor) -> Tensor:
        out = function(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))
        return out.detach()

    calls = []
    for side in (16, _SIDE):
        function = _attention(side, torch.float32, device)[name]
        inputs = _maps(int(channels), 3, torch.float32, device, side)
        if direction == "forward":
            calls.append(functools.partial(function, *inputs))
        else:
            leaves = (tensor.requires_grad_() for tensor in inputs)
            calls.append(functools.partial(both, function, *leaves))
    return calls[0], calls[1]


def _race(
    op: str,
    functions: Mapping[str, Callable[..., Tensor]],
    inputs: list[Tensor],
    products: tuple[int, int],
    case: tuple[int, str, str],
    device: str,
    race: Callable[..., Any],
    benchmark: Any,
) -> None:
    """`products`: sums over channels or taps that are needed, forward and with the gradients."""
    channels, dtype_name, direction = case
    calls = checked_calls(functions, inputs, direction)
    work = None
    if dtype_name == "float32":  # the roofline is that of float32
        read, written = sum(tensor.numel() for tensor in inputs), functions["effops"](*inputs).numel()
        forward = direction == "forward"
        flops = products[0 if forward else 1] * 2 * channels * (_WINDOW * _SIDE) ** 2
        work = Work(flops=flops, streamed=4 * (read + written if forward else 3 * read + 2 * written))
    benchmark.group = op
    shape = f"{op} K={_WINDOW}, C={channels}, {_SIDE} x {_SIDE}"
    benchmark.extra_info.update(op=op, shape=shape, dtype=dtype_name, direction=direction)
    race(calls.pop("effops"), calls, points=_SIDE**2, work=work, calls=1 if device == "cpu" else 10)


@pytest.mark.parametrize("case", _CASES, ids=lambda case: "-".join(map(str, case)))
def test_local_attention(case, device, race, benchmark):
    channels, dtype_name, direction = case
    if device == "cpu" and dtype_name == "bfloat16" and direction != "forward":
        pytest.skip("for GPUs")
    dtype = getattr(torch, dtype_name)
    functions = _attention(_SIDE, dtype, device)
    if device == "cuda" and (dtype_name == "float32" or direction == "forward"):
        functions["compiled unfold"] = _compiled(functions["unfold"])
    inputs = _maps(channels, 3, dtype, device)
    _race("local_attention", functions, inputs, (2, 7), case, device, race, benchmark)
    if dtype_name == "float32":
        names = ("effops", "unfold", "blocks")
        arguments = (str(channels), direction)
        needed = {
            name: memory.extra_bytes("bench_local_attention", "memory_case", device, name, *arguments)
            for name in names
        }
        benchmark.extra_info["extra_megabytes"] = {name: round(n / 1e6, 1) for name, n in needed.items()}


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(lambda q, k, v: function(q, k, v), dynamic=False)


@pytest.mark.parametrize("case", _CASES, ids=lambda case: "-".join(map(str, case)))
def test_neighborhood_dot(case, device, race, benchmark):
    channels, dtype_name, _ = case
    if device == "cpu" and dtype_name == "bfloat16":
        pytest.skip("for GPUs")
    names = {
        "effops": effops.neighborhood_dot,
        "unfold": peers_localfilter.neighborhood_dot_unfold,
        "shifts": peers_localfilter.neighborhood_dot_shifts,
        "blocks": peers_localfilter.neighborhood_dot_blocks,
    }
    functions = {name: functools.partial(function, window=_WINDOW) for name, function in names.items()}
    inputs = _maps(channels, 2, getattr(torch, dtype_name), device)
    _race("neighborhood_dot", functions, inputs, (1, 3), case, device, race, benchmark)


@pytest.mark.parametrize("case", _CASES, ids=lambda case: "-".join(map(str, case)))
def test_neighborhood_mix(case, device, race, benchmark):
    channels, dtype_name, _ = case
    if device == "cpu" and dtype_name == "bfloat16":
        pytest.skip("for GPUs")
    functions = {
        "effops": effops.neighborhood_mix,
        "unfold": peers_localfilter.neighborhood_mix_unfold,
        "shifts": peers_localfilter.neighborhood_mix_shifts,
        "blocks": peers_localfilter.neighborhood_mix_blocks,
    }
    dtype = getattr(torch, dtype_name)
    inputs = [*_maps(_WINDOW**2, 1, dtype, device), *_maps(channels, 1, dtype, device)]
    _race("neighborhood_mix", functions, inputs, (1, 3), case, device, race, benchmark)
