"""CARAFE: upsampling by filters that are predicted from the content."""

from typing import cast

from torch import Tensor

from effops.compat._checks import check_factor, check_groups, check_odd, check_shape
from effops.ops._checks import ShapeChecker
from effops.ops.filter_flow import filter_flow

_NAME = "carafe"


def carafe(
    features: Tensor,  # [N, C, H, W]
    masks: Tensor,  # [N, G * k * k, s * H, s * W]
    kernel_size: int,
    group_size: int = 1,
    scale_factor: int = 1,
) -> Tensor:  # [N, C, s * H, s * W]
    r"""Content-aware reassembly of features: ``mmcv.ops.carafe``, also on the CPU and in bfloat16.

    .. math::
        out[n, c, y, x] = \sum_{i, j = 0}^{k - 1} masks[n, (g k + i) k + j, y, x] \;
            features[n, c,\; \lfloor y / s \rfloor + i - \lfloor k / 2 \rfloor,\;
            \lfloor x / s \rfloor + j - \lfloor k / 2 \rfloor]

    with s the scale factor, k the kernel size, zeros outside, and the group g of channel c; C / G channels in
    a row share a group. The masks are used as given. CARAFE's softmax over the taps, which its module applies
    before, is a part of ``filter_flow(features, logits, upsample=s, groups=G)``.

    Args:
        features: [N, C, H, W]. float32, float64, bfloat16 or float16.
        masks: [N, group_size * kernel_size ** 2, s * H, s * W], s = scale_factor, in the dtype of
            ``features`` or float32.
        kernel_size: Side k of the windows, odd.
        group_size: Number of groups G (mmcv's name); divides C.
        scale_factor: Output pixels per input pixel and direction, s.

    Returns:
        [N, C, s * H, s * W] in the dtype of ``features``, in its memory format as
        :func:`effops.ops.filter_flow` keeps it.

    Raises:
        ValueError: wrong ranks or sizes, an even kernel, a group size or factor out of range.
        TypeError: wrong dtypes, or an argument of another kind.
        RuntimeError: no kernels for the device in this installation.

    Differentiable in ``features`` and ``masks``, once; deterministic.

    Source: Wang et al., "CARAFE: Content-Aware ReAssembly of FEatures", ICCV 2019.
    """
    ShapeChecker(_NAME).match("features", features, "NCHW")
    batch, channels, height, width = features.shape
    check_odd(_NAME, "kernel_size", kernel_size)
    check_groups(_NAME, "group_size", group_size, channels)
    check_factor(_NAME, "scale_factor", scale_factor)
    taps = group_size * kernel_size**2
    sides = {"sH": scale_factor * height, "sW": scale_factor * width}
    check_shape(_NAME, "masks", masks, N=batch, Gkk=taps, **sides)
    return cast(Tensor, filter_flow(features, masks, "none", upsample=scale_factor, groups=group_size))
