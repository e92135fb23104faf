"""Labels of points by the modes that they have climbed to."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effops.ops import _autocast, _pairwise
from effops.ops._checks import explain

_NAME = "assign_modes"
_op = torch.ops.effops.assign_modes.default


def assign_modes(
    modes: Tensor,  # [B, N, D] or [N, D]
    threshold: float = 0.9,
    min_size: int = 1,
) -> Tensor:  # [B, N] or [N]
    r"""Groups of points whose final positions of :func:`mean_shift` are linked by similarity.

    Rows are normalised. The labels name the connected components of the graph that joins two points when

    .. math::
        \frac{1 + \cos \angle(modes_i, modes_j)}{2} > threshold

    Label 0 is the component with most members (ties: the one whose first member comes first), 1 the next, and
    so on; members of components of fewer than ``min_size`` get -1. The matrix of similarities is never
    stored.

    Args:
        modes: [B, N, D], or [N, D] of a single set; D from 1 to 512. float32, float64, bfloat16 or float16
            (compared in float32). A row with a NaN or Inf is joined to nothing, but is a point as others.
        threshold: Any finite number; 0.9 joins angles below 36.9 degrees, 1 and above nothing. For a large
            kappa, whose modes may be closer, 1 - 1 / (4 kappa) joins those within one bandwidth.
        min_size: Members that a group needs, 1 or more.

    Returns:
        int64 labels, [B, N] or [N], contiguous.

    Raises:
        ValueError: wrong ranks or sizes, a threshold that is not finite, min_size below 1.
        TypeError: wrong dtypes, or an argument of another kind.
        RuntimeError: no kernels for the device in this installation.

    No gradient. Deterministic, on the CPU for any number of threads. vmap may batch ``modes``.

    Source: the readout that S. Kong, PhD thesis, section 5.5, leaves open; as in scikit-learn's
    ``connected_components`` of a radius graph.
    """
    (points,) = _pairwise.in_float32(modes)
    single = _pairwise.is_set(points)
    batch = _pairwise.with_batch(points) if single else (points,)
    try:
        labels = _op(*batch, threshold, min_size)
    except (RuntimeError, TypeError) as error:
        return explain(_NAME, error, lambda: _check(points, threshold, min_size, single))
    return labels.squeeze(0) if single else labels


def _check(modes: Tensor, threshold: float, min_size: int, single: bool = False) -> None:
    """The metadata checks of csrc/pairwise/assign_modes.h."""
    _pairwise.check_points(_NAME, "modes", modes, single)
    _pairwise.check_finite(_NAME, "threshold", threshold)
    _pairwise.check_at_least(_NAME, "min_size", min_size, 1)


# ------------------------------------------------------------------------------------------ fake


@torch.library.register_fake("effops::assign_modes")
def _fake(modes: Tensor, threshold: float, min_size: int) -> Tensor:
    _check(modes, threshold, min_size)
    return modes.new_empty(modes.shape[:2], dtype=torch.int64)


# ------------------------------------------------------------------------------------------ autocast

_autocast.install(_NAME, (_autocast.FLOAT32, _autocast.KEEP, _autocast.KEEP))

# ------------------------------------------------------------------------------------------ vmap

_pairwise.install_folding_vmap(_NAME)

# ------------------------------------------------------------------------------------------ FLOPs


@register_flop_formula(torch.ops.effops.assign_modes)
def _flops(modes: Any, *settings: Any, out_shape: Any = None, **_: Any) -> int:
    """A multiply-add per channel of every pair."""
    return _pairwise.pair_flops(2, modes)
