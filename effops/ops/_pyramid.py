"""What the ops that read pyramids (lists of maps [B, C, H_l, W_l]) share."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from effops.ops import _vmap
from effops.ops._autograd import library
from effops.ops._checks import FLOAT_DTYPES, ShapeChecker

#: CUDA kernels get the maps' addresses and sizes in their arguments.
MAX_CUDA_LEVELS = 32


def check_pyramid(check: ShapeChecker, pyramid: Sequence[Tensor]) -> None:
    """The metadata checks of csrc/sampling/pyramid.h; puts B and C into ``check.sizes``."""
    if not isinstance(pyramid, (list, tuple)):
        raise TypeError(f"{check.op}: expected pyramid to be a list of Tensors, got {type(pyramid).__name__}")
    if len(pyramid) == 0:
        raise ValueError(f"{check.op}: expected at least one map in pyramid, got none")
    for index, feature in enumerate(pyramid):
        argument = f"pyramid[{index}]"
        level = ShapeChecker(check.op)  # H and W differ from map to map
        level.sizes = {letter: check.sizes[letter] for letter in "BC" if letter in check.sizes}
        level.match(argument, feature, "BCHW")
        check.sizes |= {"B": level.sizes["B"], "C": level.sizes["C"]}
        check.dtype(argument, feature, *(FLOAT_DTYPES if index == 0 else (pyramid[0].dtype,)))
        check.device(argument, feature, "pyramid[0]", pyramid[0])
    if pyramid[0].device.type == "cuda" and len(pyramid) > MAX_CUDA_LEVELS:
        raise ValueError(
            f"{check.op}: expected at most {MAX_CUDA_LEVELS} maps in pyramid on CUDA, got {len(pyramid)}"
        )


def new_gradients(pyramid: Sequence[Tensor], needed: bool) -> list[Tensor]:
    """Uninitialised gradients of the maps, as the kernels return them."""
    return [feature.new_empty(feature.shape if needed else (0,)) for feature in pyramid]


def refuse_second_derivatives(name: str) -> None:
    """Makes differentiating ``effops::<name>_backward``, which takes a list, an error."""

    def refuse(ctx: Any, *grad_outputs: Any) -> NoReturn:
        raise RuntimeError(f"{name}: second derivatives are not supported")

    torch.library.register_autograd(f"effops::{name}_backward", refuse)


# ------------------------------------------------------------------------------------------ vmap


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


def fold_pyramid(
    pyramid: Sequence[Tensor], in_dims: Sequence[int | None], size: int, always: bool = False
) -> tuple[list[Tensor], int]:
    """Maps [size * B, C, H, W], and the images by which those of two members of vmap are apart.

    A pyramid that all members share stays as it is (images 0 apart), unless ``always``.
    """
    if not always and all(in_dim is None for in_dim in in_dims):
        return list(pyramid), 0
    batched = [
        _vmap.move_to_front(feature, in_dim, size) for feature, in_dim in zip(pyramid, in_dims, strict=True)
    ]
    return [feature.flatten(0, 1) for feature in batched], batched[0].shape[1]


def unfold(tensor: Tensor, size: int) -> Tensor:
    """[size * N, ...] -> [size, N, ...]."""
    return tensor.unflatten(0, (size, tensor.shape[0] // max(size, 1)))
