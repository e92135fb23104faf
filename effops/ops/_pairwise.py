"""What the ops on all pairs of points share: sets of points with and without a batch, checks, vmap, FLOPs.

The torch ops take float32 and float64; the public functions cast half precision to float32.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effops.ops import _vmap
from effops.ops._checks import ShapeChecker, check_backend, check_integer, check_type

DTYPES = (torch.float32, torch.float64)
HALF_DTYPES = (torch.bfloat16, torch.float16)
#: Of a point.
MAX_CHANNELS = 512

# ------------------------------------------------------------------------------------------ inputs


def is_half(x: object) -> bool:
    """Whether it is a tensor of half precision."""
    return isinstance(x, Tensor) and x.dtype in HALF_DTYPES


def _under_autocast(x: Tensor) -> bool:
    """Never on the meta device, of which torch would not know."""
    return x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)


def in_float32(x: Any, *others: Any) -> tuple[Any, ...]:
    """Half-precision points in float32, and so what comes along with them; all else as it is.

    Under autocast what comes along may be half precision beside float32 points.
    """
    values = (x, *others)
    if not is_half(x) and not (isinstance(x, Tensor) and _under_autocast(x)):
        return values
    return tuple(value.float() if is_half(value) else value for value in values)


def rounded(result: Tensor, x: Tensor) -> Tensor:
    """The float32 result for half-precision points in their dtype; under autocast it stays float32."""
    keeps = not is_half(x) or _under_autocast(x)
    return result if keeps else result.to(x.dtype)


def is_set(x: object) -> bool:
    """Whether the points are a single set [N, D], without a batch."""
    return isinstance(x, Tensor) and x.dim() == 2


def with_batch(*values: Any) -> tuple[Any, ...]:
    """Tensors of a single set as a batch of one."""
    return tuple(value.unsqueeze(0) if isinstance(value, Tensor) else value for value in values)


# ------------------------------------------------------------------------------------------ checks


def check_points(op: str, argument: str, points: Tensor, single: bool) -> ShapeChecker:
    """Raises unless they are points [B, N, D], or [N, D] of a single set."""
    check = ShapeChecker(op)
    check.match(argument, points, "ND" if single else "BND")
    check.dtype(argument, points, *DTYPES)
    channels = points.shape[-1]
    if channels < 1 or channels > MAX_CHANNELS:
        raise ValueError(
            f"{op}: expected {argument} of 1 to {MAX_CHANNELS} channels, got shape {list(points.shape)}"
        )
    check_backend(op, points)
    return check


def check_beside(check: ShapeChecker, argument: str, tensor: Tensor, pattern: str, x: Tensor) -> None:
    """Raises unless the tensor has the pattern, with a batch if x has one, and the dtype and device of x."""
    check.match(argument, tensor, f"B{pattern}" if "B" in check.sizes else pattern)
    check.dtype(argument, tensor, x.dtype)
    check.device(argument, tensor, "x", x)


def check_finite(op: str, argument: str, value: float, least: float = -math.inf) -> None:
    """Raises unless it is a finite number of at least the given one."""
    check_type(op, argument, value, "float", float, int, torch.SymFloat, torch.SymInt)
    if not (least <= value and -math.inf < value < math.inf):
        bound = "" if least == -math.inf else f" >= {least:g}"
        raise ValueError(f"{op}: expected finite {argument}{bound}, got {value}")


def check_at_least(op: str, argument: str, value: int, least: int) -> None:
    """Raises unless it is an integer of at least the given one."""
    check_integer(op, argument, value)
    if value < least:
        raise ValueError(f"{op}: expected {argument} >= {least}, got {value}")


def check_number(op: str, argument: str, value: int, count: int) -> None:
    """Raises unless it is the schema's number of one of so many options."""
    check_integer(op, argument, value)
    if value < 0 or value >= count:
        raise ValueError(f"{op}: expected {argument} in [0, {count - 1}], got {value}")


# ------------------------------------------------------------------------------------------ vmap


def fold(value: Any, in_dim: int | None, size: int, position: int = 0) -> Any:
    """Moves vmap's dimension of a tensor into the batch, the dimension at the position: size * B there."""
    if not isinstance(value, Tensor):
        return value
    members = _vmap.move_to_front(value, in_dim, size).movedim(0, position)
    return members.flatten(position, position + 1)


def unfold(result: Tensor, size: int, position: int = 0) -> Tensor:
    """The reverse, with vmap's dimension at the position. There is at least one member."""
    return result.unflatten(position, (size, result.shape[position] // size))


def install_folding_vmap(name: str) -> None:
    """Registers the vmap rule of ``effops::<name>(points, numbers...)``: the members join the batch."""
    op = getattr(torch.ops.effops, name).default

    def rule(info: Any, in_dims: Sequence[int | None], points: Tensor, *numbers: Any) -> tuple[Tensor, int]:
        size = info.batch_size
        if _vmap.must_loop(size):
            outputs, out_dims = _vmap.loop(op, (points, *numbers), in_dims, size)
            return outputs, out_dims
        return unfold(op(fold(points, in_dims[0], size), *numbers), size), 0

    torch.library.register_vmap(f"effops::{name}", rule)


def install_looping_vmap(name: str) -> None:
    """Registers one call per member of vmap for ``effops::<name>``."""
    op = getattr(torch.ops.effops, name).default

    def rule(info: Any, in_dims: Sequence[int | None], *inputs: Any) -> tuple[Any, Any]:
        return _vmap.loop(op, inputs, in_dims, info.batch_size)

    torch.library.register_vmap(f"effops::{name}", rule)


# ------------------------------------------------------------------------------------------ FLOPs


def pair_flops(per_channel: int, x: Any, rows: int | None = None) -> int:
    """So many per channel of every pair of one of the rows (None: of the points) and one of the points.

    ``x`` is the shape of the points. Pairs that kernels skip or meet once for both orders count in full.
    """
    batch, points, channels = x
    return per_channel * batch * (points if rows is None else rows) * points * channels
