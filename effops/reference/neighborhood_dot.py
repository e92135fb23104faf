"""Products of every pixel with those of the window around it: the definition."""

from __future__ import annotations

from torch import Tensor

from effops.reference._bilinear import compute_dtype
from effops.reference._maps import in_format_of
from effops.reference._rowconv import check_at_least, check_dtype
from effops.reference._window import check_map, window_of

_OP = "neighborhood_dot"


def neighborhood_dot(q: Tensor, k: Tensor, window: int, dilation: int = 1) -> Tensor:
    """The product of each pixel with each tap of the window around it.

        out[n, t, p] = q[n, :, p] . k[n, :, p + o_t], 0 for taps outside the image

    Tap t = i window + j lies at o_t = ((i - window // 2) dilation, (j - window // 2) dilation), rows first.

    Args:
        q, k: [N, C, H, W], of one dtype.
        window: K.
        dilation: pixels from tap to tap.

    Returns:
        [N, K * K, H, W] in the dtype of q; channels_last if q is channels_last and not contiguous at the same
        time. Computed in at least float32, rounded once.

    Raises:
        ValueError: shapes that do not fit together, numbers too small.
        TypeError: wrong dtypes.

    Source: Brüggemann et al., "Exploring Relational Context for Multi-Task Dense Prediction", ICCV 2021,
    section 3.2.2.
    """
    check_at_least(_OP, "window", (window,), 1)
    check_at_least(_OP, "dilation", (dilation,), 1)
    check_map(_OP, "q", q)
    check_map(_OP, "k", k, q.shape)
    check_dtype(_OP, "k", k, q.dtype)
    dtype = compute_dtype(q)
    taps = window_of((q.shape[2], q.shape[3]), window, dilation, device=q.device)
    return in_format_of(taps.dot(q.to(dtype), k.to(dtype)).to(q.dtype), q)
