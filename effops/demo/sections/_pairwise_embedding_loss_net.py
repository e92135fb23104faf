"""Pictures of like shapes, and a small network whose embeddings learn to tell them apart."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effops.losses import PairwiseEmbeddingLoss
from effops.nn import MeanShiftGrouping

SIDE = 64  # pixels of a picture
CHANNELS = 16  # of an embedding
ITERATIONS = 10
SMALLEST = 20  # pixels of a group that counts
_COLOURS = ((0.8, 0.25, 0.2), (0.2, 0.4, 0.75))
_BACKGROUND, _NOISE = 0.54, 0.03
_WIDTH = 16  # channels of the network at half the resolution
_PICTURES, _BATCH, _POINTS = 192, 3, 256
_LEARNING_RATE = 5e-3
_CHECKS = 5  # of the score while it learns


class Scenes(NamedTuple):
    """Pictures and what they show.

    Attributes:
        pictures: [N, 3, SIDE, SIDE] in [0, 1].
        labels: [N, SIDE, SIDE] int64: 0 is the background, then one number per shape.
    """

    pictures: Tensor
    labels: Tensor


def make_scenes(count: int, seed: int, device: str = "cpu") -> Scenes:
    """Discs and squares, four to eight of random sizes in two colours, some of which touch."""
    generator = torch.Generator().manual_seed(seed)
    scenes = [_make_scene(generator) for _ in range(count)]
    pictures, labels = (torch.stack(tensors).to(device) for tensors in zip(*scenes, strict=True))
    return Scenes(pictures, labels)


def _make_scene(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    centres = (torch.arange(SIDE) + 0.5) / SIDE
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    labels = torch.zeros(SIDE, SIDE, dtype=torch.int64)
    tint, shade = 0.1 * (random(3, 1, 1) - 0.5), 0.08 * (random(1) - 0.5)
    picture = (_BACKGROUND + tint + shade * x).expand(3, SIDE, SIDE)
    for label, (column, row, radius) in enumerate(_places(generator), 1):
        across, down, angle = x - column, y - row, float(random(1)) * math.pi
        if random(1) < 0.5:
            distance = (across**2 + down**2).sqrt() / radius
        else:
            first = across * math.cos(angle) + down * math.sin(angle)
            second = down * math.cos(angle) - across * math.sin(angle)
            distance = torch.maximum(first.abs(), second.abs()) / (0.85 * radius)
        is_inside = distance < 1
        colour = torch.tensor(_COLOURS[int(random(1) < 0.5)]) + 0.1 * (random(3) - 0.5)
        picture = torch.where(is_inside, colour[:, None, None] * (1.1 - 0.35 * distance), picture)
        labels[is_inside] = label
    noise = torch.randn(picture.shape, generator=generator)
    return (picture + _NOISE * noise).clamp(0, 1), labels


def _places(generator: torch.Generator) -> list[tuple[float, float, float]]:
    """Centres and radii of shapes that overlap a little at most."""
    places: list[tuple[float, float, float]] = []
    wanted = int(torch.randint(4, 9, (1,), generator=generator))
    for _ in range(20 * wanted):
        size, *centre = torch.rand(3, generator=generator).tolist()
        radius = 0.09 + 0.09 * size
        x, y = (radius + (1 - 2 * radius) * share for share in centre)
        if len(places) < wanted and all(
            math.hypot(x - other_x, y - other_y) > 0.85 * (radius + other)
            for other_x, other_y, other in places
        ):
            places.append((x, y, radius))
    return places


# ------------------------------------------------------------------------------------------ network


class Embedding(nn.Module):
    """Pictures [N, 3, SIDE, SIDE] to an embedding of every pixel, [N, CHANNELS, SIDE, SIDE].

    A small U-Net that also sees where a pixel is, as like shapes differ in nothing else.
    """

    position: Tensor

    def __init__(self) -> None:
        super().__init__()
        small, wide = _WIDTH, 2 * _WIDTH
        self.first = _block(4 * 3 + 2, small)
        self.down1 = _block(small, wide, stride=2)
        self.down2 = _block(wide, wide, stride=2)
        self.down3 = nn.Sequential(_block(wide, wide, stride=2), _block(wide, wide))
        self.up2 = _block(2 * wide, wide)
        self.up1 = _block(2 * wide, small)
        self.up0 = _block(2 * small, small)
        self.narrow = nn.Conv2d(small, 8, 1)
        self.last = nn.Sequential(_block(8 + 3 + 2, small), nn.Conv2d(small, CHANNELS, 1))
        line = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
        self.register_buffer("position", torch.stack(torch.meshgrid(line, line, indexing="xy")))

    def forward(self, pictures: Tensor) -> Tensor:
        x = pictures * 2 - 1
        position = self.position.expand(len(x), -1, -1, -1)
        full = self.first(torch.cat([F.pixel_unshuffle(x, 2), F.avg_pool2d(position, 2)], 1))
        half = self.down1(full)
        quarter = self.down2(half)
        eighth = self.down3(quarter)
        quarter = self.up2(torch.cat([_double(eighth), quarter], 1))
        half = self.up1(torch.cat([_double(quarter), half], 1))
        full = self.up0(torch.cat([_double(half), full], 1))
        embedding: Tensor = self.last(torch.cat([_double(self.narrow(full)), x, position], 1))
        return embedding


def _block(channels_in: int, channels_out: int, stride: int = 1) -> nn.Module:
    conv = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1)
    return nn.Sequential(conv, nn.GroupNorm(4, channels_out), nn.ReLU())


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


@dataclass
class Training:
    """A network and how it got there.

    Attributes:
        network: after training.
        before: embeddings [N, CHANNELS, SIDE, SIDE] of the unseen pictures by the untrained network.
        losses: of each step.
        scores: number of steps and mean score of the unseen pictures, a few times.
    """

    network: Embedding
    before: Tensor
    losses: list[float] = field(default_factory=list)
    scores: list[tuple[int, float]] = field(default_factory=list)


def learn(steps: int, unseen: Scenes) -> Training:
    """Training on pictures that are not those of `unseen`, which only give the scores."""
    device = unseen.pictures.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Embedding().to(device)
    scenes = make_scenes(_PICTURES, 0, str(device))
    generator = torch.Generator().manual_seed(0)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    training = Training(network, embed(network, unseen))
    loss_of = PairwiseEmbeddingLoss(max_points=_POINTS)
    optimizer = torch.optim.Adam(network.parameters(), _LEARNING_RATE)
    points_generator = torch.Generator(device).manual_seed(0)
    for step in range(steps):
        if step % max(steps // _CHECKS, 1) == 0:
            training.scores.append((step, _quick_score(network, unseen)))
        chosen = torch.randint(_PICTURES, (_BATCH,), generator=generator).to(device)
        embedding = network(scenes.pictures[chosen])
        loss = loss_of(embedding, scenes.labels[chosen], generator=points_generator)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * (1 - step / steps)
        optimizer.step()
        training.losses.append(float(loss.detach()))
    training.scores.append((steps, _quick_score(network, unseen)))
    return training


@torch.no_grad()
def embed(network: Embedding, scenes: Scenes) -> Tensor:
    embedding: Tensor = network(scenes.pictures)
    return embedding


def _quick_score(network: Embedding, scenes: Scenes) -> float:
    """Mean score of every other pixel in each direction."""
    part = embed(network, scenes)[:, :, ::2, ::2]
    found = MeanShiftGrouping(iterations=ITERATIONS).labels(part, min_size=SMALLEST // 4)
    scores = [score(*pair) for pair in zip(found, scenes.labels[:, ::2, ::2], strict=True)]
    return sum(scores) / len(scores)


def score(found: Tensor, truth: Tensor) -> float:
    """Adjusted Rand index of the pixels of shapes: the background is large and easy."""
    is_shape = truth > 0
    return adjusted_rand_index(found[is_shape], truth[is_shape])


def adjusted_rand_index(found: Tensor, truth: Tensor) -> float:
    """Of two sets of labels of the same points: 1 for the same groups, about 0 for unrelated ones.

    It counts pairs of points that are together in both, and corrects for chance. Label -1 is a group.
    """
    (_, first), (_, second) = (labels.flatten().unique(return_inverse=True) for labels in (found, truth))
    shape = (int(first.max()) + 1, int(second.max()) + 1)
    table = (first * shape[1] + second).bincount(minlength=shape[0] * shape[1]).view(shape)
    both, one, other, every = (
        float(_pairs(counts)) for counts in (table, table.sum(1), table.sum(0), table.sum())
    )
    chance, most = one * other / every, (one + other) / 2
    return 1.0 if most == chance else (both - chance) / (most - chance)


def _pairs(counts: Tensor) -> Tensor:
    counts = counts.double()
    return (counts * (counts - 1) / 2).sum()
