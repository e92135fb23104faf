"""The CUDA kernels of local_attention, run in the host simulator, against the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import simulator
import torch
from torch import Tensor

from effops import reference

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
TOLERANCE = {F32: 2e-5, F64: 1e-12, BF16: 1.5e-2, F16: 4e-3}  # relative to the largest element
BORDERS = {"zero": 0, "mask": 3}


@dataclass(frozen=True)
class Case:
    """One shape and one set of options."""

    dtype: torch.dtype
    window: int
    key_channels: int
    value_channels: int
    sides: tuple[int, int, int]  # N, H, W
    border: str = "mask"
    dilation: int = 1
    budget: int = 1 << 16  # of shared memory; a small one makes several boxes of taps
    channels_last: bool = False


CASES = {
    "odd_channels": Case(F32, 3, 33, 5, (1, 9, 17)),
    "zero": Case(F64, 5, 6, 7, (2, 6, 5), "zero"),
    "even_window": Case(F64, 4, 5, 2, (1, 9, 7), "zero", budget=50_000),
    "dilation": Case(BF16, 3, 9, 3, (1, 17, 33), dilation=2),
    "large_dilation": Case(F32, 3, 2, 4, (1, 4, 5), "zero", dilation=7),
    "boxes": Case(F32, 7, 3, 5, (1, 10, 18), budget=40_000),
    "boxes_half": Case(F16, 6, 3, 2, (1, 9, 6), "zero", budget=36_000),
    "larger_than_image": Case(F16, 9, 6, 1, (2, 3, 2), "zero"),
    "channels_last": Case(F16, 2, 8, 4, (1, 8, 16), channels_last=True),
    "one_pixel": Case(BF16, 1, 1, 1, (1, 1, 1)),
    "no_key_channels": Case(F32, 3, 0, 2, (1, 3, 4), "zero"),
    "no_value_channels": Case(F32, 3, 3, 0, (1, 3, 4)),
}


def make_maps(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    batch, height, width = case.sides
    generator = torch.Generator().manual_seed(case.window)
    channels = {"q": case.key_channels, "k": case.key_channels}
    channels |= {"v": case.value_channels, "grad_output": case.value_channels}
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    return {
        name: torch.randn(batch, count, height, width, generator=generator, dtype=F64)
        .to(dtype)
        .contiguous(memory_format=layout)
        for name, count in channels.items()
    }


def make_arguments(case: Case, maps: dict[str, Tensor], scale: float) -> dict[str, simulator.Argument]:
    return {
        **maps,
        "window": case.window,
        "dilation": case.dilation,
        "border": BORDERS[case.border],
        "scale": scale,
        "budget": case.budget,
        "channels_last": case.channels_last,
    }


def run(case: Case, maps: dict[str, Tensor], scale: float) -> simulator.Results:
    found = simulator.run_schedules("local_attention", make_arguments(case, maps, scale))
    if case.channels_last:
        found |= {key: value.permute(0, 3, 1, 2) for key, value in found.items() if value.dim() == 4}
    return found


def expected(
    case: Case, maps: dict[str, Tensor], scale: float, dtype: torch.dtype = F64
) -> dict[str, Tensor]:
    q, k, v = (maps[name].to(dtype, copy=True).requires_grad_() for name in ("q", "k", "v"))
    output = reference.local_attention(q, k, v, case.window, case.dilation, scale, case.border)
    gradients = torch.autograd.grad(output, (q, k, v), maps["grad_output"].to(dtype), materialize_grads=True)
    wanted = dict(zip(("grad_q", "grad_k", "grad_v"), gradients, strict=True))
    return wanted | {"output": output.detach(), "log_sum_exp": log_sum_exp(case, maps, scale)}


def log_sum_exp(case: Case, maps: dict[str, Tensor], scale: float) -> Tensor:
    q, k = (maps[name].double() for name in ("q", "k"))
    similarity = scale * reference.neighborhood_dot(q, k, case.window, case.dilation)
    if case.border == "mask":
        ones = q.new_ones(case.sides).unsqueeze(1)
        inside = reference.neighborhood_dot(ones, ones, case.window, case.dilation)
        similarity = similarity.masked_fill(inside == 0, -torch.inf)
    return similarity.logsumexp(1)


@pytest.mark.parametrize("name", CASES)
def test_kernels(name: str) -> None:
    case, scale = CASES[name], 0.7
    maps = make_maps(case, case.dtype)
    found, wanted = run(case, maps, scale), expected(case, maps, scale)
    for key, value in wanted.items():
        largest = float(value.abs().max()) if value.numel() else 0.0
        limit = TOLERANCE[case.dtype] * max(1.0, largest)
        assert found[key].shape == value.shape, key
        assert torch.allclose(found[key].double(), value, rtol=0, atol=limit), key


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize(("name", "value"), [("q", math.nan), ("k", -math.inf), ("v", math.inf), ("k", 1e30)])
def test_not_finite(border: str, name: str, value: float) -> None:
    """NaN and Inf reach the pixels that the reference says, in one box and in several."""
    case = Case(F32, 4, 1, 5, (1, 10, 18), border)
    maps = make_maps(case, F32)
    maps["q"].abs_()  # against k = -Inf: weights 0
    maps[name][0, 0, 0, 17] = maps[name][0, 0, 8, 1] = value
    wanted = expected(case, maps, 1.0, F32)
    for budget in (1 << 16, 40_000):
        found = simulator.run("local_attention", make_arguments(replace(case, budget=budget), maps, 1.0))
        for key in ("output", "grad_q", "grad_k", "grad_v"):
            assert torch.allclose(found[key], wanted[key], rtol=0, atol=1e-5, equal_nan=True), key


@pytest.mark.parametrize("similarity", [-200.0, -math.inf])
def test_low_similarities(similarity: float) -> None:
    """Weights do not depend on how low all similarities are; they are NaN, as torch's, if all are -Inf."""
    case = Case(F32, 3, 1, 1, (1, 3, 3))
    maps = make_maps(case, F32)
    maps["q"].fill_(1.0)
    maps["k"].fill_(similarity)
    found = simulator.run("local_attention", make_arguments(case, maps, 1.0))
    wanted = expected(case, maps, 1.0)
    for key in ("output", "log_sum_exp", "grad_k", "grad_q")[: 2 if similarity == -math.inf else None]:
        assert torch.allclose(found[key].double(), wanted[key], rtol=1e-5, atol=1e-5, equal_nan=True), key
