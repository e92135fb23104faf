"""RAFT's upsampling of a flow by convex combinations of its pixels."""

from typing import cast

import torch.nn.functional as F
from torch import Tensor

from effops.compat._checks import check_factor, check_shape
from effops.ops._checks import ShapeChecker
from effops.ops.filter_flow import filter_flow

_NAME = "convex_upsample"


def convex_upsample(
    flow: Tensor,  # [N, C, H, W]
    up_mask: Tensor | None,  # [N, 9 * f * f, H, W]
    factor: int = 8,
    scale: float | None = None,
) -> Tensor:  # [N, C, f * H, f * W]
    r"""Upsamples a flow: ``upsample_flow`` of torchvision's RAFT, for any number of channels.

    .. math::
        out[n, c, f y + u, f x + v] = scale \sum_{i, j = 0}^2 T[n, 3 i + j, u, v, y, x] \;
            flow[n, c, y + i - 1, x + j - 1]

    with zeros outside and T the softmax of ``up_mask``, seen as [N, 9, f, f, H, W], over the 9 taps (which
    counts those outside, too).

    Args:
        flow: [N, C, H, W]. float32, float64, bfloat16 or float16; a flow, or a depth or disparity.
        up_mask: [N, 9 * factor ** 2, H, W], logits in the dtype of ``flow`` or float32. With None the result
            is the bilinear interpolation of :func:`torch.nn.functional.interpolate` with ``align_corners``.
        factor: Output pixels per input pixel and direction, f.
        scale: The values are multiplied by it; None is ``factor``, right for displacements in pixels, and 1
            leaves them as they are.

    Returns:
        [N, C, f * H, f * W] in the dtype of ``flow``, with a mask in its memory format as
        :func:`effops.ops.filter_flow` keeps it.

    Raises:
        ValueError: wrong ranks or sizes, a factor below 1.
        TypeError: wrong dtypes, or an argument of another kind.
        RuntimeError: no kernels for the device in this installation.

    Differentiable in ``flow`` and ``up_mask``, once; deterministic. The softmax is never stored.

    Source: Teed and Deng, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow", ECCV 2020.
    """
    ShapeChecker(_NAME).match("flow", flow, "NCHW")
    check_factor(_NAME, "factor", factor)
    batch, _, height, width = flow.shape
    sides = (factor * height, factor * width)
    scaled = flow * (factor if scale is None else scale)
    if up_mask is None:
        return F.interpolate(scaled, sides, mode="bilinear", align_corners=True)
    check_shape(_NAME, "up_mask", up_mask, N=batch, Kff=9 * factor**2, H=height, W=width)
    # F.pixel_shuffle, which refuses empty masks.
    shuffled = up_mask.unflatten(1, (9, factor, factor)).permute(0, 1, 4, 2, 5, 3)
    return cast(Tensor, filter_flow(scaled, shuffled.reshape(batch, 9, *sides), upsample=factor))
