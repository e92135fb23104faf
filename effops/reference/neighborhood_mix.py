"""Weighted sums of the window around every pixel: the definition."""

from __future__ import annotations

from torch import Tensor

from effops.reference._bilinear import compute_dtype
from effops.reference._maps import in_format_of
from effops.reference._rowconv import check_at_least, check_dtype
from effops.reference._window import check_map, kernel_of, window_of

_OP = "neighborhood_mix"


def neighborhood_mix(weights: Tensor, v: Tensor, dilation: int = 1) -> Tensor:
    """The sum over the taps of the window around each pixel, with weights of its own.

        out[n, :, p] = sum over taps t inside the image of weights[n, t, p] v[n, :, p + o_t]

    Tap t = i K + j lies at o_t = ((i - K // 2) dilation, (j - K // 2) dilation), rows first.

    Args:
        weights: [N, K * K, H, W], of the dtype of v.
        v: [N, C, H, W].
        dilation: pixels from tap to tap.

    Returns:
        [N, C, H, W] in the dtype of v; channels_last if v is channels_last and not contiguous at the same
        time. Computed in at least float32, rounded once.

    Raises:
        ValueError: shapes that do not fit together, a dilation too small.
        TypeError: wrong dtypes.

    Source: Brüggemann et al., "Exploring Relational Context for Multi-Task Dense Prediction", ICCV 2021,
    section 3.2.2.
    """
    check_at_least(_OP, "dilation", (dilation,), 1)
    check_map(_OP, "v", v)
    batch, _, height, width = v.shape
    check_map(_OP, "weights", weights, (batch, None, height, width))
    check_dtype(_OP, "weights", weights, v.dtype)
    kernel = kernel_of(_OP, "weights", weights, 1)
    dtype = compute_dtype(v)
    taps = window_of((height, width), kernel, dilation, device=v.device)
    return in_format_of(taps.mix(weights.to(dtype), v.to(dtype)).to(v.dtype), v)
