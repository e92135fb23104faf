"""Motion as filters, and attention to the window around a pixel: pictures, correctness, times."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from effops import expected_flow, local_attention, neighborhood_dot, neighborhood_mix, reference
from effops.demo._section import Result, Row, Section, Settings, Step
from effops.demo._timing import interleaved_min
from effops.demo.sections._expected_flow_pictures import (
    WINDOW,
    Motion,
    make_motion,
    matching_filters,
    picture_colours,
    picture_known,
    picture_matching,
)

_COMPARED_SIDE = 80  # pixels of the part that is checked and timed
_COMPARED_SHARPNESS = 10.0  # of the attention there: more takes digits from float32, in every program
_TOLERANCE = 2e-5


def plain_expected_flow(filters: Tensor) -> Tensor:
    """expected_flow with softmax in plain PyTorch."""
    kernel = round(filters.shape[1] ** 0.5)
    steps = torch.arange(kernel, device=filters.device) - kernel // 2
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    displacements = torch.stack([columns, rows]).flatten(1).to(filters)
    return torch.einsum("nkhw,ck->nchw", filters.softmax(1), displacements)


def plain_neighborhood_dot(q: Tensor, k: Tensor, window: int) -> Tensor:
    """The op in plain PyTorch for an odd window, tap by tap: nothing but the similarities is stored."""
    return torch.stack([(q * shifted).sum(1) for shifted in _shifted(k, window)], 1)


def plain_neighborhood_mix(weights: Tensor, v: Tensor) -> Tensor:
    """The op in plain PyTorch for an odd window, tap by tap."""
    total = torch.zeros_like(v)
    window = round(weights.shape[1] ** 0.5)
    for weight, shifted in zip(weights.split(1, 1), _shifted(v, window), strict=True):
        total = total + weight * shifted
    return total


def plain_local_attention(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """The op in plain PyTorch for an odd window: similarities, a mask, softmax and a sum tap by tap."""
    ones = torch.ones_like(q[:1, :1])
    is_outside = plain_neighborhood_dot(ones, ones, window) == 0
    similarities = scale * plain_neighborhood_dot(q, k, window)
    weights = similarities.masked_fill(is_outside, -math.inf).softmax(1)
    return plain_neighborhood_mix(weights, v)


def _shifted(image: Tensor, window: int) -> list[Tensor]:
    """The image as each tap of the window sees it, 0 outside."""
    height, width = image.shape[2:]
    padded = F.pad(image, [window // 2] * 4)
    return [
        padded[:, :, row : row + height, column : column + width]
        for row in range(window)
        for column in range(window)
    ]


# ------------------------------------------------------------------------------------------ comparisons

_Op = Callable[..., Tensor]


@dataclass(frozen=True)
class _Case:
    """An op, its definition and plain PyTorch, on inputs [1, C, H, W] that all have gradients."""

    programs: Sequence[_Op]
    inputs: Sequence[Tensor]

    def rows(self, name: str, settings: Settings) -> list[Row]:
        ours, definition, plain = self.programs
        inputs = [tensor.detach().clone().requires_grad_() for tensor in self.inputs]
        exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
        output = ours(*inputs)
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)

        def forward(op: _Op, arguments: list[Tensor]) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (op(*arguments),)

        def gradients(op: _Op, arguments: list[Tensor]) -> tuple[Tensor, ...]:
            return torch.autograd.grad(op(*arguments), arguments, grad.to(arguments[0].dtype))

        channels = ", ".join(str(tensor.shape[1]) for tensor in inputs)
        shape = f"C={channels} H={output.shape[2]} W={output.shape[3]}, {WINDOW} x {WINDOW}"
        rows = []
        for direction, run in (("forward", forward), ("fwd + bwd", gradients)):
            results = zip(run(ours, inputs), run(definition, exact_inputs), strict=True)
            error = float(torch.tensor([_error(*pair) for pair in results]).max())  # NaN stays NaN
            functions = {"effops": partial(run, ours, inputs), "plain": partial(run, plain, inputs)}
            times = interleaved_min(
                functions, seconds=settings.seconds / 12, min_rounds=1, device=settings.device
            )
            rows.append(Row(name, direction, shape, times["effops"], times["plain"], error, _TOLERANCE))
        return rows


def _make_cases(motion: Motion) -> dict[str, _Case]:
    """The ops as the pictures use them, on a part of the photograph."""
    filters = matching_filters(motion, 1)
    height, width = (min(_COMPARED_SIDE, side) for side in motion.photo.shape[2:])
    maps = (filters, filters.softmax(1), motion.queries, motion.keys, motion.photo)
    logits, weights, q, k, v = (part[:, :, :height, :width].contiguous() for part in maps)
    flow = (expected_flow, reference.expected_flow, plain_expected_flow)
    dot = (neighborhood_dot, reference.neighborhood_dot, plain_neighborhood_dot)
    mix = (neighborhood_mix, reference.neighborhood_mix, plain_neighborhood_mix)
    attention = (local_attention, reference.local_attention, plain_local_attention)
    return {
        "expected_flow": _Case(flow, [logits]),
        "neighborhood_dot": _Case([partial(op, window=WINDOW) for op in dot], [q, k]),
        "neighborhood_mix": _Case(mix, [weights, v]),
        "local_attention": _Case(
            [partial(op, window=WINDOW, scale=_COMPARED_SHARPNESS) for op in attention], [q, k, v]
        ),
    }


def _error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))


def _run(settings: Settings, step: Step) -> Result:
    step("known flow")
    motion = make_motion(settings)
    figures = [picture_known(settings, motion)]
    step("matching")
    figures += [picture_matching(settings, motion), picture_colours(settings, motion)]
    rows = []
    for name, case in _make_cases(motion).items():
        step(f"{name}: check and times")
        rows += case.rows(name, settings)
    text = (
        "A filter of its own for every pixel says where that pixel comes from: expected_flow is the mean "
        "displacement of its weights. neighborhood_dot compares each pixel's features with those in the "
        "window around it, neighborhood_mix sums the window with given weights, and local_attention is both, "
        "with a softmax between, in one pass. Plain PyTorch in the table goes through the taps of the window "
        "one by one, which takes less memory than unfold and in most of these cases less time."
    )
    return Result(text, figures, rows)


SECTION = Section("Motion as filters, and attention to a window", steps=6, run=_run)
