"""Binary normalisation: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from effops.reference._bilinear import check_floating
from effops.reference._packed import check_count, check_rows

_OP = "binnorm"
_INF, _NAN = float("inf"), float("nan")


def binnorm(x: Tensor, k: int) -> Tensor:
    """A sigmoid whose threshold makes each row sum to k.

        y_i = sigma(x_i + nu),  nu such that sum over i of y_i = k

    Infinite elements are 0 or 1, and the finite ones share what is left of k; a row that cannot do that, or
    holds a NaN, is NaN. k = 0 gives zeros and k = M ones.

    With h = y (1 - y), moving all x by dx moves the root by dnu = -<h, dx> / <h, 1>. Where h = 0 for all
    elements the result is constant.

    Args:
        x: logits, [..., M] floating point.
        k: what each row sums to, an integer from 0 to M.

    Returns:
        [..., M], dtype of x. Computed in float64 and rounded once.

    Raises:
        ValueError: a tensor without dimensions, k out of range.
        TypeError: an x that is not floating point.

    Source: M. Kanakis, PhD thesis, section 5.3.3, equations 5.3 to 5.7.
    """
    check_rows(_OP, "x", x)
    check_floating(_OP, "x", x)
    check_count(_OP, "k", k, x.shape[-1])
    if x.numel() == 0:
        return x.clone()
    logits = x.double() - _kth_largest(x.detach().double(), k)

    nu = _root(logits.detach(), k)
    solvable = ~nu.isinf()  # where it is not, the finite elements are all 0 or all 1
    limit = torch.where(nu > 0, logits > -_INF, logits == _INF).double()
    nu = torch.where(solvable, nu, 0.0)
    y = torch.sigmoid(logits + nu)
    slope = torch.where(solvable, y * (1 - y), 0.0).sum(-1, keepdim=True).detach()
    constant = slope == 0

    total = y.sum(-1, keepdim=True)
    movement = (total.detach() - total) / torch.where(constant, 1.0, slope)  # 0, with the root's derivative
    moving = torch.sigmoid(logits + (nu + movement))
    return torch.where(constant, torch.where(solvable, y, limit).detach(), moving).to(x.dtype)


def _kth_largest(x: Tensor, k: int) -> Tensor:
    """[..., 1], or 0 where that is not finite. Counted from there, nu is small unless all y are 0 or 1."""
    value = x.sort(dim=-1, descending=True).values[..., max(k - 1, 0), None]
    return torch.where(value.isfinite(), value, 0.0)


def _root(x: Tensor, k: int) -> Tensor:
    """nu [..., 1] by bisection, until no number lies between the ends.

    logit(k / M) - max(x) <= nu <= logit(k / M) - min(x): there all y are at most, or at least, k / M. Rows
    whose finite elements must all be 0 or 1 have the root -Inf or Inf, and impossible rows have NaN.
    """
    finite = x.isfinite()
    count = finite.sum(-1, keepdim=True)
    share = k - (x == _INF).sum(-1, keepdim=True)
    possible = (share >= 0) & (share <= count) & ~x.isnan().any(-1, keepdim=True)
    solvable = possible & (share > 0) & (share < count)

    middle = torch.logit(torch.where(solvable, share.double() / count, 0.5))
    low = middle - torch.where(finite, x, -_INF).amax(-1, keepdim=True)
    high = middle - torch.where(finite, x, _INF).amin(-1, keepdim=True)
    low, high = torch.where(solvable, low, 0.0), torch.where(solvable, high, 0.0)
    nu = low
    while True:
        nu = low + (high - low) / 2
        if bool(((nu == low) | (nu == high)).all()):
            break
        excess = torch.where(finite, torch.sigmoid(x + nu), 0.0).sum(-1, keepdim=True) - share
        low, high = torch.where(excess <= 0, nu, low), torch.where(excess >= 0, nu, high)

    limit = torch.where(share == 0, -_INF, _INF)
    return torch.where(solvable, nu, torch.where(possible, limit, _NAN))
