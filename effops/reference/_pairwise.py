"""Points [B, N, D] of several images, compared by the cosine of the angle between them."""

from __future__ import annotations

import torch
from torch import Tensor

from effops.reference._bilinear import check_floating, check_shape

_SMALLEST_NORM = 1e-12
_MAX_CHANNELS = 512


def normalized(rows: Tensor) -> Tensor:
    """Each row divided by max(norm, 1e-12): torch.nn.functional.normalize, but 1e30 is no overflow."""
    exact = rows.double()
    norm = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
    out: Tensor = (exact / norm.clamp(min=_SMALLEST_NORM)).to(rows.dtype)
    return out


def one_or_nan(finite: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor that makes NaN of numbers and of their gradients where a condition does not hold."""
    return torch.where(finite, 1.0, torch.nan).to(dtype)


def check_points(op: str, name: str, points: Tensor) -> None:
    """[B, N, D] or [N, D]."""
    check_floating(op, name, points)
    is_set = points.dim() == 2
    check_shape(op, name, points, "ND" if is_set else "BND", (None, None) if is_set else (None, None, None))
    if not 1 <= points.shape[-1] <= _MAX_CHANNELS:
        raise ValueError(f"{op}: expected {name} of 1 to {_MAX_CHANNELS} channels, got {points.shape[-1]}")
