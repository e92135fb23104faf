"""Convolutions at the edges of a photograph only: pictures, correctness, times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effops import MaskPlan, perforated_conv2d, plan_mask, reference, select_conv2d
from effops.demo._photos import load
from effops.demo._section import Result, Row, Section, Settings, Step
from effops.demo._timing import interleaved_min
from effops.demo.sections._perforated_conv2d_pictures import (
    Deblurring,
    edge_strength,
    make_deblurring,
    picture_deblurring,
    picture_densities,
    picture_fills,
    picture_ponder,
    picture_select,
)

_SIDE, _CHANNELS, _WIDE = 128, 64, 256
_DENSITIES = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
_SHOWN_DENSITIES = (0.05, 0.2, 0.4)  # in the table
_GATE = 0.2
_DILATIONS = (0, 1, 2, 4)
_CHECKED_SIDE = 96  # pixels of the deblurred photograph
_TOLERANCE = 2e-5


def plain_masked(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    """perforated_conv2d with same padding in plain PyTorch: computed everywhere, times the mask."""
    return F.conv2d(x, weight, bias, padding=weight.shape[2] // 2) * mask[:, None]


def plain_gather(x: Tensor, weight: Tensor, plan: MaskPlan, bias: Tensor) -> Tensor:
    """The same as a product of the neighbours of kept positions, which are copied."""
    images, _, height, width = x.shape
    side, margin = weight.shape[2], weight.shape[2] // 2
    rows = F.pad(x, [margin] * 4).permute(0, 2, 3, 1).flatten(0, 2)
    columns_wide = width + 2 * margin
    image, place = plan.positions // (height * width), plan.positions % (height * width)
    first = (image * (height + 2 * margin) + place // width) * columns_wide + place % width
    steps = torch.arange(side, device=x.device)
    taps = (steps[:, None] * columns_wide + steps).flatten()
    matrix = weight.permute(2, 3, 1, 0).flatten(0, 2)
    results = torch.addmm(bias, rows[first[:, None] + taps].flatten(1), matrix)
    output = results.new_zeros(images * height * width, len(weight)).index_copy(0, plan.positions, results)
    return output.view(images, height, width, -1).permute(0, 3, 1, 2)


def plain_select(x: Tensor, weights: Tensor, choice: Tensor, dilations: Sequence[int]) -> Tensor:
    """select_conv2d in plain PyTorch: every branch everywhere."""
    output = torch.zeros_like(x)
    for branch, (weight, dilation) in enumerate(zip(weights, dilations, strict=True)):
        padding = dilation * (weight.shape[2] // 2)
        result = x if dilation == 0 else F.conv2d(x, weight, padding=padding, dilation=dilation)
        output = torch.where((choice == branch)[:, None], result, output)
    return output


class PagUnit(nn.Module):
    """A residual unit of pixel-wise attentional gating: its 3 x 3 convolution is computed where a gate is 1.

        x + F3(where(gate, F2(y), y)),  y = F1(x)

    F1 and F3 are 1 x 1, all three with ReLU as in ResNet's bottleneck. Source: S. Kong, PhD thesis, (4.2).
    """

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, inner, 1)
        self.conv = nn.Conv2d(inner, inner, 3, padding=1)
        self.expand = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor, gate: MaskPlan) -> Tensor:
        """x: [N, C, H, W]. y is not negative, so that the ReLU changes only what is computed."""
        y = F.relu(self.reduce(x))
        mixed = perforated_conv2d(y, self.conv.weight, gate, self.conv.bias, padding=1, fill="keep", base=y)
        output: Tensor = F.relu(x + self.expand(F.relu(mixed)))
        return output

    def plain(self, x: Tensor, gate: Tensor) -> Tensor:
        """The same with a dense convolution and the gate [N, H, W] as a factor."""
        y = F.relu(self.reduce(x))
        mixed = torch.where(gate[:, None], F.relu(self.conv(y)), y)
        return F.relu(x + self.expand(mixed))


# ------------------------------------------------------------------------------------------ comparisons


@dataclass(frozen=True)
class _Case:
    """One convolution on a feature map of a photograph's size, at the positions of a plan."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    plan: MaskPlan

    def effops(self) -> Tensor:
        output: Tensor = perforated_conv2d(self.x, self.weight, self.plan, self.bias, padding=1)
        return output

    def masked(self) -> Tensor:
        return plain_masked(self.x, self.weight, self.plan.mask, self.bias)

    def gather(self) -> Tensor:
        return plain_gather(self.x, self.weight, self.plan, self.bias)

    def reference(self) -> Tensor:
        return reference.perforated_conv2d(self.x, self.weight, self.plan.mask, self.bias, padding=1)

    def inputs(self) -> list[Tensor]:
        return [self.x, self.weight, self.bias]

    def learning(self, dtype: torch.dtype) -> _Case:
        x, weight, bias = (tensor.detach().to(dtype).requires_grad_() for tensor in self.inputs())
        return replace(self, x=x, weight=weight, bias=bias)

    @property
    def shape(self) -> str:
        _, channels, height, width = self.x.shape
        return f"C={channels} H={height} W={width}, 3 x 3, {self.plan.density:.0%} computed"


