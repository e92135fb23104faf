"""The CUDA kernels of topk_pack, run in the host simulator, against the reference."""

from __future__ import annotations

import pytest
import simulator
import torch
from torch import Tensor

from effops import reference

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
LENGTHS = (1, 31, 32, 33, 64, 65, 256, 1000, 2500)


def make_rows(dtype: torch.dtype, length: int) -> Tensor:
    """One row of each kind: ordinary, few values, equal, NaN, infinities, many magnitudes, the ends."""
    generator = torch.Generator().manual_seed(length)

    def normal() -> Tensor:
        return torch.randn(length, generator=generator, dtype=F64)

    with_nan, with_inf, signed_zeros, mixed = normal(), normal(), torch.zeros(length), normal()
    with_nan[::3] = torch.nan
    with_inf[::3], with_inf[1::4] = torch.inf, -torch.inf
    signed_zeros[::2] = -0.0
    mixed[::2], mixed[1::4], mixed[3::8] = torch.nan, torch.inf, -torch.inf
    ends = torch.full((length,), torch.finfo(dtype).max, dtype=F64)
    ends[::2] *= -1
    rows = [
        normal(),
        torch.randint(3, (length,), generator=generator),
        signed_zeros,
        with_nan,
        with_inf,
        mixed,
        torch.full((length,), torch.nan),
        torch.full((length,), torch.inf),
        torch.full((length,), -torch.inf),
        normal().exp().pow(8) * normal().sign(),
        normal() * torch.finfo(dtype).tiny,
        ends,
    ]
    return torch.stack([row.double() for row in rows]).to(dtype)


def check(x: Tensor, k: int) -> None:
    packed = simulator.run_schedules("topk_pack", {"x": x, "k": k})["output"]
    assert torch.equal(packed, reference.topk_pack(x, k))


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


@pytest.mark.parametrize("length", [40, 1200])
def test_every_k(length: int) -> None:
    """Ties of two values: the threshold lies in every place."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(2, (2, length), generator=generator).float()
    for k in range(0, length + 1, max(1, length // 12)):
        packed = simulator.run("topk_pack", {"x": x, "k": k})["output"]
        assert torch.equal(packed, reference.topk_pack(x, k)), k
