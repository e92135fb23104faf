"""point_sample and roi_align on the feature pyramid of an 800 x 1344 image, 256 channels.

The peer is plain PyTorch: grid_sample for all points of a level at once.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import effops

_CHANNELS = 256
_STRIDES = [4, 8, 16, 32]
_SIZES = [(800 // stride, 1344 // stride) for stride in _STRIDES]
_POINTS, _ROIS, _BINS, _SAMPLES = 19600, 512, 7, 2
_LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def _pyramid(layout: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, _CHANNELS, *size, generator=generator) for size in _SIZES]
    return [feature.to(device, dtype).contiguous(memory_format=_LAYOUTS[layout]) for feature in maps]


def _levels(count: int, device: str) -> Tensor:
    return torch.randint(len(_SIZES), (count,), generator=torch.Generator().manual_seed(1)).to(device)


def _plain_point_sample(pyramid: list[Tensor], level: Tensor, xy: Tensor) -> Tensor:
    out = xy.new_zeros(len(xy), _CHANNELS).to(pyramid[0].dtype)
    for index, feature in enumerate(pyramid):
        chosen = (level == index).nonzero()[:, 0]
        grid = (2 * xy[chosen] - 1)[None, None].to(feature.dtype)
        sampled = F.grid_sample(feature, grid, align_corners=False)[0, :, 0].T
        out = out.index_copy(0, chosen, sampled)
    return out


def _plain_roi_align(pyramid: list[Tensor], rois: Tensor, level: Tensor) -> Tensor:
    """For boxes inside the image, where the border rule does not matter."""
    out = rois.new_zeros(len(rois), _CHANNELS, _BINS, _BINS).to(pyramid[0].dtype)
    side = _BINS * _SAMPLES
    steps = (torch.arange(side, device=rois.device) + 0.5) / side
    for index, feature in enumerate(pyramid):
        chosen = (level == index).nonzero()[:, 0]
        size = torch.tensor([1344.0, 800.0], device=rois.device)
        first, last = (rois[chosen, 1:3] / size, rois[chosen, 3:5] / size)
        x = first[:, :1] + steps * (last - first)[:, :1]
        y = first[:, 1:] + steps * (last - first)[:, 1:]
        grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1) * 2 - 1
        grid = grid.reshape(1, -1, side, 2).to(feature.dtype)
        sampled = F.grid_sample(feature, grid, align_corners=False, padding_mode="border")
        bins = F.avg_pool2d(sampled, _SAMPLES)[0].unflatten(1, (-1, _BINS)).transpose(0, 1)
        out = out.index_copy(0, chosen, bins)
    return out


def _race(race, benchmark, op, functions, pyramid, direction):
    if direction != "forward":
        leaves = [feature.detach().clone().requires_grad_() for feature in pyramid]
        grad = torch.ones_like(functions["effops"](pyramid))
        functions = {
            name: lambda function=function: torch.autograd.grad(function(leaves), leaves, grad)
            for name, function in functions.items()
        }
    else:
        functions = {
            name: lambda function=function: function(pyramid) for name, function in functions.items()
        }
    benchmark.group = op
    race(functions.pop("effops"), functions)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("layout", _LAYOUTS)
@pytest.mark.parametrize("dtype_name", ["float32"])
def test_point_sample(dtype_name, layout, direction, device, race, benchmark):
    pyramid, level = _pyramid(layout, getattr(torch, dtype_name), device), _levels(_POINTS, device)
    batch = torch.zeros_like(level)
    xy = torch.rand(_POINTS, 2, generator=torch.Generator().manual_seed(2)).to(device)
    functions = {
        "effops": lambda maps: effops.point_sample(maps, batch, level, xy),
        "grid_sample": lambda maps: _plain_point_sample(maps, level, xy),
    }
    torch.testing.assert_close(*(function(pyramid) for function in functions.values()), rtol=1e-4, atol=1e-4)
    benchmark.extra_info.update(op="point_sample", shape=layout, dtype=dtype_name, direction=direction)
    _race(race, benchmark, "point_sample", functions, pyramid, direction)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("layout", _LAYOUTS)
@pytest.mark.parametrize("dtype_name", ["float32"])
def test_roi_align(dtype_name, layout, direction, device, race, benchmark):
    pyramid, level = _pyramid(layout, getattr(torch, dtype_name), device), _levels(_ROIS, device)
    generator = torch.Generator().manual_seed(2)
    size = torch.rand(_ROIS, 2, generator=generator) * 200 + 32
    first = torch.rand(_ROIS, 2, generator=generator) * (torch.tensor([1344.0, 800.0]) - size - 64) + 32
    rois = torch.cat([torch.zeros(_ROIS, 1), first, first + size], 1).to(device)
    functions = {
        "effops": lambda maps: effops.roi_align(maps, rois, level, _BINS, _SAMPLES, strides=_STRIDES),
        "grid_sample": lambda maps: _plain_roi_align(maps, rois, level),
    }
    torch.testing.assert_close(*(function(pyramid) for function in functions.values()), rtol=1e-3, atol=1e-3)
    benchmark.extra_info.update(op="roi_align", shape=layout, dtype=dtype_name, direction=direction)
    _race(race, benchmark, "roi_align", functions, pyramid, direction)
