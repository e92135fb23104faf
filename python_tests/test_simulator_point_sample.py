"""The CUDA kernels of point_sample, run in the host simulator, against the reference in float64."""

from __future__ import annotations

import pytest
import simulator
import torch
from torch import Tensor

from effops import reference

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# Relative to the largest element: rounding of the result, and of float32 coordinates before a difference.
TOLERANCE = {F32: 2e-5, F64: 1e-12, BF16: 8e-3, F16: 2e-3}
OUTSIDE = ((-1, 0), (0, -1), (2, 0), (0, 3), (2**40, 0), (0, -(2**62)))  # (batch, level) that CUDA skips


def make_maps(dtype: torch.dtype, channels: int, layout: str, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(channels)
    maps = []
    for height, width in ((5, 7), (1, 9), (3, 2)):
        feature = torch.randn(batch, channels, height, width, generator=generator, dtype=F64).to(dtype)
        if layout == "channels_last":
            feature = feature.contiguous(memory_format=torch.channels_last)
        elif layout == "sliced":
            larger = torch.full((batch, channels, 2 * height, 2 * width + 1), torch.nan, dtype=dtype)
            feature = larger[:, :, ::2, 1::2].copy_(feature)
        maps.append(feature)
    return maps


def make_points(dtype: torch.dtype, points: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(points)
    xy = torch.rand(points, 2, generator=generator, dtype=F64) * 1.6 - 0.3
    xy[::11, 0] = torch.nan
    xy[5::17, 1] = torch.inf
    return {
        "batch": torch.randint(2, (points,), generator=generator),
        "level": torch.randint(3, (points,), generator=generator),
        "xy": xy.to(dtype),
    }


def expected(maps: list[Tensor], points: dict[str, Tensor], grad_output: Tensor) -> dict[str, Tensor]:
    leaves = [feature.double().requires_grad_() for feature in maps]
    xy = points["xy"].double().requires_grad_()
    output = reference.point_sample(leaves, points["batch"], points["level"], xy)
    *grad_maps, grad_xy = torch.autograd.grad(output, [*leaves, xy], grad_output.double())
    return {"output": output.detach(), "grad_xy": grad_xy} | {
        f"grad_map{i}": gradient for i, gradient in enumerate(grad_maps)
    }


def assert_close(name: str, found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    limit = TOLERANCE[dtype] * max(1.0, float(wanted.abs().max()))
    assert torch.allclose(found.double(), wanted, rtol=0, atol=limit), name


def run(maps: list[Tensor], arguments: dict[str, Tensor], vectors: bool) -> list[simulator.Results]:
    named = {f"map{i}": feature for i, feature in enumerate(maps)}
    return simulator.run_all("point_sample", {**named, **arguments, "vectors": vectors})


def check(
    results: list[simulator.Results], wanted: dict[str, Tensor], dtype: torch.dtype, xy: torch.dtype
) -> None:
    for result in results:
        assert_close("output", result["output"], wanted["output"], dtype)
        for i in range(3):
            for kind in ("both_", "map_", "deterministic_"):
                assert_close(kind, result[f"{kind}grad_map{i}"], wanted[f"grad_map{i}"], dtype)
            name = f"deterministic_grad_map{i}"
            assert torch.equal(result[name], results[0][name])
        for kind in ("both_", "xy_"):
            assert_close(kind, result[f"{kind}grad_xy"], wanted["grad_xy"], xy if dtype == F64 else dtype)


@pytest.mark.parametrize(
    ("dtype", "channels", "points", "layout", "xy_dtype"),
    [
        (F32, 1, 70, "contiguous", F32),
        (F32, 3, 45, "sliced", F32),
        (F32, 8, 20, "channels_last", F32),
        (F32, 40, 9, "contiguous", F32),
        (F32, 68, 7, "channels_last", F32),
        (F64, 6, 12, "channels_last", F64),
        (F64, 33, 5, "contiguous", F32),
        (BF16, 16, 17, "channels_last", F32),
        (F16, 5, 13, "contiguous", F16),
    ],
)
def test_kernels(dtype: torch.dtype, channels: int, points: int, layout: str, xy_dtype: torch.dtype) -> None:
    maps, at = make_maps(dtype, channels, layout), make_points(xy_dtype, points)
    generator = torch.Generator().manual_seed(7)
    grad_output = torch.randn(points, channels, generator=generator, dtype=F64).to(dtype)
    vectors = layout == "channels_last"
    results = run(maps, {**at, "grad_output": grad_output}, vectors)
    check(results, expected(maps, at, grad_output), dtype, xy_dtype)


def test_ids_out_of_range_are_skipped() -> None:
    """They read nothing, give 0 and get gradient 0."""
    maps, at = make_maps(F32, 3, "contiguous"), make_points(F32, 12)
    grad_output = torch.ones(12, 3)
    wanted = expected(maps, at, grad_output)
    extra = len(OUTSIDE)
    more = {
        "batch": torch.cat([at["batch"], torch.tensor([batch for batch, _ in OUTSIDE])]),
        "level": torch.cat([at["level"], torch.tensor([level for _, level in OUTSIDE])]),
        "xy": torch.cat([at["xy"], torch.full((extra, 2), 0.5)]),
        "grad_output": torch.ones(12 + extra, 3),
    }
    wanted["output"] = torch.cat([wanted["output"], torch.zeros(extra, 3)])
    wanted["grad_xy"] = torch.cat([wanted["grad_xy"], torch.zeros(extra, 2)])
    check(run(maps, more, False), wanted, F32, F32)


def test_infinite_pixel_beside_a_border_corner() -> None:
    """A corner outside the map is not read, not weighted by 0."""
    feature = torch.full((1, 1, 1, 1), torch.inf)
    zero = torch.zeros(1, dtype=torch.int64)
    at = {"batch": zero, "level": zero, "xy": torch.tensor([[0.5, 0.5]]), "grad_output": torch.ones(1, 1)}
    for result in run([feature], at, False):
        assert result["output"].item() == torch.inf
        assert result["both_grad_map0"].item() == 1.0
