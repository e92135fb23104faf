"""An SPS as dense maps."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effops._sps import SPS
from effops.ops import _autocast, _autograd, _sps, _vmap
from effops.ops._checks import ShapeChecker, check_backend, explain

_NAME = "sps_to_dense"
_op = torch.ops.effops.sps_to_dense.default
_backward_op = torch.ops.effops.sps_to_dense_backward.default


def sps_to_dense(
    sps: SPS,
) -> Tensor:  # [R, F, H, W]
    r"""The maps that an SPS stands for: every cell with the features of its row.

    .. math::
        out[r, :, y, x] = cat([active, passive])[index\_map[r, y, x]]

    Args:
        sps: R maps of H x W cells with F features, as :func:`sps_from_dense` and :func:`sps_refine` make
            them. Features in float32, float64, bfloat16 or float16.

    Returns:
        [R, F, H, W], contiguous, in the dtype of the features.

    Raises:
        ValueError: fields of wrong ranks or sizes, or on different devices, and on the CPU an id, a map or a
            cell that is read and out of range. CUDA kernels give 0 for such an id (the host never waits for
            them).
        TypeError: fields of wrong dtypes, or an argument that is no :class:`effops.SPS`.
        RuntimeError: no kernels for the device in this installation.

    Differentiable in ``sps.active`` and ``sps.passive``, once; a passive row gets the sum over its cells, in
    float32 (float64 for float64), rounded once. The gradient of an active row is read at the cell that
    ``roi`` and ``xy`` name. Deterministic on the CPU for any number of threads; on CUDA under
    ``torch.use_deterministic_algorithms(True)``. vmap may batch every field. ``torch.func.grad`` is not
    supported.

    Source: C. Picron, PhD thesis, section 5.3.2.
    """
    fields = _sps.fields_of(_NAME, sps)
    try:
        return _op(*fields)
    except (RuntimeError, TypeError) as error:
        return explain(_NAME, error, lambda: _check(*fields))


def _check(active: Tensor, passive: Tensor, index_map: Tensor, roi: Tensor, xy: Tensor) -> ShapeChecker:
    """The metadata checks of csrc/rowconv/sps_dense.h."""
    check = ShapeChecker(_NAME)
    _sps.check_sps(check, active, passive, index_map, roi, xy)
    check_backend(_NAME, active)
    return check


# ------------------------------------------------------------------------------------------ fake


@torch.library.register_fake("effops::sps_to_dense")
def _fake(active: Tensor, passive: Tensor, index_map: Tensor, roi: Tensor, xy: Tensor) -> Tensor:
    sizes = _check(active, passive, index_map, roi, xy).sizes
    return active.new_empty((sizes["R"], sizes["F"], sizes["H"], sizes["W"]))


@torch.library.register_fake("effops::sps_to_dense_backward")
def _fake_backward(
    grad_output: Tensor,
    active: Tensor,
    passive: Tensor,
    index_map: Tensor,
    roi: Tensor,
    xy: Tensor,
    need_active: bool,
    need_passive: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    grad_active = active.new_empty(active.shape if need_active else (0,))
    return grad_active, passive.new_empty(passive.shape if need_passive else (0,))


# ------------------------------------------------------------------------------------------ autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    need_active, need_passive, *_ = ctx.needs_input_grad
    deterministic = torch.are_deterministic_algorithms_enabled()
    grad_active, grad_passive = _backward_op(
        grad_output, *ctx.saved_tensors, need_active, need_passive, deterministic
    )
    gradients = (grad_active if need_active else None, grad_passive if need_passive else None)
    return *gradients, None, None, None


_autograd.install(_NAME, _save, _backward, differentiable=(0, 1))
_autograd.refuse_second_derivatives(_NAME, differentiable=(0, 1, 2))

# ------------------------------------------------------------------------------------------ autocast

_autocast.install(_NAME, _sps.AUTOCAST)

# ------------------------------------------------------------------------------------------ vmap


@torch.library.register_vmap("effops::sps_to_dense")
def _vmap_rule(info: Any, in_dims: tuple[int | None, ...], *fields: Tensor) -> tuple[Tensor, int]:
    size = info.batch_size
    if _vmap.must_loop(size):
        return _vmap.loop(_op, fields, in_dims, size)
    return _vmap.unfold(_op(*_sps.fold_sps(fields, in_dims, size)), size), 0


@torch.library.register_vmap("effops::sps_to_dense_backward")
def _vmap_backward_rule(
    info: Any, in_dims: tuple[int | None, ...], grad_output: Tensor, *inputs: Any
) -> tuple[Any, Any]:
    size = info.batch_size
    if _vmap.must_loop(size):
        return _vmap.loop(_backward_op, (grad_output, *inputs), in_dims, size)
    fields, flags = inputs[:5], inputs[5:]
    grad = _vmap.fold(grad_output, in_dims[0], size)
    gradients = _backward_op(grad, *_sps.fold_sps(fields, in_dims[1:6], size), *flags)
    return _sps.unfold_gradients(gradients, flags[:2], size)


# ------------------------------------------------------------------------------------------ FLOPs


@register_flop_formula(torch.ops.effops.sps_to_dense)
def _flops(active: Any, passive: Any, index_map: Any, *args: Any, out_shape: Any = None, **_: Any) -> int:
    """1 per cell, whose id is looked up; copying the features is not counted."""
    maps, height, width = index_map
    return maps * height * width


@register_flop_formula(torch.ops.effops.sps_to_dense_backward)
def _backward_flops(grad_output: Any, *args: Any, **_: Any) -> int:
    """An addition per cell and feature."""
    maps, features, height, width = grad_output
    return maps * features * height * width
