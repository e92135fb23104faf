"""What the ops that read pyramids (lists of maps [B, C, H_l, W_l]) share."""

from collections.abc import Sequence

from torch import Tensor

from effops.ops import _vmap
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


# ------------------------------------------------------------------------------------------ vmap


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
