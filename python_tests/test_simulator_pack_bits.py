"""The CUDA kernels of pack_bits and unpack_bits, run in the host simulator, against the reference."""

from __future__ import annotations

import pytest
import simulator
import torch
from torch import Tensor

from effops import reference

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LENGTHS = (1, 31, 32, 33, 64, 65, 256, 1000, 2500)


def make_rows(dtype: torch.dtype, rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(rows, length, generator=generator)
    if not dtype.is_floating_point:
        return ((x > 0) * 200).to(dtype)
    x[:, ::7] = torch.tensor([0.0, -0.0, torch.nan])[torch.arange(x[:, ::7].shape[1]) % 3]
    x[:, 1::9] = torch.inf
    x[:, 2::9] = -torch.inf
    return x.to(dtype)


@pytest.mark.parametrize("length", LENGTHS)
def test_pack_lengths(length: int) -> None:
    x = make_rows(torch.float32, 3, length)
    packed = simulator.run_schedules("pack_bits", {"x": x})["output"]
    assert torch.equal(packed, reference.pack_bits(x))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, *FLOATS])
def test_pack_dtypes(dtype: torch.dtype) -> None:
    """More words than two blocks take in one turn."""
    x = make_rows(dtype, 37, 250)
    packed = simulator.run_schedules("pack_bits", {"x": x})["output"]
    assert torch.equal(packed, reference.pack_bits(x))


def test_pack_the_smallest_numbers() -> None:
    x = torch.tensor([[5e-324, -5e-324]], dtype=torch.float64)
    assert simulator.run("pack_bits", {"x": x})["output"].item() == 1


@pytest.mark.parametrize("length", LENGTHS)
def test_unpack_lengths(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    packed = torch.randint(256, (3, (length + 63) // 64 * 8), generator=generator, dtype=torch.uint8)
    bits = simulator.run_schedules("unpack_bits", {"packed": packed, "num_bits": length})["output"]
    assert torch.equal(bits, reference.unpack_bits(packed, length))


@pytest.mark.parametrize(("rows", "bytes_per_row", "num_bits"), [(400, 5, 40), (400, 5, 37), (2, 5, 3)])
def test_unpack_bytes(rows: int, bytes_per_row: int, num_bits: int) -> None:
    """Rows of any number of bytes, more than two blocks take in one turn."""
    generator = torch.Generator().manual_seed(rows)
    packed = torch.randint(256, (rows, bytes_per_row), generator=generator, dtype=torch.uint8)
    bits = simulator.run_schedules("unpack_bits", {"packed": packed, "num_bits": num_bits})["output"]
    assert torch.equal(bits, reference.unpack_bits(packed, num_bits))
