"""The mean displacement of filters: the definition."""

from __future__ import annotations

from torch import Tensor

from effops.reference._bilinear import check_floating, check_shape, compute_dtype
from effops.reference._maps import in_format_of
from effops.reference._rowconv import check_at_least
from effops.reference._window import NORMALIZATIONS, check_choice, kernel_of, normalized, window_of

_OP = "expected_flow"


def expected_flow(
    filters: Tensor, normalize: str = "softmax", *, dilation: int = 1, groups: int = 1
) -> Tensor:
    """The flow of :func:`filter_flow`, without an image.

        flow[n, :, y, x] = sum over k of T[n, k, y, x] (dx_k, dy_k)

    with the weights T and the offsets of :func:`filter_flow`; taps outside the image count as any other.

    Args:
        filters: [N, groups * K * K, H, W].
        normalize: "softmax", "none" or "sum".
        dilation: pixels from tap to tap.
        groups: filters per pixel.

    Returns:
        [N, 2 * groups, H, W], (dx, dy) for each group in pixels, float32, or float64 for float64.
        channels_last if filters are channels_last and not contiguous at the same time.

    Raises:
        ValueError: wrong shapes, numbers too small, a normalize that does not exist.
        TypeError: wrong dtypes.

    Source: S. Kong, PhD thesis, section 6.3.
    """
    check_choice(_OP, "normalize", normalize, NORMALIZATIONS)
    check_at_least(_OP, "dilation", (dilation,), 1)
    check_shape(_OP, "filters", filters, "NTHW", (None, None, None, None))
    kernel = kernel_of(_OP, "filters", filters, groups)
    check_floating(_OP, "filters", filters)
    grouped = filters.to(compute_dtype(filters)).unflatten(1, (groups, kernel * kernel))
    window = window_of((filters.shape[2], filters.shape[3]), kernel, dilation, device=filters.device)
    return in_format_of(window.flow(normalized(grouped, normalize)).flatten(1, 2), filters)
