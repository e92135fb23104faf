"""A filter of its own for every pixel: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from effops.reference._bilinear import check_shape, compute_dtype
from effops.reference._maps import in_format_of
from effops.reference._rowconv import check_at_least, check_dtype
from effops.reference._window import (
    NORMALIZATIONS,
    PADDING_MODES,
    check_choice,
    check_map,
    kernel_of,
    normalized,
    output_side,
    window_of,
)

_OP = "filter_flow"


def filter_flow(
    image: Tensor,
    filters: Tensor,
    normalize: str = "softmax",
    padding_mode: str = "zeros",
    return_flow: bool = False,
    *,
    stride: int = 1,
    upsample: int = 1,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """Every output pixel is a sum of the pixels around it, with weights of its own (a correlation).

        out[n, c, y, x] = sum over k of T[n, k, y, x] image[n, c, cy + dy_k, cx + dx_k]
        flow[n, :, y, x] = sum over k of T[n, k, y, x] (dx_k, dy_k)

    Taps k = i K + j lie at dy_k = (i - K // 2) dilation, dx_k = (j - K // 2) dilation from the centre
    cy = y stride // upsample, cx = x stride // upsample. The weights T of the K * K taps are, by normalize,

        "softmax"      exp(filters_k) / sum over l of exp(filters_l)
        "none"         filters_k
        "sum"          filters_k / sum over l of filters_l

    A tap outside the image reads, by padding_mode,

        "zeros"        nothing: it adds 0 whatever its weight, but counts in the sums over l
        "replicate"    the nearest pixel
        "reflect"      the pixel mirrored at the border pixels, as often as it takes
        "renormalize"  nothing, and does not count: the other weights are divided by their sum ("none", too,
                       which is then the same as "sum")

    The flow counts taps outside the image as any other, except with "renormalize".

    Args:
        image: [N, C, H, W].
        filters: [N, groups * K * K, Ho, Wo], of the dtype of image or float32, or of float32 images
            bfloat16 or float16; Ho = ceil(H * upsample / stride), and Wo likewise.
        normalize, padding_mode: as above.
        return_flow: whether to return the flow, too.
        stride, upsample: output pixels per image pixel; one of them is 1.
        dilation: pixels from tap to tap.
        groups: blocks of channels, each with filters of its own.

    Returns:
        [N, C, Ho, Wo] in the dtype of image; and the flow [N, 2 * groups, Ho, Wo], (dx, dy) for each group in
        pixels of the image, float32, or float64 for float64. channels_last if image is channels_last and not
        contiguous at the same time. Computed in at least float32, rounded once.

    Raises:
        ValueError: shapes that do not fit together, numbers too small, names that do not exist.
        TypeError: wrong dtypes.

    Source: S. Kong, PhD thesis, chapters 6 and 7 (predictive filter flow).
    """
    check_choice(_OP, "normalize", normalize, NORMALIZATIONS)
    check_choice(_OP, "padding_mode", padding_mode, PADDING_MODES)
    kernel = _check(image, filters, stride, upsample, dilation, groups)
    dtype = compute_dtype(image, filters)
    size = (image.shape[2], image.shape[3])
    window = window_of(size, kernel, dilation, stride, upsample, padding_mode, image.device)
    counted = window.reads if padding_mode == "renormalize" else None
    grouped = filters.to(dtype).unflatten(1, (groups, kernel * kernel))
    weights = normalized(grouped, normalize, counted)  # [N, G, K * K, Ho, Wo]

    channels = image.to(dtype).unflatten(1, (groups, image.shape[1] // groups))
    out = in_format_of(window.mix(weights, channels).flatten(1, 2).to(image.dtype), image)
    if not return_flow:
        return out
    return out, in_format_of(window.flow(weights).flatten(1, 2), image)


def _check(image: Tensor, filters: Tensor, stride: int, upsample: int, dilation: int, groups: int) -> int:
    """K."""
    for name, value in (("stride", stride), ("upsample", upsample), ("dilation", dilation)):
        check_at_least(_OP, name, (value,), 1)
    if stride > 1 and upsample > 1:
        raise ValueError(f"{_OP}: expected stride or upsample of 1, got {stride} and {upsample}")
    check_map(_OP, "image", image)
    batch, channels, height, width = image.shape
    sides = (output_side(height, stride, upsample), output_side(width, stride, upsample))
    check_shape(_OP, "filters", filters, "NTHW", (batch, None, *sides))
    kernel = kernel_of(_OP, "filters", filters, groups)
    if channels % groups != 0:
        raise ValueError(f"{_OP}: expected groups that divides {channels} channels, got {groups}")
    halves = (torch.bfloat16, torch.float16) if image.dtype == torch.float32 else ()
    single = () if image.dtype == torch.float64 else (torch.float32,)
    check_dtype(_OP, "filters", filters, image.dtype, *single, *halves)
    return kernel
