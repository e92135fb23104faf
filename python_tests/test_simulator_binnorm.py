"""The CUDA kernels of binnorm, run in the host simulator, against the definition in float64."""

from __future__ import annotations

import pytest
import simulator
import torch
from torch import Tensor

from effops import reference

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
LENGTHS = (1, 31, 32, 33, 64, 65, 256, 1000, 2500)
TOLERANCE = {F32: 1e-6, F64: 1e-12, BF16: 4e-3, F16: 5e-4}  # of numbers up to 1


def make_rows(dtype: torch.dtype, length: int) -> Tensor:
    """One row of each kind: ordinary, saturated, equal, large, with NaN or infinities."""
    generator = torch.Generator().manual_seed(length)

    def normal() -> Tensor:
        return torch.randn(length, generator=generator, dtype=F64)

    with_nan, high, low, both = normal(), normal(), normal(), normal()
    with_nan[-1] = torch.nan
    high[0], low[-1] = torch.inf, -torch.inf
    both[::5], both[1::2] = torch.inf, -torch.inf
    rows = [
        normal(),
        20 * normal(),
        1e4 * normal().clamp(-3, 3),
        normal() + 1e4,
        torch.randint(-1, 2, (length,), generator=generator) * 30,
        torch.randint(-1, 2, (length,), generator=generator) * 1e4,
        torch.full((length,), -7.0),
        high,
        low,
        both,
        with_nan,
        torch.full((length,), torch.inf),
        torch.full((length,), -torch.inf),
    ]
    return torch.stack([row.double() for row in rows]).to(dtype)


def check(x: Tensor, k: int) -> None:
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(x.shape, generator=generator, dtype=F64).to(x.dtype)
    result = simulator.run_schedules("binnorm", {"x": x, "k": k, "grad_output": grad})
    tolerance = TOLERANCE[x.dtype]
    wanted = reference.binnorm(x.double(), k)
    assert torch.allclose(result["output"].double(), wanted, rtol=0, atol=tolerance, equal_nan=True)
    y, g = result["output"].double(), grad.double()
    h = y * (1 - y)
    total = h.sum(-1, keepdim=True)
    gradient = torch.where(total == 0, 0.0, h * (g - (h * g).sum(-1, keepdim=True) / total))
    assert torch.allclose(result["grad_x"].double(), gradient, rtol=0, atol=2 * tolerance, equal_nan=True)


@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(length: int) -> None:
    x = make_rows(F32, length)
    for k in sorted({1, length // 4, length - 1}):
        check(x, k)


@pytest.mark.parametrize("length", [33, 1000, 1100])
def test_all_or_none(length: int) -> None:
    x = make_rows(F32, length)
    check(x, 0)
    check(x, length)


@pytest.mark.parametrize("dtype", [F64, BF16, F16])
@pytest.mark.parametrize("length", [65, 256, 1000, 1100])
def test_dtypes(dtype: torch.dtype, length: int) -> None:
    check(make_rows(dtype, length), length // 4)


def test_equal_elements_share_the_rest() -> None:
    """However large: the shift lies between the numbers of float64."""
    x = torch.tensor([[1e30, 1e30, 1e30, 5.0], [-1e38, 1e38, 1e38, 1e38], [3e38, 0.0, 0.0, -3e38]])
    grad = torch.ones_like(x)
    output = simulator.run_schedules("binnorm", {"x": x, "k": 2, "grad_output": grad})["output"]
    share = 2 / 3
    wanted = torch.tensor([[share, share, share, 0], [0, share, share, share], [1, 0.5, 0.5, 0]])
    assert torch.allclose(output, wanted, rtol=0, atol=1e-6)


def test_infinite_gradients_follow_the_formula() -> None:
    """And a row without a slope has gradient 0 whatever arrives."""
    x = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1e4, -1e4, -2e4]])
    grad = torch.tensor([[torch.inf, 0, 0], [torch.nan, 1, 1], [torch.inf, torch.nan, 1]])
    result = simulator.run_schedules("binnorm", {"x": x, "k": 1, "grad_output": grad})["grad_x"]
    assert result[0, 0].isnan()
    assert bool((result[0, 1:] == -torch.inf).all())
    assert bool(result[1].isnan().all())
    assert bool((result[2] == 0).all())
