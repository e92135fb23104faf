"""The pixel-embedding loss: the definition."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effops.reference._bilinear import check_shape, compute_dtype
from effops.reference._pairwise import check_points, normalized, one_or_nan
from effops.reference._rowconv import check_dtype
from effops.reference._window import check_choice

_OP = "pairwise_embedding_loss"


def pairwise_embedding_loss(
    x: Tensor,
    labels: Tensor,
    alpha: float = 0.5,
    weights: Tensor | None = None,
    normalize: str = "sum_w",
) -> Tensor:
    """Pulls points of one instance together and pushes those of different instances apart.

        loss of an image = sum over i, j (i = j too) of w_i w_j cost_ij / divisor
        cost_ij = 1 - s_ij             for points of one instance
                  max(s_ij - alpha, 0) else,    s_ij = (1 + cos(angle between x_i and x_j)) / 2

    The divisor, by normalize:

        "sum_w"   (sum of w)^2; the loss does not depend on how densely an image is sampled
        "thesis"  the number of points that are not ignored
        "none"    1

    A NaN or Inf in the points or weights of an image, ignored points apart, or weights whose sum overflows
    make its loss NaN.

    Args:
        x: embeddings, [B, N, D] or [N, D], 1 <= D <= 512.
        labels: instances, [B, N] or [N] int64; points with a negative label are ignored.
        alpha: similarity that points of different instances may have.
        weights: [B, N] or [N]; None: 1 / (number of points of the instance in the image).
        normalize: "sum_w", "thesis" or "none".

    Returns:
        A scalar, the mean over the images; 0 of an image whose weights sum to 0 ("sum_w") and without images.
        Float32, or float64 for float64. The derivative of the hinge at its kink is 0.

    Raises:
        ValueError: shapes that do not fit together, an alpha that is not finite, a normalize that does not
            exist.
        TypeError: wrong dtypes.

    Source: S. Kong, PhD thesis, section 5.3 (eq. 5.2); "sum_w" is its code's.
    """
    _check(x, labels, alpha, weights)
    check_choice(_OP, "normalize", normalize, ("sum_w", "thesis", "none"))
    if x.dim() == 2:
        weights = None if weights is None else weights[None]
        return pairwise_embedding_loss(x[None], labels[None], alpha, weights, normalize)

    dtype = compute_dtype(x)
    counts = labels >= 0
    points = normalized(torch.where(counts[..., None], x, 0.0).to(dtype))
    is_same = labels[:, :, None] == labels[:, None, :]
    w = 1 / is_same.sum(2).to(dtype) if weights is None else weights.to(dtype)
    w = torch.where(counts, w, 0.0)

    sum_w = w.sum(1, keepdim=True)
    if normalize == "sum_w":
        w = w / torch.where(sum_w == 0, 1.0, sum_w)
    similarity = (1 + points @ points.mT) / 2
    cost = torch.where(is_same, 1 - similarity, (similarity - alpha).relu())
    losses = (w[:, :, None] * w[:, None, :] * cost).sum((1, 2))
    if normalize == "sum_w":
        losses = torch.where(sum_w[:, 0] == 0, 0.0, losses)
    elif normalize == "thesis":
        losses = losses / counts.sum(1).clamp(min=1)
    is_finite = points.isfinite().all(2).all(1) & w.isfinite().all(1) & sum_w[:, 0].isfinite()
    return (losses * one_or_nan(is_finite, dtype)).sum() / max(len(x), 1)


def _check(x: Tensor, labels: Tensor, alpha: float, weights: Tensor | None) -> None:
    check_points(_OP, "x", x)
    letters, sizes = "BN"[-x.dim() + 1 :], tuple(x.shape[:-1])
    check_shape(_OP, "labels", labels, letters, sizes)
    check_dtype(_OP, "labels", labels, torch.int64)
    if weights is not None:
        check_shape(_OP, "weights", weights, letters, sizes)
        check_dtype(_OP, "weights", weights, x.dtype)
    if not math.isfinite(alpha):
        raise ValueError(f"{_OP}: expected finite alpha, got {alpha}")
