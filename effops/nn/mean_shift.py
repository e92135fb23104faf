"""Mean-shift grouping of pixel embeddings as a module."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from effops.ops import _pairwise
from effops.ops._checks import check_type
from effops.ops.assign_modes import assign_modes
from effops.ops.mean_shift import mean_shift

_NAME = "MeanShiftGrouping"


class MeanShiftGrouping(nn.Module):
    """Unrolled mean shift on the unit sphere: embeddings of one instance draw together, differentiably.

    :func:`effops.ops.mean_shift` with fixed settings, on maps or on sets of points. Trained with
    :class:`effops.losses.PairwiseEmbeddingLoss` on all iterates (``return_all=True``).

    Args:
        kappa: concentration of the kernel, 0 or more; about 1 / (angle in radians)^2 of what is to be merged.
        eta: share of the way to the weighted mean per iteration, in [0, 1].
        iterations: 0 or more.
        learn_kappa: makes kappa a parameter, as its logarithm ``log_kappa``, so that it stays positive.
        return_all: whether to return every iterate, the normalised embedding first.
        tol: an image stops after an iteration in which no point moved further than this; None: never.
        device, dtype: of the parameter.

    Raises:
        ValueError: a number out of range.
        TypeError: an argument of another kind.

    Source: S. Kong, PhD thesis, section 5.4 and appendix C; Kong and Fowlkes, "Recurrent Pixel Embedding for
    Instance Grouping", CVPR 2018.
    """

    def __init__(
        self,
        kappa: float = 36.0,
        eta: float = 1.0,
        iterations: int = 10,
        *,
        learn_kappa: bool = False,
        return_all: bool = False,
        tol: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _pairwise.check_finite(_NAME, "kappa", kappa, least=0)
        if learn_kappa and kappa == 0:
            raise ValueError(f"{_NAME}: expected kappa above 0 beside learn_kappa, got {kappa}")
        _pairwise.check_finite(_NAME, "eta", eta, least=0)
        if eta > 1:
            raise ValueError(f"{_NAME}: expected eta in [0, 1], got {eta}")
        _pairwise.check_at_least(_NAME, "iterations", iterations, 0)
        if tol is not None:
            _pairwise.check_finite(_NAME, "tol", tol, least=0)
        check_type(_NAME, "learn_kappa", learn_kappa, "bool", bool)
        check_type(_NAME, "return_all", return_all, "bool", bool)
        self.eta = eta
        self.iterations = iterations
        self.return_all = return_all
        self.tol = tol
        self._first_kappa = float(kappa)
        if learn_kappa:
            self.log_kappa: nn.Parameter | None = nn.Parameter(torch.empty((), device=device, dtype=dtype))
            self.reset_parameters()
        else:
            self.register_parameter("log_kappa", None)

    def reset_parameters(self) -> None:
        """Initialise kappa, if it is learned, with the number that it was given."""
        if self.log_kappa is not None:
            nn.init.constant_(self.log_kappa, math.log(self._first_kappa))

    @property
    def kappa(self) -> float | Tensor:
        """The concentration: a number, or exp(log_kappa) where it is learned."""
        return self._first_kappa if self.log_kappa is None else self.log_kappa.exp()

    def forward(
        self,
        embedding: Tensor,  # [B, D, H, W] or [B, N, D]
        weights: Tensor | None = None,  # [B, H, W] or [B, N]
    ) -> Tensor:  # as embedding; [iterations + 1, ...] with return_all
        """Unit vectors, moved to the modes of their density; maps are channels_last in memory."""
        points, weights = _points(embedding, weights)
        moved = self._shift(points, weights, self.return_all)
        return moved.mT.unflatten(-1, embedding.shape[2:]) if embedding.dim() == 4 else moved

    @torch.no_grad()
    def labels(
        self,
        embedding: Tensor,  # [B, D, H, W] or [B, N, D]
        threshold: float = 0.9,
        min_size: int = 1,
        weights: Tensor | None = None,  # [B, H, W] or [B, N]
    ) -> Tensor:  # [B, H, W] or [B, N]
        """Groups of points by where they end: :func:`effops.ops.assign_modes` of the last iterate.

        int64; label 0 is the largest group of an image, -1 stands for groups of fewer than ``min_size``.
        """
        points, weights = _points(*_pairwise.in_float32(embedding, weights))  # nothing is rounded in between
        found = assign_modes(self._shift(points, weights, return_all=False), threshold, min_size)
        return found.unflatten(-1, embedding.shape[2:]) if embedding.dim() == 4 else found

    def _shift(self, points: Tensor, weights: Tensor | None, return_all: bool) -> Tensor:
        return mean_shift(points, self.kappa, self.eta, self.iterations, weights, return_all, tol=self.tol)

    def extra_repr(self) -> str:
        learned = self.log_kappa
        kappa = self._first_kappa if learned is None or learned.is_meta else learned.detach().exp().item()
        parts = [f"kappa={kappa:g}", f"eta={self.eta}", f"iterations={self.iterations}"]
        if self.log_kappa is not None:
            parts.append("learn_kappa=True")
        if self.return_all:
            parts.append("return_all=True")
        if self.tol is not None:
            parts.append(f"tol={self.tol}")
        return ", ".join(parts)


def _points(embedding: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """[B, N, D] and [B, N], from maps or as they are."""
    check_type(_NAME, "embedding", embedding, "Tensor", Tensor)
    if embedding.dim() not in (3, 4):
        raise ValueError(
            f"{_NAME}: expected embedding of shape [B, D, H, W] or [B, N, D], got {list(embedding.shape)}"
        )
    if embedding.dim() == 3:
        return embedding, weights
    if weights is not None:
        check_type(_NAME, "weights", weights, "Tensor", Tensor)
        expected = [embedding.shape[0], *embedding.shape[2:]]
        if list(weights.shape) != expected:
            raise ValueError(
                f"{_NAME}: expected weights of shape [B, H, W] = {expected}, got {list(weights.shape)}"
            )
        weights = weights.flatten(1)
    return embedding.flatten(2).mT, weights