def _make_cases(settings: Settings) -> dict[float, tuple[_Case, _Case]]:
    """For each density a convolution at the strongest edges, and one at as many random positions."""
    generator = torch.Generator().manual_seed(0)
    photo = load("astronaut", settings.photo_side)[None]
    edges = F.interpolate(edge_strength(photo)[None], size=[_SIDE, _SIDE], mode="bilinear")[0]
    anywhere = torch.rand(1, _SIDE, _SIDE, generator=generator)
    x = torch.randn(1, _CHANNELS, _SIDE, _SIDE, generator=generator)
    x = x.to(settings.device, memory_format=torch.channels_last)
    weight = (torch.randn(_CHANNELS, _CHANNELS, 3, 3, generator=generator) / 24).to(settings.device)
    bias = torch.randn(_CHANNELS, generator=generator).to(settings.device)

    def case(strength: Tensor, density: float) -> _Case:
        order = strength.flatten().argsort(descending=True)
        mask = torch.zeros(strength.numel(), dtype=torch.bool)
        mask[order[: round(density * len(order))]] = True
        return _Case(x, weight, bias, plan_mask(mask.view(strength.shape).to(settings.device)))

    return {density: (case(edges, density), case(anywhere, density)) for density in _DENSITIES}


def _compare_densities(
    cases: Mapping[float, tuple[_Case, _Case]], settings: Settings
) -> tuple[list[Row], dict[str, list[float]], float]:
    """Rows of the table, the times of each program by density, and that of the dense convolution.

    Plain PyTorch in the rows is the faster one of a dense convolution and a gather.
    """
    functions: dict[str, Callable[[], object]] = {"dense": next(iter(cases.values()))[0].masked}
    names = ("effops, mask of edges", "effops, random mask", "gather in PyTorch, mask of edges")
    for density, (edges, anywhere) in cases.items():
        for name, run in zip(names, (edges.effops, anywhere.effops, edges.gather), strict=True):
            functions[f"{name} {density}"] = run
    with torch.no_grad():
        best = _time(functions, settings, part=2)
    times = {name: [best[f"{name} {density}"] for density in cases] for name in names}
    rows = []
    for density in _SHOWN_DENSITIES:
        edges = cases[density][0]
        error = _error(edges.effops(), edges.learning(torch.float64).reference())
        ours, gather = (best[f"{name} {density}"] for name in (names[0], names[2]))
        plain, case = min(best["dense"], gather), f"{density:.0%}, forward"
        rows.append(Row("perforated_conv2d", case, edges.shape, ours, plain, error, _TOLERANCE))
    return rows, times, best["dense"]


def _compare_gradients(case: _Case, settings: Settings) -> Row:
    """Forward and backward pass with the gradients of the features, the weight and the bias."""
    part, exact = case.learning(torch.float32), case.learning(torch.float64)
    grad = torch.randn(part.x.shape, generator=torch.Generator().manual_seed(1)).to(part.x)
    grads = torch.autograd.grad(part.effops(), part.inputs(), grad)
    exact_grads = torch.autograd.grad(exact.reference(), exact.inputs(), grad.double())
    error = _largest_error(grads, exact_grads)
    programs = {"effops": part.effops, "masked": part.masked, "gather": part.gather}
    times = _time(_with_gradients(programs, part.inputs(), grad), settings)
    plain = min(times["masked"], times["gather"])
    name = f"{case.plan.density:.0%}, fwd + bwd"
    return Row("perforated_conv2d", name, case.shape, times["effops"], plain, error, _TOLERANCE)


