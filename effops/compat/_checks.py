"""Checks of shapes and settings that the functions share."""

from torch import Tensor

from effops.ops._checks import check_integer, check_type


def check_shape(name: str, argument: str, tensor: Tensor, **sizes: int) -> None:
    """Raises unless it is a tensor of these sizes, which come with the names of the dimensions."""
    check_type(name, argument, tensor, "Tensor", Tensor)
    if tensor.dim() != len(sizes) or any(
        got != size for got, size in zip(tensor.shape, sizes.values(), strict=True)
    ):
        expected = ", ".join(f"{letters}={size}" for letters, size in sizes.items())
        raise ValueError(f"{name}: expected {argument} of shape [{expected}], got {list(tensor.shape)}")


def check_factor(name: str, argument: str, value: int) -> None:
    """Raises unless it is an integer of at least 1."""
    check_integer(name, argument, value)
    if value < 1:
        raise ValueError(f"{name}: expected {argument} >= 1, got {value}")


def check_groups(name: str, argument: str, groups: int, channels: int) -> None:
    """Raises unless the channels can be divided into so many groups."""
    check_factor(name, argument, groups)
    if channels % groups != 0:
        raise ValueError(f"{name}: expected {argument} that divides {channels} channels, got {groups}")


def check_odd(name: str, argument: str, kernel: int) -> None:
    """Raises unless windows of this side have a centre."""
    check_factor(name, argument, kernel)
    if kernel % 2 == 0:
        raise ValueError(f"{name}: expected an odd {argument}, got {kernel}")
