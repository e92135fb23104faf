"""The ops of the localfilter engine in plain PyTorch, as well as it goes: odd windows, zeros outside.

- unfold: all windows are stored; what most published code does.
- shifts: a loop over the taps, each of them a shifted view of the padded maps. The gradients are written by
  hand: autograd would keep a map for every tap, and fill one with zeros for every view.
- blocks: matrix products of blocks of 8 x 8 pixels with the pixels around them, most of which a mask hides.

Every function is differentiable and runs on every device; those with a flow are for float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

_BLOCK = 8


def _kernel(filters: Tensor) -> int:
    return math.isqrt(filters.shape[1])


def _pad(maps: Tensor, kernel: int) -> Tensor:
    return F.pad(maps, (kernel // 2,) * 4)


def _shifted(padded: Tensor, kernel: int) -> Iterator[Tensor]:
    """What the taps read, as views."""
    height, width = (side - kernel + 1 for side in padded.shape[-2:])
    for y in range(kernel):
        for x in range(kernel):
            yield padded[..., y : y + height, x : x + width]


def _windows(maps: Tensor, kernel: int) -> Tensor:
    """[N, C, K * K, H, W]"""
    windows = F.unfold(maps, kernel, padding=kernel // 2)
    return windows.view(*maps.shape[:2], kernel**2, *maps.shape[2:])


# ------------------------------------------------------------------------------------------ filters


def filter_flow_unfold(image: Tensor, filters: Tensor) -> Tensor:
    return neighborhood_mix_unfold(filters.softmax(1), image)


def filter_flow_shifts(image: Tensor, filters: Tensor) -> Tensor:
    return neighborhood_mix_shifts(filters.softmax(1), image)


def filter_flow_exp_shifts(image: Tensor, filters: Tensor) -> Tensor:
    """The weights of a tap are made when it is its turn, and never stored."""
    out: Tensor = _SoftmaxMix.apply(_pad(image, _kernel(filters)), filters)
    return out


def filter_and_flow_unfold(image: Tensor, filters: Tensor) -> tuple[Tensor, Tensor]:
    weights = filters.softmax(1)
    return neighborhood_mix_unfold(weights, image), _mean_offset(weights)


def filter_and_flow_shifts(image: Tensor, filters: Tensor) -> tuple[Tensor, Tensor]:
    """The coordinates of the pixels are two more channels of the image."""
    kernel, channels = _kernel(filters), image.shape[1]
    padded = _pad(image, kernel)
    height, width = padded.shape[2:]
    ys, xs = torch.meshgrid(
        torch.arange(height, device=image.device), torch.arange(width, device=image.device), indexing="ij"
    )
    places = torch.stack([xs, ys]).to(padded).expand(len(image), -1, -1, -1)
    mixed = _SoftmaxMix.apply(torch.cat([padded, places], 1), filters)
    border = kernel // 2
    centers = places[:, :, border : height - border, border : width - border]
    return mixed[:, :channels], mixed[:, channels:] - centers


def expected_flow(filters: Tensor) -> Tensor:
    return _mean_offset(filters.softmax(1))


def expected_flow_rows(filters: Tensor) -> Tensor:
    """The weights of a few rows of pixels at a time; they stay in the cache."""
    offsets = _offsets(_kernel(filters), filters.device)
    offsets = torch.cat([offsets, torch.ones_like(offsets[:1])])
    parts = []
    for rows in filters.split(2 if filters.device.type == "cpu" else filters.shape[2], 2):
        weights = (rows - rows.detach().amax(1, keepdim=True)).exp_()
        sums = offsets @ weights.flatten(2)
        parts.append((sums[:, :2] / sums[:, 2:]).unflatten(2, rows.shape[2:]))
    return torch.cat(parts, 2)


def _mean_offset(weights: Tensor) -> Tensor:
    flow = _offsets(_kernel(weights), weights.device) @ weights.float().flatten(2)
    return flow.unflatten(2, weights.shape[2:])


@functools.cache
def _offsets(kernel: int, device: torch.device) -> Tensor:
    """[2, K * K]"""
    taps = torch.arange(kernel**2, device=device)
    return torch.stack([taps % kernel, taps // kernel]).float() - kernel // 2


class _SoftmaxMix(Function):
    @staticmethod
    def forward(ctx: Any, padded: Tensor, filters: Tensor) -> Tensor:
        kernel = _kernel(filters)
        top = filters.amax(1, keepdim=True).float()
        total, weights = torch.zeros_like(top), torch.empty_like(top)
        out = top.new_zeros(len(filters), padded.shape[1], *filters.shape[2:])
        for k, view in enumerate(_shifted(padded, kernel)):
            torch.sub(filters[:, k : k + 1], top, out=weights)
            total += weights.exp_()
            out.addcmul_(weights, view)
        out /= total
        ctx.save_for_backward(padded, filters, out, total.log_().add_(top))
        return out.to(padded.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        padded, filters, out, log_sum_exp = ctx.saved_tensors
        kernel = _kernel(filters)
        grad_filters, grad_padded = torch.empty_like(filters), torch.zeros_like(padded, dtype=out.dtype)
        mean = (grad * out).sum(1, keepdim=True)
        weights, similarity = torch.empty_like(mean), torch.empty_like(mean)
        views = zip(_shifted(padded, kernel), _shifted(grad_padded, kernel), strict=True)
        for k, (view, target) in enumerate(views):
            torch.sub(filters[:, k : k + 1], log_sum_exp, out=weights)
            weights.exp_()
            target.addcmul_(weights, grad)
            torch.mul(grad[:, :1], view[:, :1], out=similarity)
            for c in range(1, grad.shape[1]):
                similarity.addcmul_(grad[:, c : c + 1], view[:, c : c + 1])
            torch.mul(similarity.sub_(mean), weights, out=grad_filters[:, k : k + 1])
        return grad_padded.to(padded.dtype), grad_filters


# ------------------------------------------------------------------------------------------ upsampling


def carafe_unfold(features: Tensor, masks: Tensor, scale: int) -> Tensor:
    batch, channels, height, width = features.shape
    windows = _windows(features, _kernel(masks))[:, :, :, :, None, :, None]
    masks = masks.view(batch, 1, -1, height, scale, width, scale)
    return (windows * masks).sum(2).view(batch, channels, scale * height, scale * width)


def carafe_products(features: Tensor, masks: Tensor, scale: int) -> Tensor:
    """A matrix product per pixel of the features."""
    batch, channels, height, width = features.shape
    windows = _windows(features, _kernel(masks))
    masks = masks.view(batch, -1, height, scale, width, scale)
    out = torch.einsum("nckyx,nkyixj->ncyixj", windows, masks)
    return out.reshape(batch, channels, scale * height, scale * width)


def carafe_shifts(features: Tensor, masks: Tensor, scale: int) -> Tensor:
    masks = F.pixel_unshuffle(masks, scale).unflatten(1, (-1, scale**2))
    return _upsampling_shifts(features, masks, scale)


def convex_upsample_unfold(flow: Tensor, mask: Tensor, scale: int) -> Tensor:
    """As RAFT and torchvision have it."""
    batch, channels, height, width = flow.shape
    weights = mask.view(batch, 1, 9, scale, scale, height, width).softmax(2)
    windows = _windows(scale * flow, 3)[:, :, :, None, None]
    out = (weights * windows).sum(2).permute(0, 1, 4, 2, 5, 3)
    return out.reshape(batch, channels, scale * height, scale * width)


def convex_upsample_shifts(flow: Tensor, mask: Tensor, scale: int) -> Tensor:
    weights = mask.unflatten(1, (9, scale**2)).softmax(1)
    return _upsampling_shifts(scale * flow, weights, scale)


def _upsampling_shifts(maps: Tensor, weights: Tensor, scale: int) -> Tensor:
    """weights [N, K * K, scale ** 2, H, W]. The taps are few: autograd is good enough."""
    kernel = _kernel(weights)
    out = maps.new_zeros(*maps.shape[:2], *weights.shape[2:])
    views = _shifted(_pad(maps, kernel), kernel)
    for view, weight in zip(views, weights.unbind(1), strict=True):
        out.addcmul_(weight[:, None], view[:, :, None])
    return F.pixel_shuffle(out.flatten(1, 2), scale)


# ------------------------------------------------------------------------------------------ neighborhoods


def neighborhood_dot_unfold(q: Tensor, k: Tensor, window: int) -> Tensor:
    return (q[:, :, None] * _windows(k, window)).sum(1)


def neighborhood_dot_shifts(q: Tensor, k: Tensor, window: int) -> Tensor:
    out: Tensor = _Dot.apply(q, _pad(k, window), window)
    return out


def neighborhood_dot_blocks(q: Tensor, k: Tensor, window: int) -> Tensor:
    band = _band(_blocks(q) @ _halos(k, window), window)
    return _from_blocks(band.flatten(3).flatten(1, 2), *q.shape[2:])


def neighborhood_mix_unfold(weights: Tensor, v: Tensor) -> Tensor:
    return (_windows(v, _kernel(weights)) * weights[:, None]).sum(2)


def neighborhood_mix_shifts(weights: Tensor, v: Tensor) -> Tensor:
    out: Tensor = _Mix.apply(weights, _pad(v, _kernel(weights)))
    return out


def neighborhood_mix_blocks(weights: Tensor, v: Tensor) -> Tensor:
    window = _kernel(weights)
    matrices = _spread(_blocks(weights), window, 0.0)
    return _from_blocks(matrices @ _halos(v, window).mT, *v.shape[2:])


class _Dot(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, padded: Tensor, window: int) -> Tensor:
        ctx.save_for_backward(q, padded)
        out, products = q.new_empty(len(q), window**2, *q.shape[2:]), torch.empty_like(q)
        for k, view in enumerate(_shifted(padded, window)):
            torch.sum(torch.mul(q, view, out=products), 1, out=out[:, k])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        q, padded = ctx.saved_tensors
        window = _kernel(grad)
        grad_q, grad_padded = (torch.zeros_like(maps, dtype=torch.float32) for maps in (q, padded))
        views = zip(_shifted(padded, window), _shifted(grad_padded, window), strict=True)
        for k, (view, target) in enumerate(views):
            grad_q.addcmul_(grad[:, k : k + 1], view)
            target.addcmul_(grad[:, k : k + 1], q)
        return grad_q.to(q.dtype), grad_padded.to(q.dtype), None


class _Mix(Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, padded: Tensor) -> Tensor:
        ctx.save_for_backward(weights, padded)
        shape = (*padded.shape[:2], *weights.shape[2:])
        out = padded.new_zeros(shape, dtype=torch.float32)
        for k, view in enumerate(_shifted(padded, _kernel(weights))):
            out.addcmul_(weights[:, k : k + 1], view)
        return out.to(padded.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        weights, padded = ctx.saved_tensors
        window = _kernel(weights)
        grad_weights, grad_padded = torch.empty_like(weights), torch.zeros_like(padded, dtype=torch.float32)
        products = torch.empty_like(grad)
        views = zip(_shifted(padded, window), _shifted(grad_padded, window), strict=True)
        for k, (view, target) in enumerate(views):
            torch.sum(torch.mul(grad, view, out=products), 1, out=grad_weights[:, k])
            target.addcmul_(weights[:, k : k + 1], grad)
        return grad_weights, grad_padded.to(padded.dtype)


# ------------------------------------------------------------------------------------------ attention


def hidden_taps(height: int, width: int, window: int, dtype: torch.dtype, device: str) -> Tensor:
    """[1, K * K, H, W], to be added to logits: -inf for taps outside, else 0."""
    inside = _windows(torch.ones(1, 1, height, width, device=device), window)[:, 0] > 0
    return torch.zeros_like(inside, dtype=dtype).masked_fill_(~inside, -torch.inf)


def hidden_in_blocks(hidden: Tensor) -> Tensor:
    """[blocks, pixels of a block, pixels around it]"""
    return _spread(_blocks(hidden), _kernel(hidden), -torch.inf)


def local_attention_unfold(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    logits = neighborhood_dot_unfold(q * q.shape[1] ** -0.5, k, _kernel(hidden))
    return neighborhood_mix_unfold((logits + hidden).softmax(1), v)


def local_attention_shifts(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    logits = neighborhood_dot_shifts(q * q.shape[1] ** -0.5, k, _kernel(hidden))
    return neighborhood_mix_shifts((logits + hidden).softmax(1), v)


def local_attention_blocks(q: Tensor, k: Tensor, v: Tensor, window: int, hidden: Tensor) -> Tensor:
    """With the result of hidden_in_blocks; a batch of one."""
    logits = torch.baddbmm(hidden, _blocks(q), _halos(k, window), alpha=q.shape[1] ** -0.5)
    return _from_blocks(logits.softmax(2) @ _halos(v, window).mT, *q.shape[2:])


# ------------------------------------------------------------------------------------------ blocks


def _blocks(maps: Tensor) -> Tensor:
    """[N, C, H, W] to [blocks, pixels, C]"""
    blocks = maps.unflatten(3, (-1, _BLOCK)).unflatten(2, (-1, _BLOCK))
    return blocks.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)


def _from_blocks(rows: Tensor, height: int, width: int) -> Tensor:
    grid = (height // _BLOCK, width // _BLOCK)
    blocks = rows.unflatten(0, (-1, *grid)).unflatten(3, (_BLOCK, _BLOCK))
    return blocks.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _halos(maps: Tensor, window: int) -> Tensor:
    """[blocks, C, pixels of and around a block]"""
    side = _BLOCK + window - 1
    halos = F.unfold(maps, side, padding=window // 2, stride=_BLOCK)
    return halos.unflatten(1, (maps.shape[1], side**2)).permute(0, 3, 1, 2).flatten(0, 1)


def _spread(rows: Tensor, window: int, fill: float) -> Tensor:
    """Windows [blocks, pixels, K * K] as matrices [blocks, pixels, pixels around]."""
    matrices = rows.new_full((*rows.shape[:2], (_BLOCK + window - 1) ** 2), fill)
    band = _band(matrices, window)
    band.copy_(rows.view(band.shape))
    return matrices


def _band(matrices: Tensor, window: int) -> Tensor:
    """The inverse, as a view [blocks, 8, 8, K, K]: pixel (y, x) of a block reads those around it from (y, x)
    on."""
    side = _BLOCK + window - 1
    block, pixel, _ = matrices.stride()
    strides = (block, _BLOCK * pixel + side, pixel + 1, side, 1)
    return matrices.as_strided((len(matrices), _BLOCK, _BLOCK, window, window), strides)
