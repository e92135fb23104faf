"""Mean shift, and labels by where the points end."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effops.ops import _autocast, _pairwise
from effops.ops._checks import explain

_NAME = "mean_shift_cluster"
_op = torch.ops.effops.mean_shift_cluster.default


def mean_shift_cluster(
    x: Tensor,  # [B, N, D] or [N, D]
    kappa: float = 36.0,
    iterations: int = 10,
    threshold: float = 0.9,
    min_size: int = 1,
) -> Tensor:  # [B, N] or [N]
    r"""Groups of points that mean shift moves to the same mode.

    .. math::
        labels = assign\_modes(mean\_shift(x, \kappa, iterations), threshold, min\_size)

    Two points share a label if their final positions are linked by steps of a similarity
    (1 + cos) / 2 > threshold; label 0 is the largest group (ties: the smallest first member), and members of
    groups of fewer than ``min_size`` points get -1. See :func:`mean_shift` and :func:`assign_modes`, which
    have more settings: weights, seeds, a mixing rate, an early end.

    Args:
        x: [B, N, D], or [N, D] of a single set; D from 1 to 512; rows are normalised first. float32, float64,
            bfloat16 or float16 (computed in float32, without rounding in between).
        kappa: Concentration of the kernel, 0 or more.
        iterations: 0 or more.
        threshold: Any finite number; 0.9 joins angles below 36.9 degrees, 1 and above nothing. For a large
            kappa, whose modes may be closer, 1 - 1 / (4 kappa) joins those within one bandwidth.
        min_size: Members that a group needs, 1 or more.

    Returns:
        int64 labels, [B, N] or [N], contiguous.

    Raises:
        ValueError: wrong ranks or sizes, a number out of range.
        TypeError: wrong dtypes, or an argument of another kind.
        RuntimeError: no kernels for the device in this installation.

    No gradient. Deterministic, on the CPU for any number of threads. vmap may batch ``x``.

    Source: S. Kong, PhD thesis, sections 5.4 and 5.5.
    """
    (points,) = _pairwise.in_float32(x)
    single = _pairwise.is_set(points)
    batch = _pairwise.with_batch(points) if single else (points,)
    settings = (kappa, iterations, threshold, min_size)
    try:
        labels = _op(*batch, *settings)
    except (RuntimeError, TypeError) as error:
        return explain(_NAME, error, lambda: _check(points, *settings, single=single))
    return labels.squeeze(0) if single else labels


def _check(
    x: Tensor, kappa: float, iterations: int, threshold: float, min_size: int, single: bool = False
) -> None:
    """The metadata checks of csrc/pairwise/mean_shift_cluster.cpp."""
    _pairwise.check_points(_NAME, "x", x, single)
    _pairwise.check_finite(_NAME, "kappa", kappa, least=0)
    _pairwise.check_at_least(_NAME, "iterations", iterations, 0)
    _pairwise.check_finite(_NAME, "threshold", threshold)
    _pairwise.check_at_least(_NAME, "min_size", min_size, 1)


# ------------------------------------------------------------------------------------------ fake


@torch.library.register_fake("effops::mean_shift_cluster")
def _fake(x: Tensor, kappa: float, iterations: int, threshold: float, min_size: int) -> Tensor:
    _check(x, kappa, iterations, threshold, min_size)
    return x.new_empty(x.shape[:2], dtype=torch.int64)


# ------------------------------------------------------------------------------------------ autocast

_autocast.install(_NAME, (_autocast.FLOAT32, *(_autocast.KEEP,) * 4))

# ------------------------------------------------------------------------------------------ vmap

_pairwise.install_folding_vmap(_NAME)

# ------------------------------------------------------------------------------------------ FLOPs


@register_flop_formula(torch.ops.effops.mean_shift_cluster)
def _flops(x: Any, kappa: float, iterations: int, *settings: Any, out_shape: Any = None, **_: Any) -> int:
    """Two multiply-adds per iteration and channel of every pair, and one for the labels."""
    return _pairwise.pair_flops(4 * iterations + 2, x)
