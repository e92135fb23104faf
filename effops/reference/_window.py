"""Windows of K x K taps over images: which pixel a tap reads, and weights per tap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from effops.reference._bilinear import check_floating, check_shape
from effops.reference._rowconv import check_at_least

NORMALIZATIONS = ("softmax", "none", "sum")
PADDING_MODES = ("zeros", "replicate", "reflect", "renormalize")


class Window(NamedTuple):
    """The taps around each output pixel, in rows; tap (i, j) reads pixel (rows[i, y], columns[j, x]).

    A tap outside the image reads what the padding says. If it reads nothing, `reads` is False, and its row or
    column is that of some pixel all the same.
    """

    offsets: Tensor  # [K] int64, pixels from the centre to a tap along an axis
    rows: Tensor  # [K, Ho] int64
    columns: Tensor  # [K, Wo] int64
    reads: Tensor  # [K, K, Ho, Wo] bool

    def read(self, image: Tensor, row: int) -> Tensor:
        """What the taps of one row read of an image [..., H, W]: [..., K, Ho, Wo]; 0 for nothing."""
        pixels = image[..., self.rows[row][:, None], self.columns[:, None, :]]
        return torch.where(self.reads[row], pixels, 0.0)

    def mix(self, weights: Tensor, image: Tensor) -> Tensor:
        """The sum over the taps of weights [..., K * K, Ho, Wo] times what they read of [..., C, H, W].

        [..., C, Ho, Wo]. What is not read is not multiplied: its weight reaches nothing, even if it is NaN.
        """
        kernel = len(self.offsets)
        out = image.new_zeros(*image.shape[:-2], self.rows.shape[1], self.columns.shape[1])
        for row, row_weights in enumerate(weights.unflatten(-3, (kernel, kernel)).unbind(-4)):
            used = torch.where(self.reads[row], row_weights, 0.0)
            out = out + (used.unsqueeze(-4) * self.read(image, row)).sum(-3)
        return out

    def dot(self, q: Tensor, k: Tensor) -> Tensor:
        """The sum over the channels of q [..., C, H, W] times what each tap reads of k: [..., K * K, H, W].

        0 where nothing is read.
        """
        found = []
        for row, reads in enumerate(self.reads):
            used = torch.where(reads, q.unsqueeze(-3), 0.0)
            found.append((used * self.read(k, row)).sum(-4))
        return torch.cat(found, dim=-3)

    def flow(self, weights: Tensor) -> Tensor:
        """The sum over the taps of weights [..., K * K, Ho, Wo] times (dx, dy): [..., 2, Ho, Wo]."""
        dy, dx = torch.cartesian_prod(self.offsets, self.offsets).unbind(1)
        return torch.stack([(weights * d[:, None, None]).sum(-3) for d in (dx, dy)], dim=-3)


def window_of(
    size: tuple[int, int],  # (height, width) of the image
    kernel: int,
    dilation: int = 1,
    stride: int = 1,
    upsample: int = 1,
    padding_mode: str = "zeros",
    device: torch.device | None = None,
) -> Window:
    """Tap i along an axis lies (i - K // 2) * dilation pixels from the centre.

    The centre of output pixel (y, x) is pixel (y * stride // upsample, x * stride // upsample); there are
    ceil(H * upsample / stride) x ceil(W * upsample / stride) output pixels.
    """
    offsets = (torch.arange(kernel, device=device) - kernel // 2) * dilation
    at, reads = [], []
    for side in size:
        outputs = torch.arange(output_side(side, stride, upsample), device=device)
        taps = offsets[:, None] + outputs * stride // upsample
        at.append(_padded(taps, side, padding_mode))
        is_inside = (taps >= 0) & (taps < side)
        reads.append(is_inside | (padding_mode in ("replicate", "reflect")))
    return Window(offsets, at[0], at[1], reads[0][:, None, :, None] & reads[1][None, :, None, :])


def output_side(side: int, stride: int, upsample: int) -> int:
    return -(-side * upsample // stride)


def _padded(taps: Tensor, side: int, padding_mode: str) -> Tensor:
    """The rows (or columns) of the image that are read for these, of which there are `side`."""
    if padding_mode != "reflect":
        return taps.clamp(0, max(side - 1, 0))
    period = max(2 * (side - 1), 1)  # there and back, the two borders once
    folded = taps % period
    return torch.minimum(folded, (period - folded) % period) if side > 1 else folded


def normalized(filters: Tensor, normalize: str, counted: Tensor | None = None) -> Tensor:
    """The weights of the taps, [..., K * K, Ho, Wo].

    Args:
        filters: [..., K * K, Ho, Wo].
        normalize: "softmax", "none" or "sum".
        counted: [K, K, Ho, Wo] bool. The others are left out, and the weights of these sum to 1.
    """
    if counted is None:
        if normalize == "softmax":
            return filters.softmax(-3)
        return filters if normalize == "none" else filters / filters.sum(-3, keepdim=True)
    counted = counted.flatten(0, 1)
    if normalize == "softmax":
        return torch.where(counted, filters, -torch.inf).softmax(-3)
    weights = torch.where(counted, filters, 0.0)
    return torch.where(counted, weights / weights.sum(-3, keepdim=True), 0.0)


# ------------------------------------------------------------------------------------------ checks


def check_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: expected {name} to be one of {', '.join(map(repr, choices))}, got {value!r}")


def kernel_of(op: str, name: str, filters: Tensor, groups: int) -> int:
    """K of filters [N, groups * K * K, H, W]."""
    check_at_least(op, "groups", (groups,), 1)
    channels = filters.shape[1]
    kernel = math.isqrt(channels // groups)
    if kernel < 1 or groups * kernel * kernel != channels:
        raise ValueError(
            f"{op}: expected {name} of groups * K * K channels for a whole K >= 1, "
            f"got {channels} with groups {groups}"
        )
    return kernel


def check_map(op: str, name: str, tensor: Tensor, sizes: Sequence[int | None] = (None,) * 4) -> None:
    """Maps [N, C, H, W] of a floating dtype."""
    check_shape(op, name, tensor, "NCHW", sizes)
    check_floating(op, name, tensor)
