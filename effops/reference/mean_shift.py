"""Mean shift on the unit sphere: the definition."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effops.reference._bilinear import check_floating, check_shape, compute_dtype
from effops.reference._pairwise import check_points, normalized, one_or_nan
from effops.reference._rowconv import check_at_least, check_dtype
from effops.reference._window import check_choice

_OP = "mean_shift"


def mean_shift(
    x: Tensor,
    kappa: float | Tensor = 36.0,
    eta: float = 1.0,
    iterations: int = 10,
    weights: Tensor | None = None,
    return_all: bool = False,
    *,
    seeds: Tensor | None = None,
    tol: float | None = None,
    precision: str = "high",
) -> Tensor:
    """Points that climb to the modes of their own density (von Mises-Fisher kernel).

        s_m <- normalize((1 - eta) s_m + eta sum_j w_j K_mj x_j / d_m)
        K_mj = exp(kappa (s_m . x_j - 1)),    d_m = sum_j w_j K_mj

    Without seeds the moving rows s are the points x themselves (Gaussian blurring mean shift); seeds climb
    points that stay where they are. Both are normalised first. Kernel values below the smallest normal number
    of the dtype are 0, and a row with d = 0 stays where it is.

    A NaN or Inf in the points or weights of an image, or weights whose sum overflows, make NaN of all of its
    rows in the first iteration; a seed with a NaN or Inf becomes NaN itself.

    Args:
        x: points, [B, N, D] or [N, D], 1 <= D <= 512; the images of a batch do not see each other.
        kappa: concentration of the kernel, a number or a tensor of one element, 0 or more.
        eta: share of the way to the weighted mean, in [0, 1].
        iterations: 0 or more.
        weights: of the points, [B, N] or [N]; None: 1.
        return_all: whether to return every iterate, the normalised rows first.
        seeds: [B, M, D] or [M, D].
        tol: an image stops after an iteration in which no row of it moved further than this; its later
            iterates repeat the last one.
        precision: "high" or "medium"; makes no difference here.

    Returns:
        [B, N, D] or [N, D] (M rows for seeds); with return_all [iterations + 1, ...]. In the dtype of x,
        computed in at least float32 and rounded once.

    Raises:
        ValueError: shapes that do not fit together, numbers out of range, a precision that does not exist.
        TypeError: wrong dtypes.

    Source: S. Kong, PhD thesis, section 5.4 and appendix C.
    """
    _check(x, kappa, eta, iterations, weights, seeds, tol)
    check_choice(_OP, "precision", precision, ("high", "medium"))
    if x.dim() == 2:
        weights = None if weights is None else weights[None]
        seeds = None if seeds is None else seeds[None]
        out = mean_shift(x[None], kappa, eta, iterations, weights, return_all, seeds=seeds, tol=tol)
        return out.squeeze(-3)

    dtype = compute_dtype(x)
    w = (torch.ones_like(x[..., 0]) if weights is None else weights).to(dtype)
    is_finite = x.isfinite().all(2).all(1) & w.abs().sum(1).isfinite()
    factor = one_or_nan(is_finite, dtype)[:, None, None]
    points = normalized(x.to(dtype))
    rows = points if seeds is None else normalized(seeds.to(dtype))
    if isinstance(kappa, Tensor):
        kappa = kappa.to(x.device, dtype).reshape(())

    iterates = [rows]
    moves = torch.ones_like(is_finite)
    for _ in range(iterations):
        moved = factor * _step(rows, rows if seeds is None else points, w, kappa, eta)
        new = torch.where(moves[:, None, None], moved, rows)
        if tol is not None:
            moves = moves & (torch.linalg.vector_norm(new - rows, dim=2) > tol).any(1)
        rows = new
        iterates.append(rows)
    return torch.stack(iterates).to(x.dtype) if return_all else rows.to(x.dtype)


def _step(rows: Tensor, points: Tensor, weights: Tensor, kappa: float | Tensor, eta: float) -> Tensor:
    """One iteration of rows [B, M, D] among points [B, N, D]."""
    kernel = _kernel(rows @ points.mT, kappa) * weights[:, None, :]
    d = kernel.sum(2, keepdim=True)
    stays = d == 0
    mean = kernel @ points / torch.where(stays, 1.0, d)
    return normalized(torch.where(stays, rows, (1 - eta) * rows + eta * mean))


def _kernel(similarity: Tensor, kappa: float | Tensor) -> Tensor:
    """exp(kappa (S - 1)), S at most 1. The bound only cuts rounding errors off: the gradient ignores it."""
    excess = (similarity.clamp(max=1) - similarity).detach()
    kernel = (kappa * (similarity + excess - 1)).exp()
    return torch.where(kernel < torch.finfo(kernel.dtype).tiny, 0.0, kernel)


def _check(
    x: Tensor,
    kappa: float | Tensor,
    eta: float,
    iterations: int,
    weights: Tensor | None,
    seeds: Tensor | None,
    tol: float | None,
) -> None:
    check_points(_OP, "x", x)
    batch = tuple(x.shape[:-2])
    if weights is not None:
        check_dtype(_OP, "weights", weights, x.dtype)
        check_shape(_OP, "weights", weights, "BN"[-len(batch) - 1 :], (*batch, x.shape[-2]))
    if seeds is not None:
        check_dtype(_OP, "seeds", seeds, x.dtype)
        check_shape(_OP, "seeds", seeds, "BMD"[-len(batch) - 2 :], (*batch, None, x.shape[-1]))
    if isinstance(kappa, Tensor):
        check_floating(_OP, "kappa", kappa)
        if tuple(kappa.shape) not in ((), (1,)):
            raise ValueError(f"{_OP}: expected kappa of one element, got shape {list(kappa.shape)}")
        kappa = kappa.detach()
    if not 0 <= float(kappa) < math.inf:
        raise ValueError(f"{_OP}: expected finite kappa >= 0, got {float(kappa)}")
    if not 0 <= eta <= 1:
        raise ValueError(f"{_OP}: expected eta in [0, 1], got {eta}")
    check_at_least(_OP, "iterations", (iterations,), 0)
    if tol is not None and not 0 <= tol < math.inf:
        raise ValueError(f"{_OP}: expected finite tol >= 0, got {tol}")
