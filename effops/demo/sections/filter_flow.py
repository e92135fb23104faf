"""A photograph denoised by a filter of its own for every pixel: pictures, correctness, times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effops import filter_flow, reference
from effops.demo._section import Result, Row, Section, Settings, Step
from effops.demo._timing import interleaved_min
from effops.demo.sections._filter_flow_pictures import (
    KERNEL,
    Denoising,
    make_denoising,
    picture_denoising,
    picture_filters,
    picture_times,
)

_COMPARED_SIDE = 128  # pixels of the part that is checked and timed
_TIMED_SIDE, _KERNELS = 128, (3, 5, 7, 9, 11, 15)
_TOLERANCE = 1e-5


def plain_unfold(image: Tensor, filters: Tensor) -> Tensor:
    """filter_flow with softmax and "renormalize" in plain PyTorch: the window of every pixel is copied.

    A channel of ones sums the weights of the taps inside. For odd K.
    """
    batch, channels, height, width = image.shape
    kernel = round(filters.shape[1] ** 0.5)
    weights = filters.softmax(1).view(batch, 1, -1, height * width)
    windows = F.unfold(_with_ones(image), kernel, padding=kernel // 2)
    sums = (windows.view(batch, channels + 1, -1, height * width) * weights).sum(2)
    return (sums[:, :-1] / sums[:, -1:]).view(image.shape)


def plain_by_tap(image: Tensor, filters: Tensor) -> Tensor:
    """The same tap by tap: the shifted image times the weights of that tap."""
    height, width = image.shape[2:]
    kernel = round(filters.shape[1] ** 0.5)
    padded = F.pad(_with_ones(image), [kernel // 2] * 4)
    sums = torch.zeros_like(padded[:, :, :height, :width])
    for tap, weights in enumerate(filters.softmax(1).split(1, 1)):
        row, column = divmod(tap, kernel)
        sums = sums + weights * padded[:, :, row : row + height, column : column + width]
    return sums[:, :-1] / sums[:, -1:]


def _with_ones(image: Tensor) -> Tensor:
    return torch.cat([image, torch.ones_like(image[:, :1])], 1)


# ------------------------------------------------------------------------------------------ comparisons

_Op = Callable[..., Any]  # (image, filters) -> Tensor
_PROGRAMS: dict[str, _Op] = {
    "effops": partial(filter_flow, padding_mode="renormalize"),
    "softmax and unfold in PyTorch": plain_unfold,
    "softmax and a sum tap by tap in PyTorch": plain_by_tap,
}
_DEFINITION: _Op = partial(reference.filter_flow, padding_mode="renormalize")


def _compare_denoising(denoising: Denoising, settings: Settings) -> list[Row]:
    """Rows of the table; plain PyTorch is the faster one of two programs."""
    height, width = (min(_COMPARED_SIDE, side) for side in denoising.photo.shape[2:])
    inputs = [
        tensor[:, :, :height, :width].contiguous().requires_grad_()
        for tensor in (denoising.noisy, denoising.by_patch)
    ]
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(0)).to(inputs[0])

    def gradients(op: _Op, arguments: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(op(*arguments), arguments, grad.to(arguments[0].dtype))

    def forward(op: _Op, arguments: list[Tensor]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (op(*arguments),)

    shape = f"C=3 H={height} W={width}, {KERNEL} x {KERNEL}"
    rows = []
    for direction, run in (("forward", forward), ("fwd + bwd", gradients)):
        results = run(_PROGRAMS["effops"], inputs), run(_DEFINITION, exact_inputs)
        errors = [_error(*pair) for pair in zip(*results, strict=True)]
        times = _time({name: partial(run, op, inputs) for name, op in _PROGRAMS.items()}, settings)
        ours, *plain = times.values()
        error = float(torch.tensor(errors).max())  # NaN stays NaN
        rows.append(Row("filter_flow", f"denoising, {direction}", shape, ours, min(plain), error, _TOLERANCE))
    return rows


def _compare_kernels(settings: Settings) -> dict[str, list[float]]:
    """Times of each program by K."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, _TIMED_SIDE, _TIMED_SIDE, generator=generator).to(settings.device)
    times: dict[str, list[float]] = {name: [] for name in _PROGRAMS}
    for kernel in _KERNELS:
        filters = torch.randn(1, kernel * kernel, _TIMED_SIDE, _TIMED_SIDE, generator=generator)
        functions = {name: partial(op, image, filters.to(image)) for name, op in _PROGRAMS.items()}
        for name, seconds in _time(functions, settings, part=20).items():
            times[name].append(seconds)
    return times


def _error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))


def _time(
    functions: Mapping[str, Callable[[], object]], settings: Settings, part: int = 5
) -> dict[str, float]:
    """Shortest times, in one of so many parts of the time of a comparison."""
    return interleaved_min(functions, seconds=settings.seconds / part, min_rounds=2, device=settings.device)


def _run(settings: Settings, step: Step) -> Result:
    step("denoising")
    denoising = make_denoising(settings)
    figures = [picture_denoising(settings, denoising), picture_filters(settings, denoising)]
    step("denoising: check and times")
    rows = _compare_denoising(denoising, settings)
    step("sizes of the filters: times")
    shape = f"3 channels of {_TIMED_SIDE} x {_TIMED_SIDE} pixels"
    figures.append(picture_times(settings, _compare_kernels(settings), _KERNELS, shape))
    text = (
        "filter_flow applies to every pixel a filter of its own, K x K weights that a network or a rule "
        "predicts, the same for all channels: denoising, deblurring, motion, upsampling. It normalises the "
        "weights itself. Plain PyTorch in the table copies the windows with unfold, or goes tap by tap, "
        "whichever is faster."
    )
    return Result(text, figures, rows)


SECTION = Section("Filters of their own for every pixel", steps=3, run=_run)
