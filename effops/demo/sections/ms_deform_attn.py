"""Multi-scale deformable attention on photographs: pictures, correctness, times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from effops import ms_deform_attn, reference
from effops.demo._figures import bars_of_times
from effops.demo._photos import load, make_pyramid
from effops.demo._section import Figure, Result, Row, Section, Settings, Step
from effops.demo._timing import interleaved_min
from effops.demo.sections._ms_deform_attn_pictures import (
    picture_learning,
    picture_sampling_points,
    picture_swirl,
    pixel_centres,
)

_HEADS, _POINTS = 8, 4
_CHECKED_QUERIES = 1500  # the reference is slow and needs much memory
_TOLERANCE = 2e-5

Shapes = Sequence[tuple[int, int]]


def plain_pytorch(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The op in plain PyTorch, as Deformable DETR and its copies write it: grid_sample on each level.

    value [B, S, M, D], locations [B, Q, M, L, P, 2], weights [B, Q, M, L, P] -> [B, Q, M * D]
    """
    batch, _, heads, channels = value.shape
    _, queries, _, levels, points, _ = locations.shape
    maps = torch.split(value, [height * width for height, width in shapes], dim=1)
    grids = 2 * locations - 1  # grid_sample has -1 and 1 at the outer edges
    sampled = []
    for level, (height, width) in enumerate(shapes):
        image = maps[level].permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)  # [B * M, Q, P, 2]
        sampled.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    samples = torch.stack(sampled, dim=-2).flatten(-2)  # [B * M, D, Q, L * P]
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, levels * points)
    output = (samples * weights).sum(-1)
    return output.view(batch, heads * channels, queries).transpose(1, 2).contiguous()


@dataclass(frozen=True)
class _Case:
    """A set of queries on the pyramid of a photograph."""

    name: str
    value: Tensor
    shapes: Shapes
    locations: Tensor
    weights: Tensor

    @property
    def shape(self) -> str:
        _, rows, heads, channels = self.value.shape
        _, queries, _, levels, points, _ = self.locations.shape
        return f"S={rows:,} Q={queries:,} M={heads} D={channels} L={levels} P={points}"

    def effops(self) -> Tensor:
        return ms_deform_attn(self.value, self.shapes, None, self.locations, self.weights)

    def plain(self) -> Tensor:
        return plain_pytorch(self.value, self.shapes, self.locations, self.weights)

    def with_gradients(self) -> _Case:
        value, locations, weights = (
            tensor.detach().clone().requires_grad_() for tensor in (self.value, self.locations, self.weights)
        )
        return replace(self, value=value, locations=locations, weights=weights)


def _make_cases(settings: Settings) -> list[_Case]:
    """A decoder's 300 boxes, and an encoder's query at every pixel of every level."""
    pyramid = make_pyramid(load("coffee", settings.photo_side))
    generator = torch.Generator().manual_seed(0)
    levels = len(pyramid.shapes)

    def case(name: str, centres: Tensor, spread: Tensor) -> _Case:
        size = (len(centres), _HEADS, levels, _POINTS)
        offsets = torch.randn(*size, 2, generator=generator) * spread
        locations = centres[:, None, None, None] + offsets
        weights = torch.randn(*size, generator=generator).flatten(2).softmax(-1).view(size)
        inputs = (pyramid.value, locations[None], weights[None])
        value, locations, weights = (tensor.to(settings.device) for tensor in inputs)
        return _Case(name, value, pyramid.shapes, locations, weights)

    boxes = torch.rand(300, 4, generator=generator) * torch.tensor([1, 1, 0.4, 0.4])
    pixels = torch.cat([pixel_centres(shape) for shape in pyramid.shapes])
    side = torch.tensor([(width, height) for height, width in pyramid.shapes])
    return [
        case("decoder", boxes[:, :2], boxes[:, None, None, None, 2:] / 2),
        case("encoder", pixels, 2.5 / side[:, None]),  # points within a few pixels of each level
    ]


