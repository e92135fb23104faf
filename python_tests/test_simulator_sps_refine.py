"""The CUDA kernels of sps_refine, run in the host simulator, against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import simulator
import torch
from torch import Tensor

from effops import SPS, reference

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
I32, I64 = torch.int32, torch.int64
NAMES = ("active", "passive", "index_map", "roi", "xy")


def make_sps(dtype: torch.dtype, features: int, id_dtype: torch.dtype = I32) -> SPS:
    """Rows in no order, passive rows of several cells."""
    generator = torch.Generator().manual_seed(features)
    mask = torch.rand(2, 7, 11, generator=generator) < 0.5
    num_active, num_passive = int(mask.sum()), 9
    ids = torch.randint(num_active, num_active + num_passive, mask.shape, generator=generator)
    order = torch.randperm(num_active, generator=generator)
    ids[mask] = order
    place = torch.empty(num_active, 3, dtype=I64)
    place[order] = mask.nonzero()
    roi, y, x = place.int().unbind(1)
    rows = torch.randn(num_active + num_passive, features, generator=generator).to(dtype)
    xy = torch.stack([x, y], 1)
    return SPS(rows[:num_active].clone(), rows[num_active:].clone(), ids.to(id_dtype), roi.contiguous(), xy)


def make_scores(count: int, dtype: torch.dtype, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(count, generator=generator, dtype=F64)
    if kind == "few":
        scores = torch.randint(-2, 3, (count,), generator=generator) * 0.5
        scores[::5] *= -1  # both zeros
    elif kind == "special":
        scores[::3], scores[1::5], scores[2::5] = torch.nan, torch.inf, -torch.inf
        scores[4::7] = -torch.nan
    elif kind == "close":
        scores = 1 + torch.finfo(dtype).eps * torch.randint(40, (count,), generator=generator)
    return scores.to(dtype)


def arguments_of(sps: SPS, scores: Tensor, num_refine: int, upsample: bool) -> dict[str, simulator.Argument]:
    tensors = {name: getattr(sps, name) for name in NAMES}
    return {**tensors, "scores": scores, "num_refine": num_refine, "upsample": upsample, "wide": False}


def check(sps: SPS, scores: Tensor, num_refine: int, upsample: bool, schedules: bool = True) -> None:
    arguments = arguments_of(sps, scores, num_refine, upsample)
    run = simulator.run_schedules if schedules else simulator.run
    found = run("sps_refine", arguments)
    expected = reference.sps_refine(sps, scores, num_refine, upsample)
    for name in NAMES:
        assert torch.equal(found[name], getattr(expected, name)), name


@pytest.mark.parametrize("upsample", [True, False])
@pytest.mark.parametrize(("dtype", "features"), [(F32, 8), (BF16, 5), (F64, 3)])
def test_refine(dtype: torch.dtype, features: int, upsample: bool) -> None:
    sps = make_sps(dtype, features, I64 if dtype == F64 else I32)
    num_active = len(sps.active)
    check(sps, make_scores(num_active, F32, "ordinary"), num_active // 3, upsample)
    for num_refine in (0, 1, num_active - 1, num_active, 10**9):
        check(sps, make_scores(num_active, F32, "few"), num_refine, upsample, schedules=False)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("kind", ["ordinary", "few", "special", "close"])
def test_scores(dtype: torch.dtype, kind: str) -> None:
    sps = make_sps(F32, 1)
    scores = make_scores(len(sps.active), dtype, kind)
    for num_refine in (7, 20, len(scores) // 2, len(scores) - 5):
        check(sps, scores, num_refine, False, schedules=False)


def test_many_rows() -> None:
    """More than one block of the scan, with rows that have no cell."""
    rows = 2100
    sps = make_sps(F32, 1)
    extra = torch.zeros(rows - len(sps.active), 1)
    ids = torch.where(sps.index_map < len(sps.active), sps.index_map, sps.index_map + len(extra))
    roi = torch.zeros(rows, dtype=I32)
    roi[: len(sps.active)] = sps.roi
    xy = torch.zeros(rows, 2, dtype=I32)
    xy[: len(sps.active)] = sps.xy
    sps = SPS(torch.cat([sps.active, extra]), sps.passive, ids, roi, xy)
    check(sps, make_scores(rows, F32, "few"), 1000, True)


def test_empty() -> None:
    sps = make_sps(F32, 4)
    none = torch.zeros(0, dtype=I32)
    passive = replace(
        sps,
        active=sps.active[:0],
        index_map=sps.index_map % len(sps.passive),
        roi=none,
        xy=none.view(0, 1).expand(0, 2),
    )
    check(passive, torch.zeros(0), 3, True, schedules=False)
    no_features = replace(sps, active=sps.active[:, :0], passive=sps.passive[:, :0])
    check(no_features, make_scores(len(sps.active), F32, "ordinary"), 5, True, schedules=False)
    no_maps = SPS(sps.active[:0], sps.passive, sps.index_map[:0], none, passive.xy)
    check(no_maps, torch.zeros(0), 1, True, schedules=False)


def test_wide_map_and_ids_out_of_range() -> None:
    sps = make_sps(F32, 2)
    scores = make_scores(len(sps.active), F32, "ordinary")
    scores[:2] = 9.0  # kept, with cells far outside below
    expected = reference.sps_refine(sps, scores, 10).index_map
    found = simulator.run("sps_refine", {**arguments_of(sps, scores, 10, True), "wide": True})
    assert torch.equal(found["index_map"], expected.long())

    bad = torch.tensor([-1, len(sps.active) + len(sps.passive), -(2**31), 2**31 - 1], dtype=I32)
    ids, xy = sps.index_map.clone(), sps.xy.clone()
    ids[1, 3, :4] = bad
    xy[0], xy[1] = 2**31 - 1, -(2**31)
    expected[1, 6:8, :8] = -1
    found = simulator.run("sps_refine", arguments_of(replace(sps, index_map=ids, xy=xy), scores, 10, True))
    assert torch.equal(found["index_map"], expected)


@pytest.mark.parametrize("upsample", [True, False])
@pytest.mark.parametrize(("dtype", "features"), [(F32, 8), (F32, 3), (F64, 2), (BF16, 72), (F16, 5)])
def test_backward(dtype: torch.dtype, features: int, upsample: bool) -> None:
    sps = make_sps(dtype, features)
    scores = make_scores(len(sps.active), F32, "few")
    new_ids = simulator.run("sps_refine", arguments_of(sps, scores, 15, upsample))["new_ids"]
    sps.active.requires_grad_()
    sps.passive.requires_grad_()
    new = reference.sps_refine(sps, scores, 15, upsample)
    grads = [torch.randn_like(new.active), torch.randn_like(new.passive)]
    torch.autograd.backward([new.active, new.passive], grads)
    arguments: dict[str, simulator.Argument] = {
        "grad_active": grads[0],
        "grad_passive": grads[1],
        "new_ids": new_ids,
        "passive": len(sps.passive),
        "upsample": upsample,
    }
    found = simulator.run_schedules("sps_refine_backward", arguments, races=features == 8)
    assert sps.active.grad is not None
    assert sps.passive.grad is not None
    torch.testing.assert_close(found["active"], sps.active.grad)
    assert torch.equal(found["passive"], sps.passive.grad)

    ids = new_ids.clone()
    end = len(new.active) + len(new.passive)
    ids[:4] = torch.tensor([-1, end, 2**63 - 1, -(2**63)])
    found = simulator.run("sps_refine_backward", {**arguments, "new_ids": ids})
    assert torch.equal(found["active"][:4], torch.zeros(4, features, dtype=dtype))
    torch.testing.assert_close(found["active"][4:], sps.active.grad[4:])
