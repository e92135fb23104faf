"""Convolution of an SPS at its active cells: the definition."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from effops._sps import SPS
from effops.reference._bilinear import check_shape, compute_dtype
from effops.reference._rowconv import (
    Cells,
    check_at_least,
    check_dtype,
    check_groups,
    check_sps,
    convolve,
    table,
)

_OP = "sps_conv2d"


def sps_conv2d(
    active: Tensor,
    passive: Tensor,
    index_map: Tensor,
    roi: Tensor,
    xy: Tensor,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor] | None = None,
    dilation: int | Sequence[int] = 1,
    activation: str | None = None,
    groups: int = 1,
) -> Tensor:
    """New features of the active cells, from everything around them in their map.

        out[i] = act(bias + sum over taps (u, v) in the map of W[:, :, u, v] f(x_i + d v, y_i + d u))
        f(x, y) = cat([active, passive])[index_map[roi_i, y, x]],    u, v in -(k - 1) / 2 ... (k - 1) / 2

    the features before the convolution, of active and passive cells alike. This is the value at the active
    cells of a dense convolution with zero padding; but cells outside the map are left out, not multiplied.
    Lists of weights and dilations (and biases) give the sum of their results, after the activation.

    Args:
        active, passive, index_map, roi, xy: the fields of an :class:`effops.SPS`.
        weight: [O, F / groups, k, k] with k odd, or a list of D >= 1 of them, of one O; k may differ.
        bias: [O], or a list beside a list of weights.
        dilation: 1 or more, or a list beside a list of weights.
        activation: None or "relu".
        groups: blocks of channels that are convolved separately, as in :func:`torch.nn.functional.conv2d`.

    Returns:
        [NA, O], dtype of the features. Computed in at least float32 and rounded once.

    Raises:
        ValueError: shapes that do not fit together, lists of different lengths, ids or cells out of range,
            an even kernel size, an unknown activation.
        TypeError: wrong dtypes, lists beside single values.

    Source: C. Picron, PhD thesis, section 5.3.2; the sum of several dilations is its semantic fusion module.
    """
    sps = SPS(active, passive, index_map, roi, xy)
    check_sps(_OP, sps)
    weights, biases, dilations = _branches(weight, bias, dilation)
    _check_weights(sps, weights, biases, groups)
    check_at_least(_OP, "dilation", tuple(dilations), 1)
    if activation not in (None, "relu"):
        raise ValueError(f'{_OP}: expected activation None or "relu", got {activation!r}')

    dtype = compute_dtype(active)
    rows = table(sps, dtype)
    x, y = xy.long().unbind(1)
    out = rows.new_zeros(len(active), len(weights[0]))
    for branch_weight, branch_bias, d in zip(weights, biases, dilations, strict=True):
        reach = d * (branch_weight.shape[-1] // 2)
        first = Cells(roi.long(), y - reach, x - reach)
        branch = convolve(rows, index_map, first, branch_weight.to(dtype), (d, d), groups)
        if branch_bias is not None:
            branch = branch + branch_bias.to(dtype)
        out = out + (branch.relu() if activation == "relu" else branch)
    return out.to(active.dtype)


def _branches(
    weight: Tensor | Sequence[Tensor], bias: Tensor | Sequence[Tensor] | None, dilation: int | Sequence[int]
) -> tuple[list[Tensor], list[Tensor | None], list[int]]:
    """The arguments as lists of one length."""
    if isinstance(weight, Tensor):
        if not isinstance(dilation, int) or not (bias is None or isinstance(bias, Tensor)):
            raise TypeError(f"{_OP}: expected a list of weights beside a list of dilations or biases")
        return [weight], [bias], [dilation]
    if isinstance(dilation, int) or isinstance(bias, Tensor):
        raise TypeError(f"{_OP}: expected lists of dilations and biases beside a list of weights")
    weights, dilations = list(weight), list(dilation)
    biases: list[Tensor | None] = [None] * len(weights) if bias is None else list(bias)
    if len(weights) == 0:
        raise ValueError(f"{_OP}: expected at least one weight, got none")
    for name, values in (("dilation", dilations), ("bias", biases)):
        if len(values) != len(weights):
            raise ValueError(f"{_OP}: expected one {name} per weight ({len(weights)}), got {len(values)}")
    return weights, biases, dilations


def _check_weights(sps: SPS, weights: list[Tensor], biases: list[Tensor | None], groups: int) -> None:
    features = sps.active.shape[1]
    check_shape(_OP, "weight[0]", weights[0], "OFkk", (None, None, None, None))
    outputs = len(weights[0])
    check_groups(_OP, groups, features, outputs)
    for d, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        side = weight.shape[-1]
        check_shape(_OP, f"weight[{d}]", weight, "OFkk", (outputs, features // groups, side, side))
        check_dtype(_OP, f"weight[{d}]", weight, sps.active.dtype)
        if side % 2 == 0:
            raise ValueError(f"{_OP}: expected weight[{d}] with an odd kernel size, got {list(weight.shape)}")
        if bias is not None:
            check_shape(_OP, f"bias[{d}]", bias, "O", (outputs,))
            check_dtype(_OP, f"bias[{d}]", bias, sps.active.dtype)
