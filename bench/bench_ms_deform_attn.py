"""Multi-scale deformable attention: shapes of DETR-like detectors, random locations.

Encoder: a query at every pixel of the four levels of an 800 x 1333 image; decoder: 300 queries on them;
FQDet: one point on each of five levels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import peers
import pytest
import torch
from roofline import Work
from torch import Tensor

import effops

_LEVELS = [(100, 167), (50, 84), (25, 42), (13, 21)]
_HEADS, _CHANNELS = 8, 32
# forward, forward + backward: milliseconds to reach on an H100 or H200 for the encoder with B=2
_CUDA_TARGETS = {torch.float32: (0.25, 1.0), torch.bfloat16: (0.15, 0.6)}


@dataclass(frozen=True)
class Shape:
    batch: int
    levels: list[tuple[int, int]]
    queries: int
    points: int

    @property
    def rows(self) -> int:
        return sum(height * width for height, width in self.levels)

    @property
    def sampled(self) -> int:
        return self.batch * self.queries * _HEADS * len(self.levels) * self.points


_ENCODER_QUERIES = sum(height * width for height, width in _LEVELS)
SHAPES = {
    "encoder": Shape(1, _LEVELS, _ENCODER_QUERIES, 4),
    "decoder": Shape(1, _LEVELS, 300, 4),
    "fqdet-1500": Shape(1, [*_LEVELS, (7, 11)], 1500, 1),
    "fqdet-300": Shape(1, [*_LEVELS, (7, 11)], 300, 1),
    "encoder-b2": Shape(2, _LEVELS, _ENCODER_QUERIES, 4),
}


def _inputs(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch, shape.queries, _HEADS, len(shape.levels), shape.points)
    value = torch.randn(shape.batch, shape.rows, _HEADS, _CHANNELS, generator=generator)
    locations = torch.rand(*size, 2, generator=generator)
    weights = torch.rand(size, generator=generator).flatten(3).softmax(-1).view(size)
    return value.to(device, dtype), locations.to(device), weights.to(device)


def _work(shape: Shape, dtype: torch.dtype, backward: bool) -> Work:
    """Forward: 4 rows and 8 operations per channel and point. Backward: the rows again, for the gradients of
    locations and weights, and 4 rows of float32 sums, read and written; twice the operations."""
    element = dtype.itemsize
    corners = shape.sampled * 4 * _CHANNELS
    head_rows = shape.rows * _CHANNELS
    # few queries touch only some of the rows
    values = min(shape.batch * shape.rows * _HEADS * _CHANNELS, corners) * element
    outputs = shape.batch * shape.queries * _HEADS * _CHANNELS * element
    points = shape.sampled * 3 * 4
    streamed = values + outputs + points
    if not backward:
        return Work(2 * corners, corners * element, _CHANNELS * element, head_rows * element, streamed)
    gathered = corners * (2 * element + 2 * 4)
    table = head_rows * (element + 4)
    return Work(6 * corners, gathered, _CHANNELS * element, table, 3 * streamed)


def _forward_and_backward(
    function: Callable[..., Tensor], shape: Shape, inputs: tuple[Tensor, ...], grad: Tensor
) -> Callable[[], object]:
    value, locations, weights = leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    return lambda: torch.autograd.grad(function(value, shape.levels, locations, weights), leaves, grad)


def _effops(value: Tensor, levels: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    return effops.ms_deform_attn(value, levels, None, locations, weights)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype_name", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_ms_deform_attn(name, dtype_name, direction, device, race, benchmark):
    shape, dtype = SHAPES[name], getattr(torch, dtype_name)
    if name == ("encoder-b2" if device == "cpu" else "encoder"):
        pytest.skip("for the other device")
    inputs = _inputs(shape, dtype, device)
    value, locations, weights = inputs
    backward = direction != "forward"

    exact = _effops(value.float(), shape.levels, locations, weights)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    grad = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).to(value)
    functions = {}
    for peer, function in {"effops": _effops, **peers.ms_deform_attn(device)}.items():
        try:
            result = function(value, shape.levels, locations, weights)
            torch.testing.assert_close(result.float(), exact, rtol=tolerance, atol=tolerance)
        except Exception as error:
            if peer == "effops":
                raise
            peers.MISSING[f"{peer}, {name}"] = f"{type(error).__name__}: {error}".split("\n")[0]
            continue
        functions[peer] = (
            _forward_and_backward(function, shape, inputs, grad)
            if backward
            else lambda function=function: function(value, shape.levels, locations, weights)
        )
    benchmark.group = name
    benchmark.extra_info.update(op="ms_deform_attn", shape=name, dtype=dtype_name, direction=direction)
    if device == "cuda" and name == "encoder-b2":
        benchmark.extra_info["target_milliseconds"] = _CUDA_TARGETS[dtype][backward]
    calls = 1 if device == "cpu" else 10
    ours = functions.pop("effops")
    race(ours, functions, points=shape.sampled, work=_work(shape, dtype, backward), calls=calls)
