"""Involution: filters of their own for every pixel, shared by the channels of a group."""

import math
from typing import cast

from torch import Tensor

from effops.compat._checks import check_factor, check_groups, check_odd, check_shape
from effops.ops._checks import ShapeChecker, check_type
from effops.ops.filter_flow import filter_flow

_NAME = "involution"


def involution(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [N, G * K * K, Ho, Wo] or [N, G, K, K, Ho, Wo]
    stride: int = 1,
    dilation: int = 1,
    *,
    groups: int | None = None,
) -> Tensor:  # [N, C, Ho, Wo]
    r"""The sum of the window around every pixel, with weights that are given for each pixel.

    .. math::
        out[n, c, y, x] = \sum_{i, j = 0}^{K - 1} weight[n, g, i, j, y, x] \;
            x[n, c,\; s y + (i - \lfloor K / 2 \rfloor) d,\; s x + (j - \lfloor K / 2 \rfloor) d]

    with stride s, dilation d, zeros outside, and the group g of channel c; C / G channels in a row share a
    group. The padding is that which keeps the size at a stride of 1, d (K - 1) / 2.

    Args:
        x: [N, C, H, W]. float32, float64, bfloat16 or float16.
        weight: [N, G, K, K, Ho, Wo], or [N, G * K * K, Ho, Wo] as convolutions produce it, K odd,
            Ho = ceil(H / stride) and Wo likewise; in the dtype of ``x`` or float32. Used as given.
        stride: Pixels from window to window.
        dilation: Pixels from tap to tap.
        groups: G, which divides C. None is that of ``weight`` with 6 dimensions, and 1 with 4.

    Returns:
        [N, C, Ho, Wo] in the dtype of ``x``, in its memory format as :func:`effops.ops.filter_flow` keeps it.

    Raises:
        ValueError: wrong ranks or sizes, an even kernel, a stride, dilation or group count out of range.
        TypeError: wrong dtypes, or an argument of another kind.
        RuntimeError: no kernels for the device in this installation.

    Differentiable in ``x`` and ``weight``, once; deterministic.

    Source: Li et al., "Involution: Inverting the Inherence of Convolution for Visual Recognition", CVPR 2021.
    """
    ShapeChecker(_NAME).match("x", x, "NCHW")
    check_factor(_NAME, "stride", stride)
    check_factor(_NAME, "dilation", dilation)
    check_type(_NAME, "weight", weight, "Tensor", Tensor)
    batch, channels, height, width = x.shape
    groups, kernel = _sizes(weight, groups)
    check_groups(_NAME, "groups", groups, channels)
    check_odd(_NAME, "kernel of weight", kernel)
    sides = {"Ho": (height + stride - 1) // stride, "Wo": (width + stride - 1) // stride}
    if weight.dim() == 6:
        check_shape(_NAME, "weight", weight, N=batch, G=groups, K1=kernel, K2=kernel, **sides)
    else:
        check_shape(_NAME, "weight", weight, N=batch, GKK=groups * kernel**2, **sides)
    filters = weight.flatten(1, 3) if weight.dim() == 6 else weight
    return cast(Tensor, filter_flow(x, filters, "none", stride=stride, dilation=dilation, groups=groups))


def _sizes(weight: Tensor, groups: int | None) -> tuple[int, int]:
    """Groups and kernel."""
    if weight.dim() == 6:
        if groups is not None and groups != weight.shape[1]:
            raise ValueError(f"{_NAME}: expected weight with groups={groups}, got {list(weight.shape)}")
        return weight.shape[1], weight.shape[2]
    if weight.dim() != 4:
        expected = "[N, G * K * K, Ho, Wo] or [N, G, K, K, Ho, Wo]"
        raise ValueError(f"{_NAME}: expected weight of shape {expected}, got {list(weight.shape)}")
    groups = 1 if groups is None else groups
    check_factor(_NAME, "groups", groups)
    channels = int(weight.shape[1])  # a part of the graph's shape, also under torch.compile
    kernel = math.isqrt(channels // groups)
    if kernel < 1 or groups * kernel**2 != channels:
        raise ValueError(
            f"{_NAME}: expected weight with groups={groups} times K * K channels, got {list(weight.shape)}"
        )
    return groups, kernel
