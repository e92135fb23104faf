"""Filters of their own for every pixel."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effops.ops import _autocast, _autograd, _localfilter, _maps
from effops.ops._checks import (
    FLOAT_DTYPES,
    ShapeChecker,
    check_backend,
    check_integer,
    check_type,
    explain,
    number_of,
)

_NAME = "filter_flow"
_op = torch.ops.effops.filter_flow.default
_backward_op = torch.ops.effops.filter_flow_backward.default

#: Dtypes of the filters that go with one of the image.
_FILTER_DTYPES = {
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
    torch.float64: (torch.float64,),
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float16: (torch.float16, torch.float32),
}


def filter_flow(
    image: Tensor,  # [N, C, H, W]
    filters: Tensor,  # [N, groups * K * K, Ho, Wo]
    normalize: str = "softmax",
    padding_mode: str = "zeros",
    return_flow: bool = False,
    *,
    stride: int = 1,
    upsample: int = 1,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:  # [N, C, Ho, Wo]; [N, 2 * groups, Ho, Wo]
    r"""Filters an image with K x K weights of its own for every pixel, the same for all channels.

    .. math::
        out[n, c, y, x] = \sum_{i, j = 0}^{K - 1} T[n, i K + j, y, x] \;
            image[n, c,\; y + (i - \lfloor K / 2 \rfloor) d,\; x + (j - \lfloor K / 2 \rfloor) d]

    a correlation (the window is not flipped) with dilation d. The weights T of a pixel are, by ``normalize``,

    - ``"softmax"``: the softmax of its K * K filters.
    - ``"none"``: the filters as given.
    - ``"sum"``: the filters divided by their sum (Inf or NaN where that is 0).

    Taps outside the image read, by ``padding_mode``,

    - ``"zeros"``: nothing. Their weights count in the softmax or in the sum, but are never multiplied: an
      Inf or NaN among them reaches no pixel.
    - ``"replicate"``: the nearest pixel.
    - ``"reflect"``: the mirrored pixel, without repeating the border, as often as it takes.
    - ``"renormalize"``: nothing, and they do not count: the softmax or the sum is over the other taps. With
      ``"none"`` the weights are divided by that sum too, so that it equals ``"sum"``.

    The expected flow of a pixel is the mean displacement of what it reads,
    :math:`\sum_{i, j} T[i K + j] \, (j - \lfloor K / 2 \rfloor, i - \lfloor K / 2 \rfloor) \, d`, in pixels
    (dx, dy) of the image; taps outside count, except with ``"renormalize"``.

    With a stride s the windows lie around every s-th pixel in both directions, (s y, s x); with an upsampling
    factor u around pixel (y // u, x // u), each pixel being the centre of u x u windows. With groups each
    of G equal blocks of channels has filters of its own: channels ``g * K * K`` to ``(g + 1) * K * K``.

    Args:
        image: [N, C, H, W]. float32, float64, bfloat16 or float16; C may be 0.
        filters: [N, groups * K * K, Ho, Wo], Ho = ceil(H * upsample / stride), Wo likewise; taps in row-major
            order (dy slow, dx fast), any K >= 1 (an even K has K / 2 taps before the centre and K / 2 - 1
            behind it). Of the dtype of ``image`` or float32, beside a float32 image also bfloat16 or float16;
            float64 only beside float64.
        normalize: ``"softmax"``, ``"none"`` or ``"sum"``.
        padding_mode: ``"zeros"``, ``"replicate"``, ``"reflect"`` or ``"renormalize"``.
        return_flow: Whether to return the expected flow too.
        stride: Pixels from window to window, 1 or more.
        upsample: Windows per pixel and direction, 1 or more; beside a stride of 1 only.
        dilation: Pixels from tap to tap, 1 or more.
        groups: Blocks of channels with filters of their own; divides C.

    Returns:
        out, [N, C, Ho, Wo] in the dtype of ``image``, or (out, flow) with flow [N, 2 * groups, Ho, Wo],
        (dx, dy) group by group, in float32 (float64 for float64). Both are channels_last if ``image`` is
        channels_last and not contiguous at the same time, else contiguous; so is each gradient, by its own
        input. Computed in float32 (float64 for float64) and rounded once.

    Raises:
        ValueError: wrong ranks or sizes, channels of ``filters`` that are not groups * K * K, groups that do
            not divide C, a stride, upsampling factor or dilation out of range, a stride and an upsampling
            factor above 1 at once, an unknown option, tensors on different devices.
        TypeError: wrong dtypes, or an argument of another kind.
        RuntimeError: no kernels for the device in this installation.

    Differentiable in ``image`` and ``filters``, once, through both results. Backward reads the rounded
    result: beside a half-precision image the gradient of ``filters`` has its error, also in float32.
    Deterministic, on the CPU for any number of threads. The windows of the image and the normalised weights
    are never stored. vmap may batch both tensors. ``torch.func.grad`` is not supported.

    Source: S. Kong, PhD thesis, chapters 6 and 7 (predictive filter flow).
    """
    settings = (
        number_of(_NAME, "normalize", _localfilter.NORMALIZE, normalize),
        number_of(_NAME, "padding_mode", _localfilter.PADDING_MODES, padding_mode),
        stride,
        upsample,
        dilation,
        groups,
        return_flow,
    )
    try:
        out, flow, _ = _op(image, filters, *settings)
    except (RuntimeError, TypeError) as error:
        return explain(_NAME, error, lambda: _check(image, filters, *settings))
    return (out, flow) if return_flow else out


def _check(
    image: Tensor,
    filters: Tensor,
    normalize: int,
    padding_mode: int,
    stride: int,
    upsample: int,
    dilation: int,
    groups: int,
    return_flow: bool,
) -> None:
    """The metadata checks of csrc/localfilter/filter_flow.h."""
    check = ShapeChecker(_NAME)
    check.match("image", image, "NCHW")
    _localfilter.check_rank(check, "filters", filters, "[N, G * K * K, Ho, Wo]")
    check.dtype("image", image, *FLOAT_DTYPES)
    check.dtype("filters", filters, *_FILTER_DTYPES[image.dtype])
    check.device("filters", filters, "image", image)
    _localfilter.check_factor(_NAME, "stride", stride)
    _localfilter.check_factor(_NAME, "upsample", upsample)
    if stride > 1 and upsample > 1:
        raise ValueError(f"{_NAME}: expected stride or upsample to be 1, got {stride} and {upsample}")
    check_integer(_NAME, "groups", groups)
    channels = image.shape[1]
    if groups < 1 or channels % groups != 0:
        raise ValueError(
            f"{_NAME}: expected groups >= 1 that divides {channels} channels of image, got {groups}"
        )
    kernel = _localfilter.kernel_of(_NAME, "filters", filters, groups)
    _localfilter.check_dilation(_NAME, dilation, kernel)
    height, width = ((side * upsample + stride - 1) // stride for side in image.shape[2:])
    if filters.shape[0] != image.shape[0] or filters.shape[2] != height or filters.shape[3] != width:
        expected = f"[N={image.shape[0]}, G * K * K, Ho={height}, Wo={width}]"
        raise ValueError(f"{_NAME}: expected filters of shape {expected}, got {list(filters.shape)}")
    check_type(_NAME, "return_flow", return_flow, "bool", bool, torch.SymBool)
    check_backend(_NAME, image)


# ------------------------------------------------------------------------------------------ fake


@torch.library.register_fake("effops::filter_flow")
def _fake(
    image: Tensor,
    filters: Tensor,
    normalize: int,
    padding_mode: int,
    stride: int,
    upsample: int,
    dilation: int,
    groups: int,
    return_flow: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(image, filters, normalize, padding_mode, stride, upsample, dilation, groups, return_flow)
    batch, _, height, width = filters.shape
    dtype = _localfilter.accumulator_dtype(image)
    flow_shape = (batch, 2 * groups, height, width)
    return (
        _maps.new_maps(image, (batch, image.shape[1], height, width)),
        _maps.new_maps(image, flow_shape, dtype) if return_flow else image.new_empty((0,), dtype=dtype),
        _localfilter.new_normalizer(filters, groups, normalize, padding_mode),
    )


@torch.library.register_fake("effops::filter_flow_backward")
def _fake_backward(
    grad_output: Tensor,
    grad_flow: Tensor | None,
    image: Tensor,
    filters: Tensor,
    output: Tensor | None,
    flow: Tensor | None,
    normalizer: Tensor,
    normalize: int,
    padding_mode: int,
    stride: int,
    upsample: int,
    dilation: int,
    groups: int,
    need_image: bool,
    need_filters: bool,
) -> tuple[Tensor, Tensor]:
    return _maps.gradient_of(image, need_image), _maps.gradient_of(filters, need_filters)


# ------------------------------------------------------------------------------------------ autograd


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor, Tensor]) -> None:
    image, filters, *ctx.settings, return_flow = inputs
    output, flow, normalizer = outputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*((normalizer,) if return_flow else (flow, normalizer)))
    # Only normalised weights need the output; a ReLU in place may follow the others.
    saved_output = output if normalizer.dim() == 4 else None
    ctx.save_for_backward(image, filters, saved_output, flow, normalizer)


def _backward(
    ctx: Any, grad_output: Tensor | None, grad_flow: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    image, filters, output, flow, normalizer = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    if grad_output is None and grad_flow is None:
        return (None,) * 9
    if grad_output is None:
        grad_output = _maps.new_maps(image, (*image.shape[:2], *filters.shape[2:])).zero_()
    found = _backward_op(
        grad_output,
        grad_flow,
        image,
        filters,
        output,
        None if grad_flow is None else flow,
        normalizer,
        *ctx.settings,
        *needs,
    )
    gradients = (gradient if need else None for gradient, need in zip(found, needs, strict=True))
    return *gradients, *(None,) * 7


_autograd.install(_NAME, _save, _backward, differentiable=(0, 1))
_autograd.refuse_second_derivatives(_NAME, differentiable=(0, 1, 2, 3, 4, 5, 6))

# ------------------------------------------------------------------------------------------ autocast

_autocast.install(_NAME, (_autocast.CAST, _autocast.FLOAT32, *(_autocast.KEEP,) * 7))

# ------------------------------------------------------------------------------------------ vmap

_localfilter.install_vmap(_NAME)

# ------------------------------------------------------------------------------------------ FLOPs


@register_flop_formula(torch.ops.effops.filter_flow)
def _flops(image: Any, filters: Any, *settings: Any, out_shape: Any = None, **_: Any) -> int:
    """A multiply-add per channel, pixel and tap, and one per component of the flow; taps outside count."""
    groups, return_flow = settings[5:7]
    components = image[1] // groups + (2 if return_flow else 0)
    return _localfilter.tap_flops(filters, components)


@register_flop_formula(torch.ops.effops.filter_flow_backward)
def _backward_flops(
    grad_output: Any, grad_flow: Any, image: Any, filters: Any, *others: Any, **_: Any
) -> int:
    """The same for the filters, and without the flow for the image."""
    groups, need_image, need_filters = others[-3:]
    channels = image[1] // groups
    flow = 0 if grad_flow is None else 2
    components = (channels if need_image else 0) + (channels + flow if need_filters else 0)
    return _localfilter.tap_flops(filters, components)
