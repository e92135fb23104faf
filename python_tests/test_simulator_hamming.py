"""The CUDA kernels of the Hamming ops, run in the host simulator, against all pairs in plain PyTorch."""

from __future__ import annotations

import math

import pytest
import simulator
import torch
from torch import Tensor

MISSING = (2**31 - 1, -1)
Tensors = dict[str, Tensor]
Numbers = dict[str, simulator.Argument]


def make_sets(batch: int, rows_a: int, rows_b: int, width: int, ties: bool = False) -> Tensors:
    """Rows of b are noisy rows of a; with ties there are few different rows."""
    generator = torch.Generator().manual_seed(rows_a + width)
    kinds = 5 if ties else max(rows_a, 1)
    pool = torch.randint(256, (batch, kinds, width), generator=generator, dtype=torch.uint8)
    noise = torch.randint(256, (batch, rows_b, width), generator=generator, dtype=torch.uint8)
    noise &= torch.randint(256, (batch, rows_b, width), generator=generator, dtype=torch.uint8)
    a = pool[:, torch.randint(kinds, (rows_a,), generator=generator)]
    b = pool[:, torch.randint(kinds, (rows_b,), generator=generator)]
    return {"a": a, "b": b if ties else b ^ noise}


def all_distances(a: Tensor, b: Tensor) -> Tensor:
    ones = torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.int32)
    return ones[(a[:, :, None] ^ b[:, None]).long()].sum(-1, dtype=torch.int32)


def allowed_pairs(tensors: Tensors, shape: torch.Size) -> Tensor:
    allowed = torch.ones(shape, dtype=torch.bool)
    if "mask" in tensors:
        allowed &= tensors["mask"]
    for name, dim in (("lengths_a", 1), ("lengths_b", 2)):
        if name in tensors:
            index = torch.arange(shape[dim])
            exists = index < tensors[name][:, None]
            allowed &= exists[:, :, None] if dim == 1 else exists[:, None, :]
    return allowed


def expected_neighbours(tensors: Tensors, k: int, mutual: bool) -> tuple[Tensor, Tensor]:
    distances = all_distances(tensors["a"], tensors["b"])
    batch, rows_a, rows_b = distances.shape
    allowed = allowed_pairs(tensors, distances.shape)
    distances = torch.where(allowed, distances, MISSING[0])
    found = torch.full((batch, rows_a, k), MISSING[0], dtype=torch.int32)
    indices = torch.full((batch, rows_a, k), MISSING[1])
    values, order = distances.sort(dim=2, stable=True)
    taken = min(k, rows_b)
    found[:, :, :taken] = values[:, :, :taken]
    indices[:, :, :taken] = torch.where(values == MISSING[0], MISSING[1], order)[:, :, :taken]
    if mutual and k and rows_b and rows_a:
        nearest_a = distances.sort(dim=1, stable=True).indices[:, 0]
        back = nearest_a.gather(1, indices[:, :, 0].clamp(min=0))
        drop = (back != torch.arange(rows_a)) | (indices[:, :, 0] < 0)
        found[drop], indices[drop] = MISSING[0], MISSING[1]
    return found, indices


def make_mask(shape: tuple[int, ...]) -> Tensor:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.3
    mask[:, ::7] = False  # rows without any neighbour
    return mask


SETS = {
    # name: batch, rows of a, rows of b, bytes, alignment, blocks at a time, equal rows
    "byte": (1, 130, 37, 1, 1, 1, True),
    "odd": (2, 9, 150, 5, 1, 3, False),
    "orb": (1, 140, 270, 32, 16, 3, False),
    "ties": (1, 20, 300, 32, 4, 5, True),
    "brief": (1, 40, 140, 33, 1, 2, False),
    "brisk": (1, 17, 260, 64, 16, 3, False),
    "wide": (1, 5, 20, 512, 4, 2, False),
    "no_bits": (1, 3, 4, 0, 16, 1, False),
}


def make_case(name: str) -> tuple[Tensors, Numbers]:
    batch, rows_a, rows_b, width, alignment, slots, ties = SETS[name]
    numbers: Numbers = {"alignment": alignment, "slots": slots, "select_slots": slots}
    return make_sets(batch, rows_a, rows_b, width, ties), numbers


@pytest.mark.parametrize("name", SETS)
def test_distance(name: str) -> None:
    tensors, numbers = make_case(name)
    result = simulator.run_schedules("hamming_distance", {**tensors, **numbers})
    wanted = all_distances(tensors["a"], tensors["b"])
    assert torch.equal(result["scalar"], wanted)
    assert torch.equal(result["tensor"], wanted)


