"""An SPS at the next resolution, with fewer cells active."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effops._sps import SPS
from effops.ops import _autocast, _autograd, _sps, _vmap
from effops.ops._checks import (
    FLOAT_DTYPES,
    ShapeChecker,
    check_backend,
    check_integer,
    check_type,
    explain,
)

_NAME = "sps_refine"
_op = torch.ops.effops.sps_refine.default
_backward_op = torch.ops.effops.sps_refine_backward.default


def sps_refine(
    sps: SPS,
    scores: Tensor,  # [NA]
    num_refine: int,
    upsample: bool = True,
) -> SPS:
    r"""Keeps the active cells of the highest scores, makes the others passive, and doubles the resolution.

    The :math:`K = \min(num\_refine, NA)` highest scores of all maps together stay active; of equal scores
    the lowest row goes first, and NaN is higher than every number (as in ``torch.topk``). Kept rows stay in
    their order, as p = 0 ... K - 1. Demoted rows are appended to the old passive ones, in their order; a
    passive row never becomes active. Then every cell becomes 2 x 2 cells:

    .. math::
        active'[4 p + c] = active[p], \qquad
        xy'[4 p + c] = 2\,xy[p] + (c \bmod 2,\; \lfloor c / 2 \rfloor), \qquad c = 0 \dots 3

    while a passive row serves all four, so that nothing of it is copied. Ids become: kept row p with child
    c: 4 p + c; old passive row q: NA' + q; demoted row j: NA' + NP + j. With ``upsample=False`` only the
    ids change, as with one child per kept row.

    Args:
        sps: R maps of H x W cells; NA active rows with F features in float32, float64, bfloat16 or float16.
        scores: How much each active cell is in need of refinement, [NA], any of these dtypes.
        num_refine: How many cells to keep active, 0 or more.
        upsample: Whether to double the resolution.

    Returns:
        A new :class:`effops.SPS` of NA' = 4 K active rows, NP' = NP + NA - K passive rows and maps of
        2 H x 2 W cells; without upsampling of K active rows and H x W cells. These sizes do not depend on
        values. ``index_map`` keeps its dtype, but becomes int64 from 2^31 rows on.

    Raises:
        ValueError: wrong ranks or sizes, a negative ``num_refine``, tensors on different devices, and on the
            CPU an id, a map or a cell that is read and out of range. CUDA kernels turn such an id
            into -1 (the host never waits for them).
        TypeError: wrong dtypes, or an argument of another kind.
        RuntimeError: no kernels for the device in this installation.

    Differentiable in ``sps.active`` and ``sps.passive``, once: a kept row gets the sum over its children.
    There is no gradient to ``scores``. Deterministic. vmap may batch every field and ``scores`` (a loop over
    its members). ``torch.func.grad`` is not supported.

    Source: C. Picron, PhD thesis, section 5.3.2.
    """
    fields = _sps.fields_of(_NAME, sps)
    try:
        return SPS(*_op(*fields, scores, num_refine, upsample)[:5])
    except (RuntimeError, TypeError) as error:
        return explain(_NAME, error, lambda: _check(*fields, scores, num_refine, upsample))


def _check(
    active: Tensor,
    passive: Tensor,
    index_map: Tensor,
    roi: Tensor,
    xy: Tensor,
    scores: Tensor,
    num_refine: int,
    upsample: bool,
) -> ShapeChecker:
    """The metadata checks of csrc/rowconv/sps_refine.h."""
    check = ShapeChecker(_NAME)
    _sps.check_sps(check, active, passive, index_map, roi, xy)
    check.match("scores", scores, "A")
    check.dtype("scores", scores, *FLOAT_DTYPES)
    check.device("scores", scores, "active", active)
    check_integer(_NAME, "num_refine", num_refine)
    if num_refine < 0:
        raise ValueError(f"{_NAME}: expected num_refine >= 0, got {num_refine}")
    check_type(_NAME, "upsample", upsample, "bool", bool)
    check_backend(_NAME, active)
    return check


# ------------------------------------------------------------------------------------------ fake


@torch.library.register_fake("effops::sps_refine")
def _fake(
    active: Tensor,
    passive: Tensor,
    index_map: Tensor,
    roi: Tensor,
    xy: Tensor,
    scores: Tensor,
    num_refine: int,
    upsample: bool,
) -> tuple[Tensor, ...]:
    sizes = _check(active, passive, index_map, roi, xy, scores, num_refine, upsample).sizes
    kept = torch.sym_min(num_refine, sizes["A"])
    children, scale = (4, 2) if upsample else (1, 1)
    actives, passives = children * kept, sizes["P"] + sizes["A"] - kept
    id_dtype = torch.int64 if _sps.need_int64(actives + passives) else index_map.dtype
    map_shape = (sizes["R"], scale * sizes["H"], scale * sizes["W"])
    return (
        active.new_empty((actives, sizes["F"])),
        passive.new_empty((passives, sizes["F"])),
        index_map.new_empty(map_shape, dtype=id_dtype),
        roi.new_empty((actives,)),
        xy.new_empty((actives, 2)),
        roi.new_empty((sizes["A"],), dtype=torch.int64),
    )


@torch.library.register_fake("effops::sps_refine_backward")
def _fake_backward(
    grad_active: Tensor,
    grad_passive: Tensor,
    new_ids: Tensor,
    num_passive: int,
    upsample: bool,
    need_active: bool,
    need_passive: bool,
) -> tuple[Tensor, Tensor]:
    features = grad_active.shape[1]
    return (
        grad_active.new_empty((new_ids.shape[0], features) if need_active else (0,)),
        grad_passive.new_empty((num_passive, features) if need_passive else (0,)),
    )


# ------------------------------------------------------------------------------------------ autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.shapes = output[0].shape, output[1].shape
    ctx.num_passive, ctx.upsample = inputs[1].shape[0], inputs[7]
    ctx.save_for_backward(output[5])


def _backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
    need_active, need_passive, *_ = ctx.needs_input_grad
    gradients = _autograd.materialize(grad_outputs[:2], ctx.shapes)
    if gradients is None:
        return (None,) * 8
    (new_ids,) = ctx.saved_tensors
    grad_active, grad_passive = _backward_op(
        *gradients, new_ids, ctx.num_passive, ctx.upsample, need_active, need_passive
    )
    return (
        grad_active if need_active else None,
        grad_passive if need_passive else None,
        *(None,) * 6,
    )


_autograd.install(_NAME, _save, _backward, differentiable=(0, 1))
_autograd.refuse_second_derivatives(_NAME, differentiable=(0, 1))

# ------------------------------------------------------------------------------------------ autocast

_autocast.install(_NAME, (*_sps.AUTOCAST, _autocast.KEEP, _autocast.KEEP, _autocast.KEEP))

# ------------------------------------------------------------------------------------------ vmap


@torch.library.register_vmap("effops::sps_refine")
def _vmap_rule(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
    return _vmap.loop(_op, inputs, in_dims, info.batch_size)


@torch.library.register_vmap("effops::sps_refine_backward")
def _vmap_backward_rule(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
    return _vmap.loop(_backward_op, inputs, in_dims, info.batch_size)


# ------------------------------------------------------------------------------------------ FLOPs


@register_flop_formula(torch.ops.effops.sps_refine)
def _flops(active: Any, passive: Any, index_map: Any, *args: Any, out_shape: Any = None, **_: Any) -> int:
    """1 per score, which is compared, and per cell, whose id is looked up; copies are not counted."""
    maps, height, width = index_map
    return active[0] + maps * height * width


@register_flop_formula(torch.ops.effops.sps_refine_backward)
def _backward_flops(grad_active: Any, grad_passive: Any, *args: Any, **_: Any) -> int:
    """An addition per element of the gradients."""
    return (grad_active[0] + grad_passive[0]) * grad_active[1]
