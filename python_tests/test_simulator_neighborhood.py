"""The CUDA kernels of neighborhood_dot and neighborhood_mix, run in the host simulator, against reference."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import simulator
import torch
from torch import Tensor

from effops import reference

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
TOLERANCE = {F32: 2e-5, F64: 1e-12, BF16: 8e-3, F16: 2e-3}  # relative to the largest element


@dataclass(frozen=True)
class Case:
    """One shape and one set of options."""

    dtype: torch.dtype
    window: int
    channels: int
    sides: tuple[int, int, int]  # N, H, W
    dilation: int = 1
    budget: int = 1 << 16  # of shared memory; a small one makes several boxes of taps
    channels_last: bool = False
    nonfinite: bool = False


CASES = {
    "odd_channels": Case(F32, 3, 33, (2, 9, 17)),
    "even_window": Case(F64, 4, 5, (1, 9, 7), budget=40_000),
    "dilation": Case(BF16, 5, 7, (1, 21, 35), dilation=2, budget=1 << 17),
    "large_dilation": Case(F32, 3, 2, (1, 4, 5), dilation=7),
    "boxes": Case(F32, 7, 3, (1, 10, 18), budget=28_000),
    "larger_than_image": Case(F16, 9, 6, (2, 3, 2)),
    "channels_last": Case(F16, 2, 8, (1, 8, 16), channels_last=True),
    "odd_channels_last": Case(F64, 3, 6, (1, 3, 4), channels_last=True),
    "one_pixel": Case(BF16, 1, 1, (1, 1, 1)),
    "no_channels": Case(F32, 3, 0, (1, 3, 4)),
    "nonfinite": Case(F32, 3, 5, (1, 10, 18), nonfinite=True),
}


def make_maps(case: Case) -> dict[str, Tensor]:
    batch, height, width = case.sides
    generator = torch.Generator().manual_seed(case.window)
    maps = {}
    for name, channels in {"q": case.channels, "k": case.channels, "weights": case.window**2}.items():
        tensor = torch.randn(batch, channels, height, width, generator=generator, dtype=F64)
        if case.nonfinite:
            flat = tensor.view(-1)
            flat[3 :: 2 * height * width + 7] = torch.nan
            flat[:: 3 * height * width + 5] = torch.inf
        layout = torch.channels_last if case.channels_last else torch.contiguous_format
        maps[name] = tensor.to(case.dtype).contiguous(memory_format=layout)
    return maps


def gathered(weights: Tensor, q: Tensor, window: int, dilation: int) -> Tensor:
    """The gradient of neighborhood_mix by v where the output's is q.

    By shifting: autograd would multiply what lies outside.
    """
    _, _, height, width = q.shape
    out = torch.zeros_like(q)
    for tap in range(window * window):
        dy, dx = ((i - window // 2) * dilation for i in divmod(tap, window))
        rows = slice(max(0, dy), min(height, height + dy)), slice(max(0, -dy), min(height, height - dy))
        columns = slice(max(0, dx), min(width, width + dx)), slice(max(0, -dx), min(width, width - dx))
        if rows[0].start >= rows[0].stop or columns[0].start >= columns[0].stop:
            continue
        product = weights[:, tap : tap + 1] * q
        out[:, :, rows[0], columns[0]] += product[:, :, rows[1], columns[1]]
    return out


@pytest.mark.parametrize("name", CASES)
def test_kernels(name: str) -> None:
    case = CASES[name]
    maps = make_maps(case)
    arguments: dict[str, simulator.Argument] = {
        **maps,
        "window": case.window,
        "dilation": case.dilation,
        "budget": case.budget,
        "channels_last": case.channels_last,
    }
    q, k, weights = (maps[key].double() for key in ("q", "k", "weights"))
    wanted = {
        "dots": reference.neighborhood_dot(q, k, case.window, case.dilation),
        "sums": reference.neighborhood_mix(weights, k, case.dilation),
        "transposed": gathered(weights, q, case.window, case.dilation),
    }
    if case.nonfinite:  # the builds differ in the signs of NaN
        runs = simulator.run_all("neighborhood", arguments)
    else:
        runs = [simulator.run_schedules("neighborhood", arguments)]
    for found in runs:
        for key, value in wanted.items():
            result = found[key].permute(0, 3, 1, 2) if case.channels_last else found[key]
            largest = float(value.nan_to_num(0.0, 0.0, 0.0).abs().max()) if value.numel() else 0.0
            limit = TOLERANCE[case.dtype] * max(1.0, largest)
            assert torch.allclose(result.double(), value, rtol=0, atol=limit, equal_nan=True), key


def test_transpose_is_the_gradient() -> None:
    """What the other test compares with, against autograd."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(1, 16, 5, 6, generator=generator, dtype=F64)
    q = torch.randn(1, 2, 5, 6, generator=generator, dtype=F64)
    v = q.clone().requires_grad_()
    (grad,) = torch.autograd.grad(reference.neighborhood_mix(weights, v, 2), v, q)
    assert torch.allclose(gathered(weights, q, 4, 2), grad)
