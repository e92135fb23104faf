"""The CUDA kernels of assign_modes, run in the host simulator, against a search of the dense graph."""

from __future__ import annotations

import math

import pytest
import simulator
import torch
from torch import Tensor

F32, F64 = torch.float32, torch.float64


def dense(modes: Tensor, threshold: float, min_size: int) -> Tensor:
    """Labels of the points of one image, by walking through the graph."""
    unit = torch.nn.functional.normalize(modes.double(), dim=-1)
    joined = (1 + unit @ unit.T) / 2 > threshold
    unseen = set(range(len(modes)))
    components: list[list[int]] = []
    while unseen:
        component: list[int] = []
        waiting = [min(unseen)]
        while waiting:
            point = waiting.pop()
            if point in unseen:
                unseen.remove(point)
                component.append(point)
                waiting += joined[point].nonzero().flatten().tolist()
        components.append(sorted(component))
    labels = torch.full((len(modes),), -1)
    components = [members for members in components if len(members) >= min_size]
    for label, members in enumerate(sorted(components, key=lambda c: (-len(c), c[0]))):
        labels[members] = label
    return labels


def check(modes: Tensor, threshold: float = 0.9, min_size: int = 1) -> Tensor:
    found = simulator.run_schedules(
        "assign_modes", {"modes": modes, "threshold": threshold, "min_size": min_size}
    )["labels"]
    assert torch.equal(found, torch.stack([dense(image, threshold, min_size) for image in modes]))
    return found


def clusters(batch: int, points: int, channels: int, count: int, dtype: torch.dtype) -> Tensor:
    """Points close to ``count`` directions, of any length, in random order."""
    generator = torch.Generator().manual_seed(points + channels)
    centers = torch.nn.functional.normalize(
        torch.randn(count, channels, generator=generator, dtype=F64), dim=1
    )
    chosen = torch.randint(count, (batch, points), generator=generator)
    noise = 0.1 / math.sqrt(channels) * torch.randn(batch, points, channels, generator=generator, dtype=F64)
    lengths = torch.rand(batch, points, 1, generator=generator, dtype=F64) + 0.5
    return ((centers[chosen] + noise) * lengths).to(dtype)


@pytest.mark.parametrize(
    ("batch", "points", "channels", "dtype"),
    [
        (2, 150, 3, F32),
        (1, 130, 16, F64),
        (1, 64, 200, F32),
        (2, 33, 33, F64),
        (1, 300, 2, F32),
        (1, 5, 1, F32),
        (3, 1, 4, F64),
    ],
)
@pytest.mark.parametrize("min_size", [1, 9])
def test_clusters(batch: int, points: int, channels: int, dtype: torch.dtype, min_size: int) -> None:
    check(clusters(batch, points, channels, 12, dtype), min_size=min_size)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_chain(dtype: torch.dtype) -> None:
    """Points that are joined to their neighbours only, in an order that joins many components late."""
    angles = torch.arange(150, dtype=F64)[torch.randperm(150, generator=torch.Generator().manual_seed(1))]
    angles = 0.02 * angles + (angles >= 70) + (angles >= 71)
    modes = torch.stack([angles.cos(), angles.sin()], dim=1).to(dtype).unsqueeze(0)
    labels = check(modes, threshold=(1 + math.cos(0.03)) / 2)
    assert labels.max() == 2


def test_all_in_one_and_all_alone() -> None:
    modes = torch.ones(1, 140, 3)
    modes[:, :, 0] = torch.linspace(1, 1.01, 140)
    assert torch.equal(check(modes), torch.zeros(1, 140, dtype=torch.int64))
    assert torch.equal(check(modes, threshold=1.5), torch.arange(140).unsqueeze(0))
    assert torch.equal(check(modes, threshold=1.5, min_size=2), torch.full((1, 140), -1))


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, 1e30, 1e-30])
def test_special_values(value: float) -> None:
    """NaN and Inf join nothing; zeros are half similar to all; the length of others does not matter."""
    modes = clusters(1, 70, 4, 3, F32)
    modes[0, 3] = modes[0, 66] = value
    expected = check(modes)
    if not math.isfinite(value):
        assert (expected[0] == expected[0, 3]).sum() == (expected[0] == expected[0, 66]).sum() == 1
    check(modes, threshold=0.49)
