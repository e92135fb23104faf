"""Helpers for vmap rules: every op has a batch dimension, into which vmap's dimension is folded."""

from torch import Tensor


def move_to_front(tensor: Tensor, in_dim: int | None, size: int) -> Tensor:
    """[size, ...], from an argument that vmap batches in ``in_dim``, or that all members share."""
    return tensor.expand(size, *tensor.shape) if in_dim is None else tensor.movedim(in_dim, 0)


def fold(tensor: Tensor, in_dim: int | None, size: int) -> Tensor:
    """Moves vmap's dimension into the batch: [size, B, ...] -> [size * B, ...]."""
    batched = move_to_front(tensor, in_dim, size)
    return batched.reshape(size * batched.shape[1], *batched.shape[2:])


def unfold(tensor: Tensor, size: int) -> Tensor:
    """The reverse: [size * B, ...] -> [size, B, ...]."""
    return tensor.reshape(size, tensor.shape[0] // max(size, 1), *tensor.shape[1:])


def require_shared(op: str, argument: str, in_dim: int | None) -> None:
    """Raises ValueError for an argument that all members of the vmap must share."""
    if in_dim is not None:
        raise ValueError(f"{op}: expected {argument} to be shared by all of vmap, got one per member")
