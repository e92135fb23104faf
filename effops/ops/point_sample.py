"""Bilinear samples of a pyramid at single points."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effops.ops import _autocast, _autograd, _pyramid, _vmap
from effops.ops._checks import ShapeChecker, check_backend, explain

_NAME = "point_sample"
_op = torch.ops.effops.point_sample.default
_backward_op = torch.ops.effops.point_sample_backward.default


def point_sample(
    pyramid: Sequence[Tensor],  # L x [B, C, H_l, W_l]
    batch: Tensor,  # [N]
    level: Tensor,  # [N]
    xy: Tensor,  # [N, 2]
) -> Tensor:  # [N, C]
    r"""One bilinear sample per point, each from its own image and map.

    .. math::
        out[n] = v(W x - 1/2,\; H y - 1/2), \qquad (x, y) = xy[n]

    where :math:`v` interpolates the map ``pyramid[level[n]][batch[n]]`` of size H x W bilinearly between
    pixel centres (``align_corners=False``) and is zero outside. A point counts iff its pixel coordinates
    satisfy ``-1 < x < W`` and ``-1 < y < H``; NaN and Inf coordinates give 0 with gradient 0.

    Args:
        pyramid: L >= 1 maps, [B, C, H_l, W_l], with H_l, W_l < 2^24, in any layout; a map without pixels
            gives 0. At most 32 on CUDA.
        batch: The image of each point, [N] int64.
        level: The map of each point, [N] int64.
        xy: (x, y) over the map, [N, 2]; 0 and 1 are its outer edges, values outside are allowed. float32
            or the dtype of the maps; float32 is advised beside half precision.

    Returns:
        [N, C], contiguous, in the dtype of the maps; computed in float32 (float64 for float64) and rounded
        once.

    Raises:
        ValueError: wrong ranks or sizes, tensors on different devices, and on the CPU an image or a map out
            of range. CUDA kernels give 0 for such a point (the host never waits for them).
        TypeError: wrong dtypes, or an argument that is no tensor.
        RuntimeError: no kernels for the device in this installation.

    Differentiable in ``pyramid`` and ``xy``, once. Deterministic on the CPU for any number of threads; on
    CUDA under ``torch.use_deterministic_algorithms(True)``. vmap may batch every argument.
    ``torch.func.grad`` is not supported.

    Source: Kirillov et al., "PointRend", CVPR 2020; the conventions are those of :func:`ms_deform_attn`.
    """
    try:
        return _op(pyramid, batch, level, xy)
    except (RuntimeError, TypeError) as error:
        return explain(_NAME, error, lambda: _check(pyramid, batch, level, xy))


def _check(pyramid: Sequence[Tensor], batch: Tensor, level: Tensor, xy: Tensor) -> ShapeChecker:
    """The metadata checks of csrc/sampling/point_sample.h."""
    check = ShapeChecker(_NAME)
    _pyramid.check_pyramid(check, pyramid)
    check.match("batch", batch, "N")
    check.match("level", level, "N")
    check.match("xy", xy, "N2")
    check.dtype("batch", batch, torch.int64)
    check.dtype("level", level, torch.int64)
    check.dtype("xy", xy, torch.float32, pyramid[0].dtype)
    for argument, tensor in (("batch", batch), ("level", level), ("xy", xy)):
        check.device(argument, tensor, "pyramid[0]", pyramid[0])
    check_backend(_NAME, pyramid[0])
    return check


# ------------------------------------------------------------------------------------------ fake


@torch.library.register_fake("effops::point_sample")
def _fake(pyramid: Sequence[Tensor], batch: Tensor, level: Tensor, xy: Tensor) -> Tensor:
    sizes = _check(pyramid, batch, level, xy).sizes
    return pyramid[0].new_empty((sizes["N"], sizes["C"]))


@torch.library.register_fake("effops::point_sample_backward")
def _fake_backward(
    grad_output: Tensor,
    pyramid: Sequence[Tensor],
    batch: Tensor,
    level: Tensor,
    xy: Tensor,
    need_pyramid: bool,
    need_xy: bool,
    deterministic: bool,
) -> tuple[list[Tensor], Tensor]:
    grad_xy = xy.new_empty(xy.shape if need_xy else (0,))
    return _pyramid.new_gradients(pyramid, need_pyramid), grad_xy


# ------------------------------------------------------------------------------------------ autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pyramid, batch, level, xy = inputs
    ctx.save_for_backward(*pyramid, batch, level, xy)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    *pyramid, batch, level, xy = ctx.saved_tensors
    need_maps, _, _, need_xy = ctx.needs_input_grad
    deterministic = torch.are_deterministic_algorithms_enabled()
    grad_pyramid, grad_xy = _backward_op(
        grad_output, pyramid, batch, level, xy, any(need_maps), need_xy, deterministic
    )
    gradients = [gradient if need else None for gradient, need in zip(grad_pyramid, need_maps, strict=True)]
    return gradients, None, None, grad_xy if need_xy else None


torch.library.register_autograd("effops::point_sample", _backward, setup_context=_save)
_autograd.refuse_second_derivatives_of_lists(_NAME)

# ------------------------------------------------------------------------------------------ autocast

_autocast.install(_NAME, (_autocast.CAST, _autocast.KEEP, _autocast.KEEP, _autocast.FLOAT32))

# ------------------------------------------------------------------------------------------ vmap


def _fold_points(
    size: int, images_apart: int, in_dims: Sequence[int | None], batch: Tensor, level: Tensor, xy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Points [size * N] of all members of vmap, whose images are ``images_apart`` apart."""
    batch, level, xy = (
        _vmap.move_to_front(tensor, in_dim, size)
        for tensor, in_dim in zip((batch, level, xy), in_dims, strict=True)
    )
    batch = batch + torch.arange(size, device=batch.device)[:, None] * images_apart
    return batch.flatten(), level.flatten(), xy.flatten(0, 1)


