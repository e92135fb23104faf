"""Multi-scale deformable attention."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effops.ops import _autocast, _autograd, _vmap
from effops.ops._checks import FLOAT_DTYPES, ShapeChecker, check_backend, explain

_NAME = "ms_deform_attn"
_op = torch.ops.effops.ms_deform_attn.default
_backward_op = torch.ops.effops.ms_deform_attn_backward.default


def ms_deform_attn(
    value: Tensor,  # [B, S, M, D]
    spatial_shapes: Tensor | Sequence[Sequence[int]],  # [L, 2]
    level_start_index: Tensor | None,  # [L]
    sampling_locations: Tensor,  # [B, Q, M, L, P, 2]
    attention_weights: Tensor,  # [B, Q, M, L, P]
) -> Tensor:  # [B, Q, M * D]
    r"""Multi-scale deformable attention: a weighted sum of bilinear samples of a feature pyramid.

    .. math::
        out[b, q, m] = \sum_{l, p} attention\_weights[b, q, m, l, p] \;
                       v_l(W_l x - 1/2,\; H_l y - 1/2), \qquad (x, y) = sampling\_locations[b, q, m, l, p]

    where :math:`v_l` interpolates level ``l`` of ``value[b, :, m]`` bilinearly between pixel centres
    (``align_corners=False``) and is zero outside. A point counts iff its pixel coordinates satisfy
    ``-1 < x < W`` and ``-1 < y < H``; NaN and Inf coordinates contribute 0 and get gradient 0.

    Args:
        value: Features of all levels, [B, S, M, D]: S rows (pixels, row-major within a level), M heads
            of D channels. float32, float64, bfloat16 or float16.
        spatial_shapes: Height and width in pixels of each level, [L, 2] int64 (on the device of
            ``value`` or on the CPU), or a list of pairs. 0 < H, W < 2^24.
        level_start_index: First row of each level, [L] int64, or None when the levels lie one after the
            other. Levels may overlap; each must stay within the S rows.
        sampling_locations: (x, y) in [0, 1] over each level, [B, Q, M, L, P, 2]; values outside are
            allowed. float32 or the dtype of ``value``; float32 is advised beside half precision.
        attention_weights: Used as given, [B, Q, M, L, P]. float32 or the dtype of ``value``.

    Returns:
        [B, Q, M * D], contiguous, in the dtype of ``value``; sums are kept in float32 (float64 for
        float64).

    Raises:
        ValueError: wrong ranks or sizes, tensors on different devices, and on the CPU a level that is
            empty or leaves ``value``. CUDA kernels skip such a level (the host never waits for them).
        TypeError: wrong dtypes, or an argument that is no tensor.
        RuntimeError: no kernels for the device in this installation.

    Differentiable in ``value``, ``sampling_locations`` and ``attention_weights``, once. Deterministic on
    the CPU for any number of threads; on CUDA under ``torch.use_deterministic_algorithms(True)``.
    ``torch.func.grad`` is not supported; ``torch.autograd.grad`` and ``torch.func.vmap`` are.

    Source: Zhu et al., "Deformable DETR", ICLR 2021, eq. 3; C. Picron, PhD thesis, section 4.3.
    """
    if not isinstance(spatial_shapes, Tensor):
        spatial_shapes = _shapes_tensor(spatial_shapes)
    try:
        return _op(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    except (RuntimeError, TypeError) as error:
        inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
        return explain(_NAME, error, lambda: _check(*inputs))


def _shapes_tensor(shapes: Sequence[Sequence[int]]) -> Tensor:
    """[L, 2] int64 on the CPU, from a list of (H, W)."""
    expected = f"{_NAME}: expected spatial_shapes to be a Tensor [L, 2] or a list of (H, W) pairs of ints"
    pairs = [_pair(pair) for pair in shapes] if isinstance(shapes, list | tuple) else [()]
    if any(
        len(pair) != 2 or not all(isinstance(size, int | torch.SymInt) for size in pair) for pair in pairs
    ):
        raise TypeError(f"{expected}, got {shapes!r}")
    try:
        return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    except (RuntimeError, OverflowError, ValueError):
        raise ValueError(f"{expected} that fit int64, got {shapes!r}") from None


def _pair(value: object) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple | torch.Size) else ()


def _check(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> ShapeChecker:
    """The metadata checks of csrc/sampling/ms_deform_attn.h."""
    check = ShapeChecker(_NAME)
    check.match("value", value, "BSMD")
    check.match("spatial_shapes", spatial_shapes, "L2")
    if level_start_index is not None:
        check.match("level_start_index", level_start_index, "L")
    check.match("sampling_locations", sampling_locations, "BQMLP2")
    check.match("attention_weights", attention_weights, "BQMLP")
    check.dtype("value", value, *FLOAT_DTYPES)
    check.dtype("spatial_shapes", spatial_shapes, torch.int64)
    if level_start_index is not None:
        check.dtype("level_start_index", level_start_index, torch.int64)
    check.dtype("sampling_locations", sampling_locations, torch.float32, value.dtype)
    check.dtype("attention_weights", attention_weights, torch.float32, value.dtype)
    check.device("sampling_locations", sampling_locations, "value", value)
    check.device("attention_weights", attention_weights, "value", value)
    for argument, metadata in (("spatial_shapes", spatial_shapes), ("level_start_index", level_start_index)):
        if metadata is not None and metadata.device.type != "cpu":
            check.device(argument, metadata, "value", value)
    check_backend(_NAME, value)
    return check


# ------------------------------------------------------------------------------------------ fake


@torch.library.register_fake("effops::ms_deform_attn")
def _fake(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    sizes = _check(value, spatial_shapes, level_start_index, sampling_locations, attention_weights).sizes
    return value.new_empty((sizes["B"], sizes["Q"], sizes["M"] * sizes["D"]))


@torch.library.register_fake("effops::ms_deform_attn_backward")
def _fake_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    need_value: bool,
    need_locations: bool,
    need_weights: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    def gradient(tensor: Tensor, needed: bool) -> Tensor:
        return tensor.new_empty(tensor.shape if needed else (0,))

    return (
        gradient(value, need_value),
        gradient(sampling_locations, need_locations),
        gradient(attention_weights, need_weights),
    )


# ------------------------------------------------------------------------------------------ autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, shapes, starts, locations, weights = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad_value, grad_locations, grad_weights = _backward_op(
        grad_output,
        value,
        shapes,
        starts,
        locations,
        weights,
        needs[0],
        needs[3],
        needs[4],
        torch.are_deterministic_algorithms_enabled(),
    )
    return (
        grad_value if needs[0] else None,
        None,
        None,
        grad_locations if needs[3] else None,
        grad_weights if needs[4] else None,
    )


_autograd.install(_NAME, _save, _backward, differentiable=(0, 3, 4))
_autograd.refuse_second_derivatives(_NAME, differentiable=(0, 1, 4, 5))

# ------------------------------------------------------------------------------------------ autocast

# Locations and level sizes keep full precision: half a bfloat16 step is a third of a pixel at W = 167.
_autocast.install(_NAME, (_autocast.CAST, _autocast.KEEP, _autocast.KEEP, _autocast.FLOAT32, _autocast.CAST))

# ------------------------------------------------------------------------------------------ vmap


@torch.library.register_vmap("effops::ms_deform_attn")
def _vmap_rule(
    info: Any,
    in_dims: tuple[int | None, ...],
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, int]:
    size = info.batch_size
    _vmap.require_shared(_NAME, "spatial_shapes", in_dims[1])
    _vmap.require_shared(_NAME, "level_start_index", in_dims[2])
    output = _op(
        _vmap.fold(value, in_dims[0], size),
        spatial_shapes,
        level_start_index,
        _vmap.fold(sampling_locations, in_dims[3], size),
        _vmap.fold(attention_weights, in_dims[4], size),
    )
    return _vmap.unfold(output, size), 0


@torch.library.register_vmap("effops::ms_deform_attn_backward")
def _vmap_backward_rule(
    info: Any,
    in_dims: tuple[int | None, ...],
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *flags: bool,
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    size = info.batch_size
    _vmap.require_shared(_NAME, "spatial_shapes", in_dims[2])
    _vmap.require_shared(_NAME, "level_start_index", in_dims[3])
    gradients = _backward_op(
        _vmap.fold(grad_output, in_dims[0], size),
        _vmap.fold(value, in_dims[1], size),
        spatial_shapes,
        level_start_index,
        _vmap.fold(sampling_locations, in_dims[4], size),
        _vmap.fold(attention_weights, in_dims[5], size),
        *flags,
    )
    needed = flags[:3]
    unfolded = tuple(
        _vmap.unfold(gradient, size) if need else gradient
        for gradient, need in zip(gradients, needed, strict=True)
    )
    return unfolded, tuple(0 if need else None for need in needed)


# ------------------------------------------------------------------------------------------ FLOPs


@register_flop_formula(torch.ops.effops.ms_deform_attn)
def _flops(
    value: Any, shapes: Any, starts: Any, locations: Any, weights: Any, *, out_shape: Any = None, **_: Any
) -> int:
    """Per point: 4 multiply-adds per channel, and about 20 operations for its corners' weights."""
    batch, queries, heads, levels, points, _ = locations
    return batch * queries * heads * levels * points * (8 * value[-1] + 20)


@register_flop_formula(torch.ops.effops.ms_deform_attn_backward)
def _backward_flops(
    grad_output: Any, value: Any, shapes: Any, starts: Any, locations: Any, *args: Any, **_: Any
) -> int:
    """Per point: four dot products and four scaled additions of D channels, about 40 for the rest."""
    batch, queries, heads, levels, points, _ = locations
    return batch * queries * heads * levels * points * (16 * value[-1] + 40)
