"""Attention of every pixel to the window around it: the definition."""

from __future__ import annotations

from torch import Tensor

from effops.reference._bilinear import compute_dtype
from effops.reference._maps import in_format_of
from effops.reference._rowconv import check_at_least, check_dtype
from effops.reference._window import check_choice, check_map, normalized, window_of

_OP = "local_attention"


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    dilation: int = 1,
    scale: float | None = None,
    border: str = "mask",
) -> Tensor:
    """Softmax attention of each pixel to the window x window taps around it.

        out[n, :, p] = sum over taps t of a[n, p, t] v[n, :, p + o_t]
        a[n, p, :] = softmax over t of scale q[n, :, p] . k[n, :, p + o_t]

    Tap t = i window + j lies at o_t = ((i - window // 2) dilation, (j - window // 2) dilation), rows first.
    For taps outside the image, by border,

        "mask"    they take no part
        "zero"    their similarity is 0 and takes part in the softmax; their value adds nothing

    Args:
        q, k: [N, C, H, W].
        v: [N, Cv, H, W].
        window: K.
        dilation: pixels from tap to tap.
        scale: None is C ** -0.5 (1 without channels).
        border: "mask" or "zero".

    Returns:
        [N, Cv, H, W], one dtype for all; channels_last if q is channels_last and not contiguous at the same
        time. Computed in at least float32, rounded once.

    Raises:
        ValueError: shapes that do not fit together, numbers too small, a border that does not exist.
        TypeError: wrong dtypes.

    Source: Brüggemann et al., "Exploring Relational Context for Multi-Task Dense Prediction", ICCV 2021,
    section 3.2.2.
    """
    check_at_least(_OP, "window", (window,), 1)
    check_at_least(_OP, "dilation", (dilation,), 1)
    check_choice(_OP, "border", border, ("mask", "zero"))
    check_map(_OP, "q", q)
    batch, channels, height, width = q.shape
    check_map(_OP, "k", k, q.shape)
    check_map(_OP, "v", v, (batch, None, height, width))
    check_dtype(_OP, "k", k, q.dtype)
    check_dtype(_OP, "v", v, q.dtype)
    if scale is None:
        scale = max(channels, 1) ** -0.5
    dtype = compute_dtype(q)
    taps = window_of((height, width), window, dilation, device=q.device)
    similarity = scale * taps.dot(q.to(dtype), k.to(dtype))
    attention = normalized(similarity, "softmax", taps.reads if border == "mask" else None)
    return in_format_of(taps.mix(attention, v.to(dtype)).to(q.dtype), q)
