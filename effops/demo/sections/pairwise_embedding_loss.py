"""Pixel embeddings that learn to tell like shapes apart: pictures, correctness, times, memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from effops import pairwise_embedding_loss, reference
from effops.demo._memory import extra_bytes
from effops.demo._section import Result, Row, Section, Settings, Step
from effops.demo._timing import interleaved_min, one_thread
from effops.demo.sections._pairwise_embedding_loss_net import (
    CHANNELS,
    Scenes,
    Training,
    embed,
    learn,
    make_scenes,
)
from effops.demo.sections._pairwise_embedding_loss_pictures import (
    picture_costs,
    picture_embeddings,
    picture_training,
)

_UNSEEN = 8  # pictures
_COMPARED, _CHECKED = 2048, 512  # pixels
_TIMED = (512, 1024, 2048)
_TOLERANCE = 2e-5


def plain_loss(x: Tensor, labels: Tensor, alpha: float = 0.5) -> Tensor:
    """The op in plain PyTorch for points [N, D] that all have labels: all pairs in N x N matrices."""
    is_same = labels[:, None] == labels
    weights = 1 / is_same.sum(1).to(x)
    weights = weights / weights.sum()
    x = F.normalize(x, dim=1)
    similarity = (1 + x @ x.T) / 2
    costs = torch.where(is_same, 1 - similarity, (similarity - alpha).relu())
    return weights @ costs @ weights


# ------------------------------------------------------------------------------------------ comparisons

_Op = Callable[[Tensor, Tensor], Tensor]


def _forward(op: _Op, x: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return op(x, labels)


def _gradient(op: _Op, x: Tensor, labels: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(op(x, labels), x)[0]


def _points(unseen: Scenes, training: Training, count: int) -> tuple[Tensor, Tensor]:
    """Embeddings [N, D] and labels [N] of pixels spread over a picture of the trained network."""
    embedding = embed(training.network, Scenes(unseen.pictures[:1], unseen.labels[:1]))
    rows, labels = embedding[0].flatten(1).T, unseen.labels[0].flatten()
    chosen = torch.linspace(0, len(labels) - 1, count, device=labels.device).long()
    return rows[chosen].contiguous(), labels[chosen]


def _compare(unseen: Scenes, training: Training, settings: Settings) -> list[Row]:
    points = _points(unseen, training, _COMPARED)
    some, labels = _points(unseen, training, _CHECKED)
    rows = []
    for direction, run in (("forward", _forward), ("fwd + bwd", _gradient)):
        exact = run(reference.pairwise_embedding_loss, some.double(), labels)
        error = _error(run(pairwise_embedding_loss, some, labels), exact)
        times = _time(run, points, settings)
        shape = f"N={_COMPARED:,} D={CHANNELS}, one thread"
        op = "pairwise_embedding_loss"
        rows.append(Row(op, direction, shape, times["effops"], times["PyTorch, N x N"], error, _TOLERANCE))
    return rows


def _compare_sizes(
    unseen: Scenes, training: Training, settings: Settings
) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, int]]]:
    """Seconds and bytes of each program, with gradients, by the number of points."""
    times: dict[str, dict[int, float]] = {name: {} for name in _PROGRAMS}
    memory: dict[str, dict[int, int]] = {name: {} for name in _PROGRAMS}
    for count in _TIMED:
        points = _points(unseen, training, count)
        for name, seconds in _time(_gradient, points, settings).items():
            times[name][count] = seconds
        for name, op in _PROGRAMS.items():
            with one_thread():
                size = extra_bytes(partial(_gradient, op, *points), settings.device)
            if size is not None:
                memory[name][count] = size
    return times, memory


_PROGRAMS: dict[str, _Op] = {"effops": pairwise_embedding_loss, "PyTorch, N x N": plain_loss}


def _time(
    run: Callable[..., Tensor], points: tuple[Tensor, Tensor], settings: Settings
) -> Mapping[str, float]:
    functions = {name: partial(run, op, *points) for name, op in _PROGRAMS.items()}
    with one_thread():
        return interleaved_min(functions, seconds=settings.seconds / 10, min_rounds=2, device=settings.device)


def _error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))


def _run(settings: Settings, step: Step) -> Result:
    step("learning")
    unseen = make_scenes(_UNSEEN, 1, settings.device)
    with one_thread():
        training = learn(settings.learning_steps, unseen)
    step("groups")
    figures = [picture_embeddings(settings, unseen, training), picture_training(settings, training)]
    step("check and times")
    rows = _compare(unseen, training, settings)
    step("sizes: times and memory")
    figures.append(picture_costs(settings, *_compare_sizes(unseen, training, settings)))
    text = (
        "pairwise_embedding_loss pulls the embeddings of one instance's pixels together and pushes those of "
        "different instances apart, so that mean shift finds as many instances as there are. A small U-Net "
        f"of about {_parameters(training):,} parameters learns it here within seconds, on discs and squares "
        "that like the same colour. Every step takes a random part of the pixels (max_points); the pairs are "
        "never stored. Plain PyTorch in the table makes N x N matrices."
    )
    return Result(text, figures, rows)


def _parameters(training: Training) -> int:
    return sum(parameter.numel() for parameter in training.network.parameters()) // 1000 * 1000


SECTION = Section("A loss for embeddings that tell instances apart", steps=4, run=_run)