@torch.library.register_vmap("effops::point_sample")
def _vmap_rule(
    info: Any, in_dims: tuple[Any, ...], pyramid: Sequence[Tensor], batch: Tensor, level: Tensor, xy: Tensor
) -> tuple[Tensor, int]:
    size = info.batch_size
    maps, images_apart = _pyramid.fold_pyramid(pyramid, in_dims[0], size)
    points = _fold_points(size, images_apart, in_dims[1:], batch, level, xy)
    return _pyramid.unfold(_op(maps, *points), size), 0


def _vmap_backward_rule(
    info: Any,
    in_dims: tuple[Any, ...],
    grad_output: Tensor,
    pyramid: Sequence[Tensor],
    batch: Tensor,
    level: Tensor,
    xy: Tensor,
    need_pyramid: bool,
    need_xy: bool,
    deterministic: bool,
) -> tuple[Any, Any]:
    size = info.batch_size
    maps, images_apart = _pyramid.fold_pyramid(pyramid, in_dims[1], size, always=need_pyramid)
    points = _fold_points(size, images_apart, in_dims[2:5], batch, level, xy)
    grad = _vmap.move_to_front(grad_output, in_dims[0], size).flatten(0, 1)
    grad_maps, grad_xy = _backward_op(grad, maps, *points, need_pyramid, need_xy, deterministic)
    if need_pyramid:
        grad_maps = [_pyramid.unfold(gradient, size) for gradient in grad_maps]
    if need_xy:
        grad_xy = _pyramid.unfold(grad_xy, size)
    out_dims = ([0 if need_pyramid else None for _ in grad_maps], 0 if need_xy else None)
    return (grad_maps, grad_xy), out_dims


torch.library.register_vmap("effops::point_sample_backward", _vmap_backward_rule)
_vmap.support_batched_gradients(_NAME, _vmap_backward_rule)

# ------------------------------------------------------------------------------------------ FLOPs


@register_flop_formula(torch.ops.effops.point_sample)
def _flops(pyramid: Any, batch: Any, level: Any, xy: Any, *, out_shape: Any = None, **_: Any) -> int:
    """Per point: 4 multiply-adds per channel, and about 20 operations for its corners' weights."""
    points: int = xy[0]
    channels: int = pyramid[0][1]
    return points * (8 * channels + 20)


@register_flop_formula(torch.ops.effops.point_sample_backward)
def _backward_flops(grad_output: Any, *args: Any, **_: Any) -> int:
    """Per point: four dot products and four scaled additions of C channels, about 40 for the rest."""
    points, channels = grad_output
    flops: int = points * (16 * channels + 40)
    return flops
