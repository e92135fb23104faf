"""The CUDA kernels of sps_from_dense and sps_to_dense, run in the host simulator, against the reference."""

from __future__ import annotations

import pytest
import simulator
import torch
from torch import Tensor

from effops import SPS, reference

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
I32, I64 = torch.int32, torch.int64


def make_maps(dtype: torch.dtype, shape: tuple[int, int, int, int], channels_last: bool) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def make_sps(
    dtype: torch.dtype, id_dtype: torch.dtype, features: int, maps: int, height: int, width: int
) -> SPS:
    """A third of the cells is active; the others share passive rows, of which one has most of the cells."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(maps, height, width, generator=generator) < 0.3
    num_active, passive = int(mask.sum()), 11  # the last row has no cell
    ids = num_active + (torch.rand(mask.shape, generator=generator) ** 8 * (passive - 1)).long()
    order = torch.randperm(num_active, generator=generator)
    ids[mask] = order
    place = torch.empty(num_active, 3, dtype=I64)
    place[order] = mask.nonzero()
    roi, y, x = place.int().unbind(1)
    rows = torch.randn(num_active + passive, features, generator=generator).to(dtype)
    xy = torch.stack([x, y], 1)
    return SPS(rows[:num_active], rows[num_active:], ids.to(id_dtype), roi.contiguous(), xy)


def equal_sps(found: simulator.Results, expected: SPS) -> bool:
    names = ("active", "passive", "index_map", "roi", "xy")
    return all(torch.equal(found[name], getattr(expected, name)) for name in names)


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_from_dense(dtype: torch.dtype, channels_last: bool) -> None:
    x = make_maps(dtype, (2, 70, 5, 13), channels_last)  # two tiles of features, five of cells
    mask = torch.rand(2, 5, 13, generator=torch.Generator().manual_seed(2)) < 0.4
    arguments: dict[str, simulator.Argument] = {"x": x, "mask": mask, "wide": False}
    found = simulator.run_schedules("sps_from_dense", arguments, races=dtype == F32)
    assert equal_sps(found, reference.sps_from_dense(x, mask))


def test_from_dense_of_other_kinds() -> None:
    """Strides without a pattern, all and no cells active, no cells, an int64 map, two blocks of cells."""
    x = make_maps(F32, (1, 3, 40, 60), False)[:, ::2, 3:38, 1::2]
    mask = torch.rand(1, 35, 30, generator=torch.Generator().manual_seed(3)) < 0.4
    for some in (mask, torch.ones_like(mask), torch.zeros_like(mask)):
        found = simulator.run("sps_from_dense", {"x": x, "mask": some, "wide": False})
        assert equal_sps(found, reference.sps_from_dense(x, some))
    wide = simulator.run("sps_from_dense", {"x": x, "mask": mask, "wide": True})
    assert torch.equal(wide["index_map"], reference.sps_from_dense(x, mask).index_map.long())
    empty = simulator.run("sps_from_dense", {"x": x[..., :0], "mask": mask[..., :0], "wide": False})
    assert equal_sps(empty, reference.sps_from_dense(x[..., :0], mask[..., :0]))


@pytest.mark.parametrize(("dtype", "features"), [(F32, 70), (F64, 5), (F16, 33)])
@pytest.mark.parametrize("id_dtype", [I32, I64])
def test_to_dense(dtype: torch.dtype, features: int, id_dtype: torch.dtype) -> None:
    sps = make_sps(dtype, id_dtype, features, 2, 5, 13)
    arguments = {"active": sps.active, "passive": sps.passive, "index_map": sps.index_map}
    found = simulator.run_schedules("sps_to_dense", arguments, races=dtype == F32)
    assert torch.equal(found["output"], reference.sps_to_dense(sps))


def run_backward(sps: SPS, grad_output: Tensor, races: bool = False) -> simulator.Results:
    arguments: dict[str, simulator.Argument] = {
        "grad_output": grad_output,
        "index_map": sps.index_map,
        "roi": sps.roi,
        "xy": sps.xy,
        "passive": len(sps.passive),
    }
    return simulator.run_schedules("sps_to_dense_backward", arguments, races=races)


@pytest.mark.parametrize(
    ("dtype", "channels_last"), [(F32, False), (F32, True), (F64, False), (BF16, True), (F16, False)]
)
def test_to_dense_backward(dtype: torch.dtype, channels_last: bool) -> None:
    """Nearly all cells of the larger map belong to one passive row."""
    for features, width in ((37, 5), (3, 65)) if dtype == F32 else ((5, 7),):
        sps = make_sps(dtype, I32, features, 2, 9, width)
        sps.active.requires_grad_()
        sps.passive.requires_grad_()
        grad_output = make_maps(dtype, (2, features, 9, width), channels_last)
        reference.sps_to_dense(sps).backward(grad_output)
        found = run_backward(sps, grad_output, races=dtype == F32)
        assert sps.active.grad is not None
        assert torch.equal(found["grad_active"], sps.active.grad)
        torch.testing.assert_close(found["grad_passive"], sps.passive.grad)


def test_values_out_of_range_are_skipped() -> None:
    sps = make_sps(F32, I32, 6, 2, 5, 7)
    rows = torch.cat([sps.active, sps.passive])
    ids = sps.index_map.clone()
    ids[0, 1, 1:5] = torch.tensor([-1, len(rows), torch.iinfo(I32).min, torch.iinfo(I32).max], dtype=I32)
    known = (ids >= 0) & (ids < len(rows))
    expected = torch.where(known[..., None], rows[ids.clamp(0, len(rows) - 1).long()], 0.0).permute(
        0, 3, 1, 2
    )
    arguments = {"active": sps.active, "passive": sps.passive, "index_map": ids}
    assert torch.equal(simulator.run("sps_to_dense", arguments)["output"], expected)

    roi, xy = sps.roi.clone(), sps.xy.clone()
    roi[0], roi[1], xy[2, 0], xy[3, 0], xy[4, 1], xy[5, 1] = -1, 2, -1, 7, -(2**31), 2**31 - 1
    grad_output = make_maps(F32, (2, 6, 5, 7), False)
    found = run_backward(SPS(sps.active, sps.passive, ids, roi, xy), grad_output)
    by_cell = grad_output.permute(0, 2, 3, 1)
    assert torch.equal(found["grad_active"][:6], torch.zeros(6, 6))
    x, y = sps.xy[6:].long().unbind(1)
    assert torch.equal(found["grad_active"][6:], by_cell[sps.roi[6:].long(), y, x])
    of_passive = known & (ids >= len(sps.active))
    sums = torch.zeros(len(sps.passive), 6, dtype=F64)
    sums.index_add_(0, ids[of_passive].long() - len(sps.active), by_cell[of_passive].double())
    torch.testing.assert_close(found["grad_passive"], sums.float())
