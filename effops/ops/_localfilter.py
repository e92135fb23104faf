"""What the ops on K x K windows share: settings by name, checks, the vmap rule."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effops.ops import _vmap
from effops.ops._checks import ShapeChecker, check_integer

# The schema's numbers.
NORMALIZE = {"softmax": 0, "none": 1, "sum": 2}
PADDING_MODES = {"zeros": 0, "replicate": 1, "reflect": 2, "renormalize": 3}
BORDERS = {"mask": 3, "zero": 0}

#: Factors, and the reach of a window, stay below, so that no sum of them overflows.
_END = 2**31


def accumulator_dtype(tensor: Tensor) -> torch.dtype:
    """Of sums, flows and log-sum-exps."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------------ checks


def check_factor(op: str, argument: str, value: int) -> None:
    """Raises unless it is an integer in [1, 2^31)."""
    check_integer(op, argument, value)
    if value < 1 or value >= _END:
        raise ValueError(f"{op}: expected {argument} from 1 to 2^31 - 1, got {value}")


def check_dilation(op: str, dilation: int, kernel: int) -> None:
    """Raises unless windows of kernel x kernel taps this far apart reach less than 2^31 pixels."""
    check_factor(op, "dilation", dilation)
    if dilation * (kernel - 1) >= _END:
        raise ValueError(
            f"{op}: expected dilation times (window - 1) of less than 2^31, got {dilation} and {kernel} - 1"
        )


def check_window(op: str, window: int, dilation: int) -> None:
    """Raises unless they are those of a window."""
    check_factor(op, "window", window)
    check_dilation(op, dilation, window)


def kernel_of(op: str, argument: str, maps: Tensor, groups: int) -> int:
    """K of maps with groups * K * K channels; raises ValueError if there is none."""
    channels = int(maps.shape[1])  # a part of the graph's shape, also under torch.compile
    taps = channels // groups
    kernel = math.isqrt(taps)
    if kernel < 1 or kernel >= _END or kernel * kernel * groups != channels:
        raise ValueError(
            f"{op}: expected {argument} with groups={groups} times K * K channels, K >= 1, "
            f"got {list(maps.shape)}"
        )
    return kernel


def check_rank(check: ShapeChecker, argument: str, maps: Tensor, shape: str) -> None:
    """Raises unless it is a tensor of 4 dimensions; the shape is for the message."""
    check.tensor(argument, maps)
    if maps.dim() != 4:
        raise ValueError(f"{check.op}: expected {argument} of shape {shape}, got {list(maps.shape)}")


# ------------------------------------------------------------------------------------------ results


def new_normalizer(filters: Tensor, groups: int, normalize: int, padding_mode: int = 0) -> Tensor:
    """Uninitialised: what the weights of each pixel are divided by, [N, groups, Ho, Wo]; [0] for nothing."""
    batch, _, height, width = filters.shape
    is_saved = normalize != NORMALIZE["none"] or padding_mode == PADDING_MODES["renormalize"]
    shape = (batch, groups, height, width) if is_saved else (0,)
    return filters.new_empty(shape, dtype=accumulator_dtype(filters))


# ------------------------------------------------------------------------------------------ vmap


def install_vmap(name: str) -> None:
    """Registers the vmap rules of ``effops::<name>`` and of its backward op: the members join the batch."""
    for op_name in (name, f"{name}_backward"):
        op = getattr(torch.ops.effops, op_name).default

        def rule(info: Any, in_dims: tuple[Any, ...], *inputs: Any, op: Any = op) -> tuple[Any, Any]:
            return _fold_all(op, in_dims, inputs, info.batch_size)

        torch.library.register_vmap(f"effops::{op_name}", rule)


def _fold_all(op: Any, in_dims: Sequence[Any], inputs: Sequence[Any], size: int) -> tuple[Any, Any]:
    if _vmap.must_loop(size):
        return _vmap.loop(op, inputs, in_dims, size)
    outputs = op(*(_fold(value, dim, size) for value, dim in zip(inputs, in_dims, strict=True)))
    if isinstance(outputs, Tensor):
        return _vmap.unfold(outputs, size), 0
    unfolded = tuple(tensor if _stands_for_none(tensor) else _vmap.unfold(tensor, size) for tensor in outputs)
    return unfolded, tuple(None if _stands_for_none(tensor) else 0 for tensor in outputs)


def _stands_for_none(tensor: Tensor) -> bool:
    """[0], where everything else has a batch and sides."""
    return tensor.dim() == 1


def _fold(value: Any, in_dim: int | None, size: int) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.dim() == (1 if in_dim is None else 2):
        return value.new_empty((0,))
    return _vmap.fold(value, in_dim, size)


# ------------------------------------------------------------------------------------------ FLOPs


def tap_flops(taps: Any, components: int) -> int:
    """2 per tap of maps [N, groups * K * K, H, W], given by their shape, and component."""
    batch, channels, height, width = taps
    return 2 * batch * channels * height * width * components


def window_flops(maps: Any, window: int, components: int) -> int:
    """The same for the windows around the pixels of maps [N, C, H, W]."""
    batch, _, height, width = maps
    return tap_flops((batch, window * window, height, width), components)