def _compare_unit(case: _Case, settings: Settings) -> Row:
    """A whole PAG unit, of which only the 3 x 3 convolution is gated."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unit = PagUnit(_WIDE, _CHANNELS)
        x = torch.randn(1, _WIDE, _SIDE, _SIDE)
    exact = PagUnit(_WIDE, _CHANNELS).double()
    exact.load_state_dict(unit.state_dict())
    exact.to(settings.device)
    unit.to(settings.device)
    x = x.to(settings.device, memory_format=torch.channels_last)
    plan = case.plan
    with torch.no_grad():
        error = _error(unit(x, plan), exact.plain(x.double(), plan.mask))
        functions = {"effops": partial(unit, x, plan), "plain": partial(unit.plain, x, plan.mask)}
        times = _time(functions, settings)
    shape = f"C={_WIDE}, {_CHANNELS} inside, H={_SIDE} W={_SIDE}, {plan.density:.0%} computed"
    return Row("perforated_conv2d", "PAG unit", shape, times["effops"], times["plain"], error, _TOLERANCE)


def _compare_deblurring(stack: Deblurring, settings: Settings) -> Row:
    """The whole stack; a part of the photograph is checked."""
    side = min(_CHECKED_SIDE, *stack.photo.shape[2:])
    plans = [plan_mask(plan.mask[:, :side, :side].contiguous()) for plan in stack.plans]
    photo, blurred = (image[:, :, :side, :side] for image in (stack.photo, stack.blurred))
    part = Deblurring(photo, blurred, plans, stack.weight)
    error = _error(part.effops(), part.double().plain())
    times = _time({"effops": stack.effops, "plain": stack.plain}, settings, min_rounds=1)
    return Row(
        "perforated_conv2d", "deblurring", stack.shape, times["effops"], times["plain"], error, _TOLERANCE
    )


def _compare_select(case: _Case, settings: Settings) -> list[Row]:
    """As many pixels of each branch, in four bands; PAG's MultiPool has seven branches of 512 channels."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(len(_DILATIONS), _CHANNELS, _CHANNELS, 3, 3, generator=generator) / 24
    band = torch.arange(_SIDE, device=case.x.device) * len(_DILATIONS) // _SIDE
    choice = band[None, :, None].expand(1, -1, _SIDE)
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (case.x, weights.to(case.x.device))]
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    result = select_conv2d(inputs[0], inputs[1], choice, _DILATIONS)
    exact = reference.select_conv2d(exact_inputs[0], exact_inputs[1], choice, _DILATIONS)
    grad = torch.randn(result.shape, generator=generator).to(result)
    grads = torch.autograd.grad(result, inputs, grad)
    exact_grads = torch.autograd.grad(exact, exact_inputs, grad.double())
    gradient_error = _largest_error(grads, exact_grads)
    programs: dict[str, Callable[[], Tensor]] = {
        "effops": partial(select_conv2d, inputs[0], inputs[1], choice, _DILATIONS),
        "plain": partial(plain_select, inputs[0], inputs[1], choice, _DILATIONS),
    }
    shape = f"C={_CHANNELS} H={_SIDE} W={_SIDE}, 3 x 3 at dilations {', '.join(map(str, _DILATIONS))}"
    rows = []
    functions: Mapping[str, Callable[[], object]]
    for direction, error, functions in (
        ("forward", _error(result, exact), {name: torch.no_grad()(run) for name, run in programs.items()}),
        ("fwd + bwd", gradient_error, _with_gradients(programs, inputs, grad)),
    ):
        times = _time(functions, settings)
        rows.append(
            Row("select_conv2d", direction, shape, times["effops"], times["plain"], error, _TOLERANCE)
        )
    return rows


def _error(result: Tensor, exact: Tensor) -> float:
    result, exact = result.detach(), exact.detach()
    return float((result.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))


def _largest_error(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    errors = [_error(*pair) for pair in zip(results, exact, strict=True)]
    return float(torch.tensor(errors).max())  # NaN stays NaN


def _with_gradients(
    programs: Mapping[str, Callable[[], Tensor]], inputs: Sequence[Tensor], grad: Tensor
) -> dict[str, Callable[[], object]]:
    """Each program with the gradients of the inputs."""

    def both(run: Callable[[], Tensor]) -> object:
        return torch.autograd.grad(run(), inputs, grad)

    return {name: partial(both, run) for name, run in programs.items()}


def _time(
    functions: Mapping[str, Callable[[], object]], settings: Settings, part: int = 5, min_rounds: int = 2
) -> dict[str, float]:
    """Shortest times, in one of so many parts of the time of a comparison."""
    seconds = settings.seconds / part
    return interleaved_min(functions, seconds=seconds, min_rounds=min_rounds, device=settings.device)


def _run(settings: Settings, step: Step) -> Result:
    step("fills")
    figures = [picture_fills(settings)]
    step("deblurring")
    stack = make_deblurring(settings)
    figures += [picture_ponder(settings, stack), picture_deblurring(settings, stack)]
    step("densities: check and times")
    cases = _make_cases(settings)
    rows, times, dense = _compare_densities(cases, settings)
    figures.append(picture_densities(settings, times, dense, _DENSITIES))
    step("gradients and whole units: check and times")
    gated = cases[_GATE][0]
    rows += [
        _compare_gradients(gated, settings),
        _compare_unit(gated, settings),
        _compare_deblurring(stack, settings),
    ]
    step("select_conv2d: check and times")
    figures.append(picture_select(settings))
    rows += _compare_select(gated, settings)
    text = (
        "perforated_conv2d computes a convolution only at the positions that a mask keeps, and fills the "
        "others; plan_mask finds the positions once for all layers that share the mask. select_conv2d "
        "computes one of several convolutions at each position. Plain PyTorch in the table computes "
        "everything and drops what is not wanted, or, where that is faster, copies the neighbours of the "
        "kept positions and multiplies them."
    )
    return Result(text, figures, rows)


SECTION = Section("Convolutions at chosen positions", steps=5, run=_run)
