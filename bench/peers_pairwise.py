"""The ops of the pairwise engine in plain PyTorch, as well as it goes, and in scikit-learn.

- N x N: all kernel values, or all similarities, are stored; what most published code does.
- blocks: a block of rows of them at a time.
- attention: mean shift is softmax attention of the points to themselves, without its scale.

Kernel values far below 1 are subnormal numbers, with which processors are up to 100 times slower: time the
peers with flush_denormal(). Every function but `labels_by_sklearn` runs on every device, and all but
`mean_shift_blocks` and those of labels are differentiable.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import peers
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_BLOCK = 256


@contextlib.contextmanager
def flush_denormal() -> Iterator[None]:
    """Subnormal numbers count as 0 meanwhile, in this thread. Also a decorator."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


# ------------------------------------------------------------------------------------------ mean shift


def mean_shift_attention(
    x: Tensor, kappa: float, iterations: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`dtype`: of the attention."""
    points = F.normalize(x, dim=-1)[None, None]  # a batch and a head
    for _ in range(iterations):
        rows = points.to(dtype)
        means = F.scaled_dot_product_attention(rows, rows, rows, scale=kappa)
        points = F.normalize(means.float(), dim=-1)
    return points[0, 0]


def mean_shift_matrix(x: Tensor, kappa: float, iterations: int) -> Tensor:
    return _repeated(_matrix_step, x, kappa, iterations)


def mean_shift_compiled(x: Tensor, kappa: float, iterations: int) -> Tensor:
    return _repeated(_compiled_step, x, kappa, iterations)


def mean_shift_blocks(x: Tensor, kappa: float, iterations: int) -> Tensor:
    """No kernel value is small enough to become subnormal, for which `exp` is slow even when flushing."""
    points, shift = F.normalize(x, dim=-1), x.new_full((1,), -kappa)
    for _ in range(iterations):
        kernels = (torch.addmm(shift, rows, points.mT, alpha=kappa) for rows in points.split(_BLOCK))
        sums = [kernel.clamp_(min=-80).exp_() @ points for kernel in kernels]
        points = F.normalize(torch.cat(sums), dim=-1)  # the sum of weights has no influence
    return points


def _repeated(step: Callable[[Tensor, float], Tensor], x: Tensor, kappa: float, iterations: int) -> Tensor:
    points = F.normalize(x, dim=-1)
    for _ in range(iterations):
        points = step(points, kappa)
    return points


def _matrix_step(points: Tensor, kappa: float) -> Tensor:
    kernel = (kappa * (points @ points.mT - 1)).exp()
    return F.normalize(kernel @ points, dim=-1)


_compiled_step: Callable[[Tensor, float], Tensor] = torch.compile(_matrix_step, dynamic=False)


def climb_attention(x: Tensor, seeds: Tensor, kappa: float, iterations: int) -> Tensor:
    points, climbing = (F.normalize(rows, dim=-1)[None, None] for rows in (x, seeds))
    for _ in range(iterations):
        means = F.scaled_dot_product_attention(climbing, points, points, scale=kappa)
        climbing = F.normalize(means, dim=-1)
    return climbing[0, 0]


def climb_matrix(x: Tensor, seeds: Tensor, kappa: float, iterations: int) -> Tensor:
    """UnseenObjectClustering's mean shift."""
    points, climbing = F.normalize(x, dim=-1), F.normalize(seeds, dim=-1)
    for _ in range(iterations):
        kernel = (kappa * (climbing @ points.mT - 1)).exp()
        climbing = F.normalize(kernel @ points, dim=-1)
    return climbing


# ------------------------------------------------------------------------------------------ groups


def labels_by_search(modes: Tensor, threshold: float) -> Tensor:
    """assign_modes: components of similar rows, one after another from their first member on."""
    unit, least = F.normalize(modes, dim=-1), 2 * threshold - 1
    groups = torch.zeros(len(modes), dtype=torch.int64, device=modes.device)
    left = torch.ones_like(groups, dtype=torch.bool)
    while len(first := left.nonzero()[:1, 0]):
        reached = first
        while len(reached):
            groups[reached] = first
            left[reached] = False
            is_near = (unit[reached] @ unit.mT > least).any(0)
            reached = (is_near & left).nonzero()[:, 0]
    return _numbered_by_size(groups)


def labels_by_sklearn(bandwidth: float) -> Callable[[Tensor], Tensor] | None:
    """A flat kernel of this radius. None, and a line in peers.MISSING, without scikit-learn."""
    try:
        from sklearn.cluster import MeanShift
    except ImportError as error:
        peers.MISSING["scikit-learn"] = f"{type(error).__name__}: {error}"
        return None

    def run(x: Tensor) -> Tensor:
        labels = MeanShift(bandwidth=bandwidth).fit_predict(F.normalize(x, dim=-1).numpy())
        return _numbered_by_size(torch.from_numpy(labels).long())

    return run


def _numbered_by_size(groups: Tensor) -> Tensor:
    """0 for the largest; of groups of one size the one with the smallest first member comes first."""
    _, numbers, counts = groups.unique(return_inverse=True, return_counts=True)
    members = torch.arange(len(groups), device=groups.device)
    firsts = torch.full_like(counts, len(groups)).scatter_reduce(0, numbers, members, "amin")
    ranks: Tensor = (firsts - counts * len(groups)).argsort().argsort()
    return ranks[numbers]


# ------------------------------------------------------------------------------------------ loss


def loss_matrix(x: Tensor, labels: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Of a single image; eq. 5.1 and 5.2 of Kong's thesis, divided by the square of the sum of weights."""
    unit = F.normalize(x, dim=-1)
    costs = _costs(unit, labels, unit, labels, alpha)
    return weights @ costs @ weights / weights.sum() ** 2


def loss_blocks(x: Tensor, labels: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Backward computes the blocks again."""
    unit = F.normalize(x, dim=-1)

    def sum_of(rows: slice, unit: Tensor) -> Tensor:
        costs = _costs(unit[rows], labels[rows], unit, labels, alpha)
        return weights[rows] @ costs @ weights

    total = x.new_zeros(())
    for start in range(0, len(x), _BLOCK):
        rows = slice(start, start + _BLOCK)
        total = total + checkpoint(sum_of, rows, unit, use_reentrant=False, preserve_rng_state=False)
    return total / weights.sum() ** 2


def _costs(rows: Tensor, row_labels: Tensor, columns: Tensor, column_labels: Tensor, alpha: float) -> Tensor:
    similarity = (1 + rows @ columns.mT) / 2
    is_same = row_labels[:, None] == column_labels
    return torch.where(is_same, 1 - similarity, (similarity - alpha).relu())


def instance_weights(labels: Tensor) -> Tensor:
    """1 / (number of points of the instance)."""
    return 1 / labels.bincount().float()[labels]
