"""Dense maps and a mask of their active cells as an SPS."""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effops._sps import SPS
from effops.ops import _autocast, _autograd, _vmap
from effops.ops._checks import FLOAT_DTYPES, ShapeChecker, check_backend, explain
from effops.ops._sps import Fields, need_int64

_NAME = "sps_from_dense"
_op = torch.ops.effops.sps_from_dense.default
_backward_op = torch.ops.effops.sps_from_dense_backward.default


def sps_from_dense(
    x: Tensor,  # [R, F, H, W]
    mask: Tensor,  # [R, H, W]
) -> SPS:
    r"""Stores maps as rows, one per cell: the active cells that a mask names, and the passive others.

    .. math::
        cat([active, passive])[index\_map[r, y, x]] = x[r, :, y, x], \qquad
        index\_map[r, y, x] < NA \iff mask[r, y, x]

    Active rows are in (map, y, x) order, and so are passive rows: nothing is shared between cells until
    :func:`sps_refine` doubles the resolution. :func:`sps_to_dense` is the reverse.

    Args:
        x: R maps of F features, [R, F, H, W]. float32, float64, bfloat16 or float16.
        mask: Which cells are active, [R, H, W] bool.

    Returns:
        An :class:`effops.SPS` with NA active and NP = R H W - NA passive rows, all tensors new and
        contiguous. Its ``index_map`` is int32; int64 from 2^31 cells on (under ``torch.compile`` with
        dynamic sizes int32 is assumed).

    Raises:
        ValueError: wrong ranks or sizes, tensors on different devices, and vmap, which is not supported.
        TypeError: wrong dtypes, or an argument that is no tensor.
        RuntimeError: no kernels for the device in this installation.

    The sizes of the result depend on the data: on CUDA the host waits for them, and ``torch.compile`` needs
    ``torch._dynamo.config.capture_dynamic_output_shape_ops = True`` to keep the op in one graph.
    Differentiable in ``x``, once. Deterministic. ``torch.func.grad`` is not supported.

    Source: C. Picron, PhD thesis, section 5.3.2.
    """
    try:
        return SPS(*_op(x, mask))
    except (RuntimeError, TypeError) as error:
        return explain(_NAME, error, lambda: _check(x, mask))


def _check(x: Tensor, mask: Tensor) -> ShapeChecker:
    """The metadata checks of csrc/rowconv/sps_dense.h."""
    check = ShapeChecker(_NAME)
    check.match("x", x, "RFHW")
    check.match("mask", mask, "RHW")
    check.dtype("x", x, *FLOAT_DTYPES)
    check.dtype("mask", mask, torch.bool)
    check.device("mask", mask, "x", x)
    check_backend(_NAME, x)
    return check


# ------------------------------------------------------------------------------------------ fake


@torch.library.register_fake("effops::sps_from_dense")
def _fake(x: Tensor, mask: Tensor) -> Fields:
    features = _check(x, mask).sizes["F"]
    context = torch.library.get_ctx()
    actives, passives = context.new_dynamic_size(), context.new_dynamic_size()
    id_dtype = torch.int64 if need_int64(mask.numel()) else torch.int32
    return (
        x.new_empty((actives, features)),
        x.new_empty((passives, features)),
        mask.new_empty(mask.shape, dtype=id_dtype),
        mask.new_empty((actives,), dtype=torch.int32),
        mask.new_empty((actives, 2), dtype=torch.int32),
    )


@torch.library.register_fake("effops::sps_from_dense_backward")
def _fake_backward(grad_active: Tensor, grad_passive: Tensor, index_map: Tensor) -> Tensor:
    maps, height, width = index_map.shape
    return grad_active.new_empty((maps, grad_active.shape[1], height, width))


# ------------------------------------------------------------------------------------------ autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: Fields) -> None:
    active, passive, index_map, _, _ = output
    ctx.set_materialize_grads(False)  # torch would make zeros for the integers, too
    ctx.shapes = active.shape, passive.shape
    ctx.save_for_backward(index_map)


def _backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = _autograd.materialize(grad_outputs[:2], ctx.shapes)
    if gradients is None:
        return None, None
    (index_map,) = ctx.saved_tensors
    return _backward_op(*gradients, index_map), None


_autograd.install(_NAME, _save, _backward, differentiable=(0,))
_autograd.refuse_second_derivatives(_NAME, differentiable=(0, 1))

# ------------------------------------------------------------------------------------------ autocast

_autocast.install(_NAME, (_autocast.CAST, _autocast.KEEP))

# ------------------------------------------------------------------------------------------ vmap


@torch.library.register_vmap("effops::sps_from_dense")
def _vmap_rule(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> NoReturn:
    raise ValueError(f"{_NAME}: vmap is not supported: the numbers of rows depend on the data")


@torch.library.register_vmap("effops::sps_from_dense_backward")
def _vmap_backward_rule(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Tensor, int]:
    return _vmap.loop(_backward_op, inputs, in_dims, info.batch_size)


# ------------------------------------------------------------------------------------------ FLOPs


@register_flop_formula(torch.ops.effops.sps_from_dense)
def _flops(x: Any, mask: Any, *, out_shape: Any = None, **_: Any) -> int:
    """1 per cell, which is counted; copying the features is not."""
    maps, height, width = mask
    return maps * height * width


@register_flop_formula(torch.ops.effops.sps_from_dense_backward)
def _backward_flops(grad_active: Any, grad_passive: Any, index_map: Any, **_: Any) -> int:
    """1 per cell and feature, as for the backward of :func:`sps_to_dense`, which adds them up."""
    maps, height, width = index_map
    return maps * height * width * grad_active[1]