def check_nearest(tensors: Tensors, numbers: Numbers, mutual: bool) -> None:
    result = simulator.run_schedules("hamming_nearest", {**tensors, **numbers, "mutual": mutual})
    for k in (1, 2):
        distances, indices = expected_neighbours(tensors, k, mutual)
        for counter in ("scalar_", "tensor_"):
            assert torch.equal(result[f"{counter}distances{k}"], distances)
            assert torch.equal(result[f"{counter}indices{k}"], indices)


def check_select(tensors: Tensors, numbers: Numbers, mutual: bool, *neighbours: int) -> None:
    arguments: Numbers = {**tensors, **numbers, "mutual": mutual, "k": neighbours}
    result = simulator.run_schedules("hamming_select", arguments)
    for k in neighbours:
        distances, indices = expected_neighbours(tensors, k, mutual)
        assert torch.equal(result[f"distances{k}"], distances)
        assert torch.equal(result[f"indices{k}"], indices)


@pytest.mark.parametrize("name", ["odd", "ties", "brisk"])
def test_nearest(name: str) -> None:
    check_nearest(*make_case(name), mutual=False)


@pytest.mark.parametrize("name", SETS)
def test_mutual(name: str) -> None:
    check_nearest(*make_case(name), mutual=True)


@pytest.mark.parametrize("name", SETS)
def test_select(name: str) -> None:
    check_select(*make_case(name), name in ("odd", "ties"), 10, SETS[name][2] + 2)


def test_select_splits_the_columns() -> None:
    check_select(make_sets(1, 11, 2100, 5), {"alignment": 1, "slots": 2, "select_slots": 6}, False, 7, 2103)


@pytest.mark.parametrize("shared", [False, True])
def test_lengths_and_mask(shared: bool) -> None:
    """Lengths outside of [0, N] are clamped."""
    batch, rows_a, rows_b = 3, 35, 150
    numbers: Numbers = {"alignment": 4, "slots": 9, "select_slots": 1}
    tensors = make_sets(batch, rows_a, rows_b, 8)
    tensors["lengths_a"] = torch.tensor([99, 20, 0])
    tensors["lengths_b"] = torch.tensor([140, -3, 1000])
    check_nearest(tensors, numbers, shared)
    tensors["mask"] = make_mask((1 if shared else batch, rows_a, rows_b))
    tensors["b"][:, :40] = 0  # nothing in their keys but the index
    check_nearest(tensors, numbers, shared)
    check_select(tensors, numbers, shared, 4, 60)


def test_no_neighbours() -> None:
    tensors, numbers = make_sets(2, 3, 0, 4), {"alignment": 4, "slots": 2, "select_slots": 2}
    check_nearest(tensors, {**numbers}, True)
    check_select(tensors, {**numbers}, True, 3)


@pytest.mark.parametrize(
    # 600 rows: blocks own two steps of 256 rows, and one.
    ("rows_a", "mutual", "ratio", "max_distance", "masked"),
    [
        (1, True, None, None, False),
        (600, True, None, None, False),
        (300, False, 0.8, None, False),
        (300, True, 0.9, 60, True),
        (20, False, None, 0, True),
    ],
)
def test_match(
    rows_a: int, mutual: bool, ratio: float | None, max_distance: int | None, masked: bool
) -> None:
    tensors = make_sets(1, rows_a, 200, 32)
    if masked:
        tensors["mask"] = make_mask((1, rows_a, 200))
    distances, _ = expected_neighbours(tensors, 2, False)
    _, indices = expected_neighbours(tensors, 1, mutual)
    first, second = distances[0].double().unbind(1)
    kept = indices[0, :, 0] >= 0
    kept &= first <= (math.inf if max_distance is None else max_distance)
    if ratio is not None:
        kept &= (second == MISSING[0]) | (first < ratio * second)
    arguments: Numbers = {**tensors, "alignment": 16, "slots": 4, "max_blocks": 2, "mutual": mutual}
    if ratio is not None:
        arguments["ratio"] = ratio
    if max_distance is not None:
        arguments["max_distance"] = max_distance
    result = simulator.run_schedules("hamming_match", arguments)
    rows = kept.nonzero()[:, 0]
    assert torch.equal(result["matches"], torch.stack([rows, indices[0, rows, 0]], 1))
    assert torch.equal(result["distances"], distances[0, rows, 0])
