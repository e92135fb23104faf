"""RoIAlign on a pyramid."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effops.ops import _autocast, _autograd, _pyramid, _vmap
from effops.ops._checks import ShapeChecker, check_backend, explain

_NAME = "roi_align"
_op = torch.ops.effops.roi_align.default
_backward_op = torch.ops.effops.roi_align_backward.default


def roi_align(
    pyramid: Sequence[Tensor],  # L x [B, C, H_l, W_l]
    rois: Tensor,  # [R, 5]
    level: Tensor,  # [R]
    output_size: int | tuple[int, int],
    sampling_ratio: int = 0,
    aligned: bool = True,
    *,
    strides: Sequence[float],
) -> Tensor:  # [R, C, h, w]
    r"""Average of bilinear samples in each bin of a box, each box on its own map.

    .. math::
        out[r, :, i, j] = \frac{1}{n_y n_x} \sum_{a < n_y} \sum_{b < n_x} v(x_{jb}, y_{ia}), \qquad
        y_{ia} = y_1 + i\, bin + (a + 1/2)\, bin / n_y, \quad bin = (y_2 - y_1) / h

    and the same in x, where (x1, y1, x2, y2) is the box divided by the stride of its map, minus 0.5: pixel
    (i, j) of a map has its centre at ((j + 0.5) stride, (i + 0.5) stride) in the image. With
    ``aligned=False`` nothing is subtracted, and both sides of the box are made at least 1 pixel long.

    Border rule: v(x, y) = 0 if y < -1 or y > H (the same in x); otherwise x and y are clamped to
    [0, W - 1] and [0, H - 1] and the map is interpolated bilinearly.

    Samples per bin and axis: n = ``sampling_ratio`` if that is > 0; else ``min(ceil(bin), 2 side + 2)``
    (side: H for y, W for x), and 0, with the result 0, for an empty or inverted box. A RoI with a NaN or
    infinite coordinate gives 0 with gradient 0.

    Args:
        pyramid: L >= 1 maps, [B, C, H_l, W_l], with H_l, W_l < 2^24, in any layout; a map without pixels
            gives 0. At most 32 on CUDA.
        rois: (image, x1, y1, x2, y2), [R, 5]: the image, truncated to an integer, and the box in pixels of
            the image. float32 or the dtype of the maps; float32 is advised beside half precision.
        level: The map of each RoI, [R] int64.
        output_size: (h, w), the number of bins, or one number for both.
        sampling_ratio: Samples per bin and axis; 0 or less: adaptive.
        aligned: Whether pixel centres lie at half-integer coordinates of the image.
        strides: Image pixels per pixel of each map, L positive numbers.

    Returns:
        [R, C, h, w], contiguous, in the dtype of the maps; computed in float32 (float64 for float64) and
        rounded once.

    Raises:
        ValueError: wrong ranks or sizes, an output size below 1, a stride that is not positive and finite,
            tensors on different devices, and on the CPU an image or a map out of range. CUDA kernels give 0
            for such a RoI (the host never waits for them).
        TypeError: wrong dtypes, or an argument that is no tensor.
        RuntimeError: no kernels for the device in this installation.

    Differentiable in ``pyramid``, once; there is no gradient to the boxes. Deterministic on the CPU for any
    number of threads; on CUDA under ``torch.use_deterministic_algorithms(True)``. vmap may batch ``pyramid``,
    ``rois`` and ``level``. ``torch.func.grad`` is not supported.

    Source: He et al., "Mask R-CNN", ICCV 2017; border rule, sampling and ``aligned`` as in torchvision.
    """
    height, width = _output_sizes(output_size)
    numbers = _stride_numbers(strides)
    try:
        return _op(pyramid, rois, level, height, width, sampling_ratio, aligned, numbers)
    except (RuntimeError, TypeError) as error:
        inputs = (pyramid, rois, level, height, width, sampling_ratio, aligned, numbers)
        return explain(_NAME, error, lambda: _check(*inputs))


def _output_sizes(output_size: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(output_size, (int, torch.SymInt)):
        return output_size, output_size
    if not isinstance(output_size, (tuple, list, torch.Size)):
        name = type(output_size).__name__
        raise TypeError(f"{_NAME}: expected output_size to be an int or a pair of them, got {name}")
    if len(output_size) != 2:
        raise ValueError(f"{_NAME}: expected output_size of two numbers, got {tuple(output_size)}")
    return output_size[0], output_size[1]


def _stride_numbers(strides: Sequence[float]) -> list[float]:
    if not isinstance(strides, (tuple, list)):
        raise TypeError(f"{_NAME}: expected strides to be a list of numbers, got {type(strides).__name__}")
    return list(strides)


def _check(
    pyramid: Sequence[Tensor],
    rois: Tensor,
    level: Tensor,
    height: int,
    width: int,
    sampling_ratio: int,
    aligned: bool,
    strides: Sequence[float],
) -> ShapeChecker:
    """The metadata checks of csrc/sampling/roi_align.h."""
    check = ShapeChecker(_NAME)
    _pyramid.check_pyramid(check, pyramid)
    check.match("rois", rois, "R5")
    check.match("level", level, "R")
    check.dtype("rois", rois, torch.float32, pyramid[0].dtype)
    check.dtype("level", level, torch.int64)
    for argument, tensor in (("rois", rois), ("level", level)):
        check.device(argument, tensor, "pyramid[0]", pyramid[0])
    for argument, value, kinds in (
        ("output_size", height, (int, torch.SymInt)),
        ("output_size", width, (int, torch.SymInt)),
        ("sampling_ratio", sampling_ratio, (int, torch.SymInt)),
        ("aligned", aligned, (bool,)),
    ):
        if not isinstance(value, kinds):
            name = type(value).__name__
            raise TypeError(f"{_NAME}: expected {argument} of type {kinds[0].__name__}, got {name}")
    if height < 1 or width < 1:
        raise ValueError(f"{_NAME}: expected output_size of at least 1, got ({height}, {width})")
    _check_strides(strides, len(pyramid))
    check_backend(_NAME, pyramid[0])
    return check


def _check_strides(strides: Sequence[float], levels: int) -> None:
    if len(strides) != levels:
        raise ValueError(f"{_NAME}: expected strides of length {levels}, one per map, got {len(strides)}")
    for stride in strides:
        if not isinstance(stride, (int, float, torch.SymInt, torch.SymFloat)):
            raise TypeError(f"{_NAME}: expected strides of numbers, got {type(stride).__name__}")
        if not (stride > 0 and math.isfinite(stride)):
            raise ValueError(f"{_NAME}: expected strides that are positive and finite, got {stride}")


# ------------------------------------------------------------------------------------------ fake


@torch.library.register_fake("effops::roi_align")
def _fake(
    pyramid: Sequence[Tensor],
    rois: Tensor,
    level: Tensor,
    output_height: int,
    output_width: int,
    sampling_ratio: int,
    aligned: bool,
    strides: Sequence[float],
) -> Tensor:
    arguments = (output_height, output_width, sampling_ratio, aligned, strides)
    sizes = _check(pyramid, rois, level, *arguments).sizes
    return pyramid[0].new_empty((sizes["R"], sizes["C"], output_height, output_width))


@torch.library.register_fake("effops::roi_align_backward")
def _fake_backward(grad_output: Tensor, pyramid: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
    return _pyramid.new_gradients(pyramid, True)


# ------------------------------------------------------------------------------------------ autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pyramid, rois, level, *ctx.settings = inputs
    ctx.save_for_backward(*pyramid, rois, level)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    *pyramid, rois, level = ctx.saved_tensors
    need_maps = ctx.needs_input_grad[0]
    if not any(need_maps):  # only the boxes
        return (None,) * (3 + len(ctx.settings))
    deterministic = torch.are_deterministic_algorithms_enabled()
    found = _backward_op(grad_output, pyramid, rois, level, *ctx.settings, deterministic)
    gradients = [gradient if need else None for gradient, need in zip(found, need_maps, strict=True)]
    return gradients, *(None,) * (2 + len(ctx.settings))


torch.library.register_autograd("effops::roi_align", _backward, setup_context=_save)
_autograd.refuse_second_derivatives_of_lists(_NAME)

# ------------------------------------------------------------------------------------------ autocast

_autocast.install(_NAME, (_autocast.CAST, _autocast.FLOAT32, *(_autocast.KEEP,) * 6))

# ------------------------------------------------------------------------------------------ vmap


def _fold_rois(
    size: int, images_apart: int, in_dims: Sequence[int | None], rois: Tensor, level: Tensor
) -> tuple[Tensor, Tensor]:
    """RoIs [size * R] of all members of vmap, whose images are ``images_apart`` apart."""
    rois, level = (
        _vmap.move_to_front(tensor, in_dim, size)
        for tensor, in_dim in zip((rois, level), in_dims, strict=True)
    )
    if images_apart > 0:
        rois = rois.to(torch.promote_types(rois.dtype, torch.float32))  # float16 counts to 2048
        shift = torch.arange(size, device=rois.device)[:, None, None] * images_apart
        rois = torch.cat([rois[..., :1] + shift, rois[..., 1:]], dim=-1)
    return rois.flatten(0, 1), level.flatten()


@torch.library.register_vmap("effops::roi_align")
def _vmap_rule(
    info: Any,
    in_dims: tuple[Any, ...],
    pyramid: Sequence[Tensor],
    rois: Tensor,
    level: Tensor,
    *settings: Any,
) -> tuple[Tensor, int]:
    size = info.batch_size
    maps, images_apart = _pyramid.fold_pyramid(pyramid, in_dims[0], size)
    boxes = _fold_rois(size, images_apart, in_dims[1:3], rois, level)
    return _pyramid.unfold(_op(maps, *boxes, *settings), size), 0


def _vmap_backward_rule(
    info: Any,
    in_dims: tuple[Any, ...],
    grad_output: Tensor,
    pyramid: Sequence[Tensor],
    rois: Tensor,
    level: Tensor,
    *settings: Any,
) -> tuple[list[Tensor], list[int]]:
    size = info.batch_size
    maps, images_apart = _pyramid.fold_pyramid(pyramid, in_dims[1], size, always=True)
    boxes = _fold_rois(size, images_apart, in_dims[2:4], rois, level)
    grad = _vmap.move_to_front(grad_output, in_dims[0], size).flatten(0, 1)
    gradients = [_pyramid.unfold(gradient, size) for gradient in _backward_op(grad, maps, *boxes, *settings)]
    return gradients, [0] * len(gradients)


torch.library.register_vmap("effops::roi_align_backward", _vmap_backward_rule)
_vmap.support_batched_gradients(_NAME, _vmap_backward_rule)

# ------------------------------------------------------------------------------------------ FLOPs


def _samples_per_bin(sampling_ratio: int) -> int:
    """Adaptive sampling, whose count depends on the boxes, is counted as 2 x 2."""
    return sampling_ratio**2 if sampling_ratio > 0 else 4


@register_flop_formula(torch.ops.effops.roi_align)
def _flops(
    pyramid: Any,
    rois: Any,
    level: Any,
    height: int,
    width: int,
    sampling_ratio: int,
    *settings: Any,
    out_shape: Any = None,
    **_: Any,
) -> int:
    """As defined: 4 multiply-adds per sample and channel."""
    bins: int = rois[0] * pyramid[0][1] * height * width
    return bins * 8 * _samples_per_bin(sampling_ratio)


@register_flop_formula(torch.ops.effops.roi_align_backward)
def _backward_flops(
    grad_output: Any,
    pyramid: Any,
    rois: Any,
    level: Any,
    height: int,
    width: int,
    sampling_ratio: int,
    *settings: Any,
    **_: Any,
) -> int:
    """4 scaled additions per sample and channel, and the division of each bin's gradient."""
    return math.prod(grad_output) * (8 * _samples_per_bin(sampling_ratio) + 1)
