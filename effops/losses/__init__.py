"""Losses as modules, around the functions of `effops.ops`."""

from effops.losses.pairwise_embedding_loss import PairwiseEmbeddingLoss

__all__ = ["PairwiseEmbeddingLoss"]
