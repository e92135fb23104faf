"""Helpers for vmap rules: every op has a batch dimension, into which vmap's dimension is folded."""

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from effops.ops._autograd import library


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


def must_loop(size: int, *in_dims: int | None) -> bool:
    """Whether an argument that does not fold is batched; without members there is nothing to fold."""
    return size == 0 or any(in_dim is not None for in_dim in in_dims)


def loop(function: Callable[..., Any], args: Sequence[Any], in_dims: Sequence[Any], size: int) -> Any:
    """One call per member of vmap, with the outputs stacked in front; for arguments that do not fold.

    Returns the outputs and vmap's dimension of each, in one structure: (outputs, out_dims).
    """
    flat, structure = tree_flatten(tuple(args))
    dims, _ = tree_flatten(tuple(in_dims))

    def call(change: Callable[[Any, int | None], Any]) -> tuple[list[Tensor], Any]:
        leaves = [change(value, dim) for value, dim in zip(flat, dims, strict=True)]
        return tree_flatten(function(*tree_unflatten(leaves, structure)))

    if size > 0:
        members = [call(partial(_member, k)) for k in range(size)]
        stacked = [torch.stack(tensors) for tensors in zip(*(found for found, _ in members), strict=True)]
        out_structure = members[0][1]
    else:
        device = next(value.device for value in flat if isinstance(value, Tensor))
        found, out_structure = call(_without_values)
        stacked = [tensor.new_empty((0, *tensor.shape), device=device) for tensor in found]
    return tree_unflatten(stacked, out_structure), tree_unflatten([0] * len(stacked), out_structure)


def _member(k: int, value: Any, dim: int | None) -> Any:
    return value if dim is None else value.select(dim, k)


def _without_values(value: Any, dim: int | None) -> Any:
    """What one member would have, on the meta device, where fake kernels find the sizes of the outputs."""
    if not isinstance(value, Tensor):
        return value
    shape = value.shape if dim is None else value.movedim(dim, 0).shape[1:]
    return value.new_empty(shape, device="meta")


def support_batched_gradients(name: str, rule: Callable[..., tuple[Any, Any]]) -> None:
    """Makes ``torch.autograd.grad(..., is_grads_batched=True)`` work, with the vmap rule of the backward op.

    It uses torch's first implementation of vmap, whose fallback (a loop) refuses ops that take lists.
    """
    is_batched = torch._C._functorch.is_legacy_batchedtensor

    def kernel(*inputs: Any) -> Any:
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        sizes: list[int] = []

        def unwrap(value: Any) -> Any:
            if not isinstance(value, Tensor) or not is_batched(value):
                return value
            tensor = torch._remove_batch_dim(value, level, 1, 0)
            sizes.append(tensor.shape[0])
            return tensor

        def wrap(tensor: Tensor, out_dim: int | None) -> Tensor:
            return tensor if out_dim is None else torch._add_batch_dim(tensor, out_dim, level)

        def in_dim(value: Any) -> int | None:
            return 0 if isinstance(value, Tensor) and is_batched(value) else None

        in_dims = tree_map(in_dim, inputs)
        plain = tree_map(unwrap, inputs)
        outputs, out_dims = rule(SimpleNamespace(batch_size=sizes[0]), in_dims, *plain)
        return tree_map(wrap, outputs, out_dims)

    library.impl(f"{name}_backward", kernel, "Batched")
