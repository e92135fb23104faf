"""The pixel-embedding loss as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effops.ops import _pairwise
from effops.ops._checks import check_type, number_of
from effops.ops.pairwise_embedding_loss import NORMALIZE, pairwise_embedding_loss

_NAME = "PairwiseEmbeddingLoss"


class PairwiseEmbeddingLoss(nn.Module):
    """Pulls embeddings of one instance together and pushes instances apart, on maps or sets of points.

    :func:`effops.ops.pairwise_embedding_loss` with fixed settings, on one embedding or on all iterates of
    :class:`effops.nn.MeanShiftGrouping`, and on all pixels or on a random sample of them.

    Args:
        alpha: similarity that different instances may have; 0.5 means orthogonal, which lets an embedding of
            D channels hold at least 2 D instances.
        normalize: ``"sum_w"`` (the loss does not depend on the number of pixels), ``"thesis"`` or ``"none"``.
        max_points: pixels of each image that take part, drawn evenly from all of them in every call, whether
            labelled or not; None: all. The cost grows with the square of their number.

    Raises:
        ValueError: an alpha that is not finite, an unknown option, max_points below 1.
        TypeError: an argument of another kind.

    Source: S. Kong, PhD thesis, sections 5.3 and 5.4.
    """

    def __init__(
        self, alpha: float = 0.5, normalize: str = "sum_w", *, max_points: int | None = None
    ) -> None:
        super().__init__()
        _pairwise.check_finite(_NAME, "alpha", alpha)
        number_of(_NAME, "normalize", NORMALIZE, normalize)
        if max_points is not None:
            _pairwise.check_at_least(_NAME, "max_points", max_points, 1)
        self.alpha = alpha
        self.normalize = normalize
        self.max_points = max_points

    def forward(
        self,
        embedding: Tensor,  # [B, D, H, W] or [B, N, D], or all iterates [T, B, ...] of one
        labels: Tensor,  # [B, H, W] or [B, N]
        weights: Tensor | None = None,  # [B, H, W] or [B, N]
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # []
        """The mean over the images of their losses; of iterates, the sum over all of them.

        Args:
            embedding: as in the comment; which of the forms it is follows from the rank of ``labels``.
            labels: int64 instances of each image; negative ones are ignored.
            weights: of the pixels; None: 1 / (number of pixels of the instance that take part).
            generator: of the random numbers of ``max_points``, on the device of ``labels``.

        Raises:
            ValueError, TypeError: shapes that do not fit, and as
                :func:`effops.ops.pairwise_embedding_loss`.
        """
        points = _iterates(embedding, labels)  # [T, B, N, D]
        if weights is not None:
            check_type(_NAME, "weights", weights, "Tensor", Tensor)
            if weights.shape != labels.shape:
                raise ValueError(
                    f"{_NAME}: expected weights of shape {list(labels.shape)}, got {list(weights.shape)}"
                )
            weights = weights.flatten(1)
        labels = labels.flatten(1)
        count = labels.shape[1]
        if self.max_points is not None and count > self.max_points:
            noise = torch.empty_like(labels, dtype=torch.float32).uniform_(generator=generator)
            chosen = noise.topk(self.max_points, dim=1, sorted=False).indices.sort(dim=1).values
            labels = labels.gather(1, chosen)
            weights = None if weights is None else weights.gather(1, chosen)
            points = points.gather(2, chosen[None, :, :, None].expand(*points.shape[:2], -1, points.shape[3]))
        times = points.shape[0]
        repeated = labels.repeat(times, 1), None if weights is None else weights.repeat(times, 1)
        loss = pairwise_embedding_loss(
            points.flatten(0, 1), repeated[0], self.alpha, repeated[1], self.normalize
        )
        return times * loss

    def extra_repr(self) -> str:
        text = f"alpha={self.alpha}, normalize={self.normalize!r}"
        return text if self.max_points is None else f"{text}, max_points={self.max_points}"


def _iterates(embedding: Tensor, labels: Tensor) -> Tensor:
    """[T, B, N, D] of maps or points, with or without a dimension of iterates."""
    check_type(_NAME, "embedding", embedding, "Tensor", Tensor)
    check_type(_NAME, "labels", labels, "Tensor", Tensor)
    if labels.dim() not in (2, 3):
        raise ValueError(f"{_NAME}: expected labels of shape [B, H, W] or [B, N], got {list(labels.shape)}")
    are_maps = labels.dim() == 3
    rank = 4 if are_maps else 3
    if embedding.dim() == rank:
        embedding = embedding.unsqueeze(0)
    points = embedding.flatten(3).mT if are_maps and embedding.dim() == 5 else embedding
    sides = embedding.shape[3:] if are_maps else embedding.shape[2:3]
    if points.dim() != 4 or points.shape[1] != labels.shape[0] or tuple(sides) != tuple(labels.shape[1:]):
        form = "[B, D, H, W] or [T, B, D, H, W]" if are_maps else "[B, N, D] or [T, B, N, D]"
        raise ValueError(
            f"{_NAME}: expected embedding of shape {form} beside labels {list(labels.shape)}, "
            f"got {list(embedding.shape)}"
        )
    return points
