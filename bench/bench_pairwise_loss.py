"""The pixel-embedding loss of 4000 points, the most that its authors sample of an image, of 12 instances.

"random": embeddings before training, half of the pairs of different instances cost something; "trained":
instances lie together and apart from each other, and almost no such pair does.

The work is one product of pairs of different instances, each counted once as similarity is symmetric, and
with the gradient another such product and one over all ordered pairs. effops leaves out what cannot cost
anything, so that it may be beyond 100 % of the roofline.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import memory
import peers_pairwise
import pytest
import torch
import torch.nn.functional as F
from peers_rowconv import checked_calls
from roofline import Work
from torch import Tensor

import effops

_POINTS, _CHANNELS, _INSTANCES, _ALPHA = 4000, 64, 12, 0.5


def _inputs(kind: str, count: int, device: str) -> tuple[Tensor, Tensor]:
    """Embeddings and labels, of a random sample of the pixels of an image."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, _CHANNELS, generator=generator)
    labels = torch.randint(_INSTANCES, (count,), generator=generator)
    if kind == "trained":
        axes = torch.linalg.qr(torch.randn(_CHANNELS, _INSTANCES, generator=generator)).Q.mT
        centers = F.normalize(axes - axes.mean(0), dim=1)  # cosines of -1/11
        x = centers[labels] + 0.02 * x
    return x.to(device), labels.to(device)


def _functions(labels: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    weights = peers_pairwise.instance_weights(labels)

    def matrix(x: Tensor) -> Tensor:
        return peers_pairwise.loss_matrix(x, labels, weights, _ALPHA)

    return {
        "effops": lambda x: effops.pairwise_embedding_loss(x, labels, _ALPHA),
        "N x N": matrix,
        "compiled N x N": torch.compile(matrix, dynamic=False),
        "blocks": lambda x: peers_pairwise.loss_blocks(x, labels, weights, _ALPHA),
    }


def memory_case(device: str, name: str, direction: str) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """For memory.extra_bytes; the gradient counts as extra memory."""

    def both(function: Callable[[Tensor], Tensor], leaf: Tensor) -> Tensor:
        out = function(leaf)
        torch.autograd.grad(out, leaf)
        return out.detach()

    calls = []
    for count in (256, _POINTS):
        x, labels = _inputs("random", count, device)
        function = _functions(labels)[name]
        if direction == "forward":
            calls.append(functools.partial(function, x))
        else:
            calls.append(functools.partial(both, function, x.requires_grad_()))
    return calls[0], calls[1]


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("kind", ["random", "trained"])
def test_pairwise_embedding_loss(kind, direction, device, race, benchmark):
    x, labels = _inputs(kind, _POINTS, device)
    calls = checked_calls(_functions(labels), [x], direction)
    different = _POINTS**2 * (1 - 1 / _INSTANCES)
    multiply_adds = 0.5 if direction == "forward" else 0.5 + 1.5
    benchmark.group = "pairwise_embedding_loss"
    shape = f"pairwise_embedding_loss N={_POINTS}, D={_CHANNELS}, {_INSTANCES} instances, {kind}"
    benchmark.extra_info.update(
        op="pairwise_embedding_loss", shape=shape, dtype="float32", direction=direction
    )
    race(
        calls.pop("effops"),
        calls,
        points=_POINTS,
        work=Work(flops=2 * multiply_adds * different * _CHANNELS),
        calls=1 if device == "cpu" else 10,
    )
    if kind == "random":
        needed = {
            name: memory.extra_bytes("bench_pairwise_loss", "memory_case", device, name, direction)
            for name in ("effops", "N x N", "blocks")
        }
        benchmark.extra_info["extra_megabytes"] = {name: round(n / 1e6, 1) for name, n in needed.items()}
        benchmark.extra_info["percent_of_memory"] = round(100 * needed["effops"] / needed["N x N"], 1)
