"""The CUDA kernels of plan_mask, and the prefix sums and lists of cells of the rowconv ops, simulated."""

from __future__ import annotations

import pytest
import simulator
import torch
from torch import Tensor

F32, F64, BF16, F16, BOOL = torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool


def make_mask(dtype: torch.dtype, shape: tuple[int, int, int], density: float) -> Tensor:
    """Floating masks hold negative numbers, the smallest ones, both zeros and NaN."""
    generator = torch.Generator().manual_seed(sum(shape))
    kept = torch.rand(shape, generator=generator) < density
    if dtype == BOOL:
        return kept
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    kinds = torch.tensor([1, -2, tiny, -tiny, torch.nan, torch.inf], dtype=F64).to(dtype)
    values = kinds[torch.randint(len(kinds), shape, generator=generator)]
    zeros = torch.where(torch.rand(shape, generator=generator) < 0.5, 0.0, -0.0).to(dtype)
    return torch.where(kept, values, zeros)


def make_rows(kept: Tensor) -> Tensor:
    return torch.where(kept, kept.flatten().cumsum(0).view_as(kept) - 1, -1)


@pytest.mark.parametrize("dtype", [BOOL, F32, F64, BF16, F16])
def test_plan_mask(dtype: torch.dtype) -> None:
    mask = make_mask(dtype, (3, 13, 37), 0.4)  # three tiles of the scan, two blocks
    plan = simulator.run_schedules("plan_mask", {"mask": mask}, races=dtype == BOOL)
    positions = mask.flatten().nonzero().flatten()
    assert torch.equal(plan["positions"], positions)
    assert torch.equal(plan["exact_positions"], positions)
    assert plan["kept"].item() == len(positions)
    assert torch.equal(plan["rows"], make_rows(mask != 0))


@pytest.mark.parametrize("shape", [(0, 3, 3), (1, 1, 1), (2, 1, 5)])
def test_small_masks(shape: tuple[int, int, int]) -> None:
    for mask in (torch.ones(shape, dtype=BOOL), torch.zeros(shape, dtype=BOOL)):
        plan = simulator.run("plan_mask", {"mask": mask})
        assert torch.equal(plan["positions"], mask.flatten().nonzero().flatten())
        assert torch.equal(plan["rows"], make_rows(mask))


def nearest_by_search(rows: Tensor) -> Tensor:
    batch, height, width = rows.shape
    flat = torch.arange(height * width)
    y, x = flat // width, flat % width
    distances = (y[:, None] - y).square() + (x[:, None] - x).square()
    keys = distances * height * width + flat  # in the order of distance, then position
    result = torch.full_like(rows, -1).view(batch, -1)
    for image, found in zip(rows.view(batch, -1), result, strict=True):
        kept = (image >= 0).nonzero().flatten()
        if len(kept):
            found.copy_(image[kept[keys[:, kept].argmin(1)]])
    return result.view_as(rows)


@pytest.mark.parametrize(
    ("shape", "density"), [((2, 9, 20), 0.3), ((3, 17, 12), 0.03), ((2, 1, 7), 0.3), ((1, 8, 1), 0.3)]
)
def test_nearest_rows(shape: tuple[int, int, int], density: float) -> None:
    mask = make_mask(BOOL, shape, density)
    mask[0, 0, 0] = True
    mask[-1] &= shape[0] == 1  # an image without kept positions
    rows = make_rows(mask)
    nearest = simulator.run_schedules("nearest_rows", {"rows": rows})["nearest"]
    assert torch.equal(nearest, nearest_by_search(rows))


def test_nearest_rows_chooses_the_lowest_position() -> None:
    """The centre has the same distance to all kept positions."""
    kept = torch.zeros(1, 11, 11, dtype=BOOL)
    for dy, dx in ((5, 0), (4, 3), (3, 4), (0, 5)):
        for sy, sx in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
            kept[0, 5 + sy * dy, 5 + sx * dx] = True
    places = kept.flatten().nonzero().flatten()
    for first in range(len(places)):
        some = torch.zeros_like(kept)
        some.view(-1)[places[first:]] = True
        rows = make_rows(some)
        nearest = simulator.run("nearest_rows", {"rows": rows})["nearest"]
        assert torch.equal(nearest, nearest_by_search(rows))
        assert nearest[0, 5, 5] == 0


@pytest.mark.parametrize(
    ("items", "max_blocks"), [(0, 3), (1, 3), (1024, 3), (1025, 3), (5000, 3), (2500, 1)]
)
def test_scan(items: int, max_blocks: int) -> None:
    generator = torch.Generator().manual_seed(items)
    counts = torch.randint(-(2**30), 2**31 - 1, (items,), generator=generator)
    expected = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    for dtype in (torch.int32, torch.int64):
        arguments: dict[str, simulator.Argument] = {"counts": counts.to(dtype), "max_blocks": max_blocks}
        offsets = simulator.run_schedules("scan_offsets", arguments, races=items == 5000)["offsets"]
        assert torch.equal(offsets, expected)


def check_buckets(ids: Tensor, first_id: int, buckets: int) -> None:
    arguments: dict[str, simulator.Argument] = {"map": ids, "first_id": first_id, "buckets": buckets}
    found = simulator.run_schedules("cell_buckets", arguments)
    lists = [(ids == first_id + b).nonzero().flatten() for b in range(buckets)]
    offsets = torch.tensor([0] + [len(cells) for cells in lists]).cumsum(0)
    assert torch.equal(found["offsets"], offsets)
    assert torch.equal(found["cells"][: offsets[-1]], torch.cat(lists))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_cell_buckets(dtype: torch.dtype) -> None:
    ids = torch.randint(-2, 30, (600,), generator=torch.Generator().manual_seed(0)).to(dtype)
    ids[7] = torch.iinfo(dtype).min
    ids[11] = torch.iinfo(dtype).max
    check_buckets(ids, 5, 20)


def test_long_cell_buckets() -> None:
    """Buckets that blocks sort, around the limit and beyond, and short ones between."""
    ids = torch.full((2000,), 3)
    ids[::3] = 5
    ids[torch.arange(0, 2000, 7)[:60]] = 4
    ids[-1023:-512] = 6
    ids[-512:] = 7
    check_buckets(ids, 3, 19)
