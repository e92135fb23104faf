"""What the convolutions at chosen cells share."""

from typing import Any

from torch import Tensor

from effops.ops._checks import check_integer

#: Sides, paddings and the reach of a kernel stay below, so that no sum of them overflows.
_END = 2**31


def check_groups(op: str, groups: int, in_channels: int, out_channels: int) -> None:
    """Raises unless the groups divide the channels."""
    check_integer(op, "groups", groups)
    if groups < 1 or in_channels % groups != 0 or out_channels % groups != 0:
        raise ValueError(
            f"{op}: expected groups >= 1 that divides {in_channels} input and {out_channels} output "
            f"channels, got {groups}"
        )


def check_dilation(op: str, argument: str, dilation: int, kernel: int, least: int) -> None:
    """Raises ValueError for a dilation below the least, or with which the kernel reaches too far."""
    if dilation < least:
        raise ValueError(f"{op}: expected {argument} >= {least}, got {dilation}")
    if dilation >= _END or dilation * (kernel - 1) >= _END:
        raise ValueError(
            f"{op}: expected {argument} times (kernel size - 1) of less than 2^31, "
            f"got {dilation} and {kernel} - 1"
        )


def check_pair(op: str, argument: str, pair: Any, least: int) -> None:
    """Raises unless it is a pair of integers in [least, 2^31)."""
    if len(pair) != 2:
        raise ValueError(f"{op}: expected {argument} of 2 numbers, got {len(pair)}")
    for value in pair:
        check_integer(op, argument, value)
        if value < least or value >= _END:
            raise ValueError(f"{op}: expected {argument} from {least} to 2^31 - 1, got {value}")


# ------------------------------------------------------------------------------------------ vmap


def unfold_dim(tensor: Tensor, dim: int, size: int) -> Tensor:
    """[..., size * N, ...] -> [..., size, N, ...]."""
    return tensor.unflatten(dim, (size, tensor.shape[dim] // max(size, 1)))


# ------------------------------------------------------------------------------------------ FLOPs


def product_flops(weight: Any, positions: int) -> int:
    """2 per position and element of a weight [O, C / groups, kh, kw], given by its shape."""
    outputs, inputs, kernel_height, kernel_width = weight
    return 2 * positions * outputs * inputs * kernel_height * kernel_width