def _check(case: _Case) -> tuple[float, float]:
    """Errors of the output and of the gradients against the reference in float64.

    Each is the largest difference divided by the reference's largest value. The gradient of a location
    jumps where a point crosses a pixel's centre; points so close to one that float32 and float64 may see
    them on different sides are left out of that comparison.
    """
    queries = torch.randperm(case.locations.shape[1], generator=torch.Generator().manual_seed(0))
    chosen = queries[:_CHECKED_QUERIES].to(case.value.device)
    part = replace(
        case, locations=case.locations[:, chosen], weights=case.weights[:, chosen]
    ).with_gradients()
    exact_inputs = [
        tensor.detach().double().requires_grad_() for tensor in (part.value, part.locations, part.weights)
    ]
    value, locations, weights = exact_inputs

    output = part.effops()
    exact = reference.ms_deform_attn(value, case.shapes, None, locations, weights)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    grads = torch.autograd.grad(output, (part.value, part.locations, part.weights), grad)
    exact_grads = torch.autograd.grad(exact, exact_inputs, grad.double())

    size = torch.tensor([(width, height) for height, width in case.shapes], device=locations.device)
    position = locations.detach() * size[:, None] - 0.5
    is_smooth = (position - position.round()).abs() > 1e-4
    keep = (torch.ones_like(value, dtype=torch.bool), is_smooth.all(-1, keepdim=True), weights > -1)
    errors = [
        _error(ours * mask, theirs * mask)
        for ours, theirs, mask in zip(grads, exact_grads, keep, strict=True)
    ]
    return _error(output, exact), max(errors)


def _error(result: Tensor, exact: Tensor) -> float:
    result, exact = result.detach(), exact.detach()
    return float((result.double() - exact).abs().max() / exact.abs().max())


def _forward_and_backward(run: Callable[[], Tensor], case: _Case) -> Callable[[], object]:
    grad = torch.ones(1, case.locations.shape[1], case.value.shape[2] * case.value.shape[3]).to(case.value)
    inputs = (case.value, case.locations, case.weights)
    return lambda: torch.autograd.grad(run(), inputs, grad)


def _compare(case: _Case, settings: Settings) -> list[Row]:
    output_error, gradient_error = _check(case)
    learning = case.with_gradients()
    rows = []
    for direction, error, functions in (
        ("forward", output_error, {"effops": case.effops, "plain": case.plain}),
        (
            "fwd + bwd",
            gradient_error,
            {
                "effops": _forward_and_backward(learning.effops, learning),
                "plain": _forward_and_backward(learning.plain, learning),
            },
        ),
    ):
        times = interleaved_min(functions, seconds=settings.seconds, min_rounds=2, device=settings.device)
        rows.append(
            Row(
                op="ms_deform_attn",
                case=f"{case.name}, {direction}",
                shape=case.shape,
                seconds=times["effops"],
                plain_seconds=times["plain"],
                error=error,
                tolerance=_TOLERANCE,
            )
        )
    return rows


def _run(settings: Settings, step: Step) -> Result:
    step("sampling points")
    figures = picture_sampling_points(settings)
    step("swirl")
    figures.append(picture_swirl(settings))
    step("learning")
    figures.append(picture_learning(settings))
    rows = []
    for case in _make_cases(settings):
        step(f"{case.name}: check and times")
        rows += _compare(case, settings)
    file = bars_of_times(rows, settings.output, "ms_deform_attn-times.png")
    times = Figure(
        file,
        "Times on this machine",
        "Shortest of several runs, the two taking turns. Plain PyTorch is grid_sample on each level, as "
        "Deformable DETR and its copies do without a compiled op.",
    )
    text = (
        "Every query reads a few points of a feature pyramid and sums them by weight: the attention of "
        "Deformable DETR. The pyramid here is made of photographs: colour, gradients and oriented texture at "
        "strides 4, 8, 16 and 32, mixed into 8 heads of 32 channels by a fixed random matrix."
    )
    return Result(text, [*figures, times], rows)


SECTION = Section("Multi-scale deformable attention", steps=5, run=_run)
