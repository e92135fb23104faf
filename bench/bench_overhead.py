"""What a call costs before any work: tiny inputs, shapes given as tensors."""

from __future__ import annotations

import peers
import pytest
import torch

import effops

_CALLS = 200
_TARGETS = {"forward, no gradient": 8.0, "forward, gradient": 15.0}  # microseconds on this class of machine


@pytest.mark.parametrize("mode", ["forward, no gradient", "forward, gradient", "forward+backward"])
def test_call_overhead(mode, device, race, benchmark):
    levels = [(2, 2)]
    value = torch.ones(1, 4, 1, 8, device=device)
    locations = torch.full((1, 1, 1, 1, 1, 2), 0.5, device=device)
    weights = torch.ones(1, 1, 1, 1, 1, device=device)
    shapes, starts = torch.tensor(levels, device=device), torch.tensor([0], device=device)
    leaves = [value, locations, weights]
    if mode != "forward, no gradient":
        for leaf in leaves:
            leaf.requires_grad_()

    def measured(forward):
        if mode != "forward+backward":
            return forward
        return lambda: torch.autograd.grad(forward().sum(), leaves, allow_unused=True)

    functions = {
        name: measured(lambda peer=peer: peer(value, levels, locations, weights))
        for name, peer in peers.ms_deform_attn(device).items()
        if "compiled" not in name
    }
    benchmark.group = "overhead"
    benchmark.extra_info.update(op="ms_deform_attn", shape="overhead", dtype="float32", direction=mode)
    if device == "cpu" and mode in _TARGETS:
        benchmark.extra_info["target_milliseconds"] = _TARGETS[mode] / 1e3
    times = race(
        measured(lambda: effops.ms_deform_attn(value, shapes, starts, locations, weights)),
        functions,
        calls=_CALLS,
        others={"torch.mul": measured(lambda: torch.mul(value, weights[0]))},
    )
    benchmark.extra_info["microseconds_per_call"] = {
        name: round(seconds * 1e6, 2) for name, seconds in times.items()
    }
