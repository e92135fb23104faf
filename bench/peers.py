"""Other implementations of the ops, as far as they can be imported here.

Each takes the arguments of `effops.ms_deform_attn`: value [B, S, M, D], shapes (list of pairs), locations
[B, Q, M, L, P, 2] and weights [B, Q, M, L, P] in float32. Half-precision values are widened and the result
narrowed where a peer has no half-precision kernel with float32 locations, as it would be done in a model.
A peer that does not load is listed in `MISSING` with the reason; the benchmark checks the result of every
peer before it times it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from effops.demo.sections.ms_deform_attn import plain_pytorch

Shapes = Sequence[tuple[int, int]]
Peer = Callable[[Tensor, Shapes, Tensor, Tensor], Tensor]

MISSING: dict[str, str] = {}


def ms_deform_attn(device: str) -> dict[str, Peer]:
    """Peers for the device, by name."""
    peers: dict[str, Peer] = {"grid_sample": _widened(plain_pytorch)}
    loaders: dict[str, Callable[[], Peer]] = {"torch-ms-deform-attn": _torch_ms_deform_attn}
    if device == "cuda":
        peers["compiled grid_sample"] = _widened(torch.compile(plain_pytorch, dynamic=False))
        loaders |= {"upstream": _upstream, "mmcv": _mmcv, "msda-triton": _msda_triton}
    for name, load in loaders.items():
        try:
            peers[name] = load()
        except Exception as error:  # a broken binary may raise anything at import
            MISSING[name] = f"{type(error).__name__}: {error}".split("\n")[0]
    return peers


def _widened(function: Peer) -> Peer:
    def run(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
        return function(value.float(), shapes, locations, weights).to(value.dtype)

    return run


def _metadata(shapes: Shapes, device: torch.device) -> tuple[Tensor, Tensor]:
    """Shapes and starts as int64 tensors on the device; kept, so that no copy is timed."""
    key = (tuple(shapes), device)
    if key not in _METADATA:
        sizes = torch.tensor(shapes)
        area = sizes.prod(1)
        _METADATA[key] = (sizes.to(device), (area.cumsum(0) - area).to(device))
    return _METADATA[key]


_METADATA: dict[tuple[object, torch.device], tuple[Tensor, Tensor]] = {}


def _sensetime(apply: Callable[..., Tensor]) -> Peer:
    """Peers with the arguments of Deformable DETR's MSDeformAttnFunction."""

    def run(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
        return apply(value, *_metadata(shapes, value.device), locations, weights, 64)

    return _widened(run)


def _torch_ms_deform_attn() -> Peer:
    return _sensetime(importlib.import_module("torch_ms_deform_attn").ms_deform_attn)


def _upstream() -> Peer:
    """The extension that Deformable DETR and its copies build, with its autograd function."""
    extension = importlib.import_module("MultiScaleDeformableAttention")

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value, shapes, starts, locations, weights, step):
            ctx.step = step
            ctx.save_for_backward(value, shapes, starts, locations, weights)
            return extension.ms_deform_attn_forward(value, shapes, starts, locations, weights, step)

        @staticmethod
        def backward(ctx, grad):
            grads = extension.ms_deform_attn_backward(*ctx.saved_tensors, grad.contiguous(), ctx.step)
            return grads[0], None, None, grads[1], grads[2], None

    return _sensetime(Function.apply)


def _mmcv() -> Peer:
    module = importlib.import_module("mmcv.ops.multi_scale_deform_attn")
    return _sensetime(module.MultiScaleDeformableAttnFunction.apply)


def _msda_triton() -> Peer:
    attend = importlib.import_module("msda_triton").multiscale_deformable_attention

    def run(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
        sizes, _ = _metadata(shapes, value.device)
        out = attend(value, sizes, locations, weights, padding_mode="zeros", align_corners=False)
        return out.flatten(2)

    return _widened(run)
