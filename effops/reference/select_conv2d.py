"""One of several convolutions for each pixel: the definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effops.reference._bilinear import check_floating, check_shape, compute_dtype
from effops.reference._rowconv import (
    Cells,
    cells_of,
    check_at_least,
    check_dtype,
    convolve,
    dense_map,
    to_map,
)

_OP = "select_conv2d"


def select_conv2d(
    x: Tensor, weights: Tensor, choice: Tensor, dilations: Sequence[int], bias: Tensor | None = None
) -> Tensor:
    """Each pixel takes the result of the branch that it chooses; the others are not computed.

        out[n, :, y, x] = conv2d(x, weights[p], bias[p], dilation=dilations[p])[n, :, y, x]
        p = choice[n, y, x]

    with padding that keeps the size. A branch of dilation 0 is a copy of x, without weight and bias; the
    choice -1 gives 0. Cells outside the map are left out of the sums, not multiplied.

    Args:
        x: [N, Ci, H, W].
        weights: [P, Co, Ci, k, k], k odd; those of a branch of dilation 0 are ignored.
        choice: [N, H, W], int32 or int64 in [-1, P).
        dilations: P numbers, 0 or more; 0 needs Co = Ci.
        bias: [P, Co].

    Returns:
        [N, Co, H, W], dtype of x; channels_last if x is channels_last and not contiguous at the same time.
        Computed in at least float32 and rounded once.

    Raises:
        ValueError: shapes that do not fit together, an even kernel size, choices out of range, a negative
            dilation, an identity branch between different numbers of channels.
        TypeError: wrong dtypes.

    Source: S. Kong, PhD thesis, section 4.3.4 (MultiPool of pixel-wise attentional gating).
    """
    _check(x, weights, choice, dilations, bias)
    height, width = x.shape[2:]
    dtype = compute_dtype(x)
    rows, ids = dense_map(x, dtype)
    nothing = rows[:0].sum(1, keepdim=True).expand(-1, weights.shape[1])  # P = 0 has a gradient too
    out = torch.cat([nothing, rows.new_zeros(len(rows), weights.shape[1])])
    for p, dilation in enumerate(dilations):
        positions = (choice == p).flatten().nonzero()[:, 0]
        if dilation == 0:
            branch = rows[positions]
        else:
            cells = cells_of(positions, height, width)
            reach = dilation * (weights.shape[-1] // 2)
            first = Cells(cells.map, cells.y - reach, cells.x - reach)
            branch = convolve(rows, ids, first, weights[p].to(dtype), (dilation, dilation))
            if bias is not None:
                branch = branch + bias[p].to(dtype)
        out = out.index_copy(0, positions, branch)
    return to_map(out, x, height, width)


def _check(x: Tensor, weights: Tensor, choice: Tensor, dilations: Sequence[int], bias: Tensor | None) -> None:
    check_shape(_OP, "x", x, "NCHW", (None, None, None, None))
    check_shape(_OP, "weights", weights, "POCkk", (len(dilations), None, x.shape[1], None, None))
    check_shape(_OP, "choice", choice, "NHW", (len(x), *x.shape[2:]))
    check_floating(_OP, "x", x)
    check_dtype(_OP, "weights", weights, x.dtype)
    check_dtype(_OP, "choice", choice, torch.int32, torch.int64)
    outputs, _, kernel_height, kernel_width = weights.shape[1:]
    if kernel_height != kernel_width or kernel_height % 2 == 0:
        raise ValueError(f"{_OP}: expected weights with a square, odd kernel, got {list(weights.shape)}")
    if bias is not None:
        check_shape(_OP, "bias", bias, "PO", (len(dilations), outputs))
        check_dtype(_OP, "bias", bias, x.dtype)
    check_at_least(_OP, "dilations", tuple(dilations), 0)
    if 0 in dilations and outputs != x.shape[1]:
        raise ValueError(
            f"{_OP}: expected dilations > 0 (0, the identity, needs as many output as input channels), "
            f"got 0 with {list(weights.shape)}"
        )
    wrong = choice[(choice < -1) | (choice >= len(dilations))]
    if wrong.numel() > 0:
        raise ValueError(f"{_OP}: expected choice in [-1, P = {len(dilations)}), got {int(wrong[0])}")
