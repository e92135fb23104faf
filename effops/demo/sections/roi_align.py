"""RoIAlign and point samples of a pyramid, on photographs: pictures, correctness, times."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from effops import point_sample, reference, roi_align
from effops.demo._figures import bars_of_times
from effops.demo._photos import STRIDES, load, make_pyramid
from effops.demo._section import Figure, Result, Row, Section, Settings, Step
from effops.demo._timing import interleaved_min
from effops.demo.sections._roi_align_pictures import picture_boxes, picture_gaze, picture_points

_ROIS, _BINS, _SAMPLES, _POINTS = 512, 7, 2, 100 * 14 * 14
_CHECKED_ROIS, _CHECKED_POINTS = 3, 500  # of each map: the reference is slow and needs much memory
_CHECKED_CHANNELS = slice(None, None, 32)  # channels do not mix
_TOLERANCE = 5e-5  # float32 rounds a position on a map 240 pixels wide by up to 1e-5 pixels


def plain_point_sample(pyramid: Sequence[Tensor], level: Tensor, xy: Tensor) -> Tensor:
    """The op in plain PyTorch for one image: grid_sample for all points of a map. [N, C]"""
    out = pyramid[0].new_zeros(len(xy), pyramid[0].shape[1])
    for index, feature in enumerate(pyramid):
        chosen = (level == index).nonzero()[:, 0]
        grid = (2 * xy[chosen] - 1)[None, None]
        sampled = F.grid_sample(feature, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        out = out.index_copy(0, chosen, sampled[0, :, 0].t())
    return out


def plain_roi_align(
    pyramid: Sequence[Tensor], boxes: Tensor, level: Tensor, bins: int, samples: int, strides: Sequence[int]
) -> Tensor:
    """The op in plain PyTorch for boxes [R, 4] inside one image: grid_sample and a mean over each bin."""
    out = pyramid[0].new_zeros(len(boxes), pyramid[0].shape[1], bins, bins)
    steps = (torch.arange(bins * samples, device=boxes.device, dtype=boxes.dtype) + 0.5) / (bins * samples)
    for index, (feature, stride) in enumerate(zip(pyramid, strides, strict=True)):
        chosen = (level == index).nonzero()[:, 0]
        if len(chosen) == 0:
            continue
        size = boxes.new_tensor([feature.shape[3], feature.shape[2]]) * stride
        first, last = boxes[chosen, None, :2] / size, boxes[chosen, None, 2:] / size
        x, y = (first + steps[:, None] * (last - first)).unbind(-1)  # each [R_l, bins * samples]
        grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1).flatten(0, 1)
        sampled = F.grid_sample(feature, 2 * grid[None] - 1, padding_mode="border", align_corners=False)
        cells = F.avg_pool2d(sampled, samples)[0].unflatten(1, (-1, bins)).transpose(0, 1)
        out = out.index_copy(0, chosen, cells)
    return out


@dataclass(frozen=True)
class _Points:
    """Points on the pyramid of one photograph."""

    pyramid: list[Tensor]
    level: Tensor
    xy: Tensor

    op = "point_sample"
    name = "points"

    def effops(self) -> Tensor:
        output: Tensor = point_sample(self.pyramid, torch.zeros_like(self.level), self.level, self.xy)
        return output

    def plain(self) -> Tensor:
        return plain_point_sample(self.pyramid, self.level, self.xy)

    def reference(self) -> Tensor:
        return reference.point_sample(self.pyramid, torch.zeros_like(self.level), self.level, self.xy)

    def inputs(self) -> list[Tensor]:
        return [*self.pyramid, self.xy]

    def with_inputs(self, inputs: list[Tensor]) -> _Points:
        return replace(self, pyramid=inputs[:-1], xy=inputs[-1])

    def part(self) -> _Points:
        chosen = _some_of_each(self.level, _CHECKED_POINTS)
        return replace(self, level=self.level[chosen], xy=self.xy[chosen])

    def masks(self) -> list[Tensor]:
        """Where gradients are compared: that of a point jumps at a pixel's centre, and float32 and float64
        may see a point close to one on different sides."""
        sides = torch.tensor([(feature.shape[3], feature.shape[2]) for feature in self.pyramid])
        position = self.xy.detach() * sides.to(self.xy)[self.level] - 0.5
        is_smooth = ((position - position.round()).abs() > 1e-4).all(1, keepdim=True)
        return [*(torch.ones_like(feature[:1, :1, :1, :1]) for feature in self.pyramid), is_smooth]

    @property
    def shape(self) -> str:
        return f"{_sizes(self.pyramid)} N={len(self.xy):,}"


@dataclass(frozen=True)
class _Boxes:
    """Boxes on the pyramid of one photograph."""

    pyramid: list[Tensor]
    level: Tensor
    rois: Tensor

    op = "roi_align"
    name = "boxes"

    def effops(self) -> Tensor:
        output: Tensor = roi_align(self.pyramid, self.rois, self.level, _BINS, _SAMPLES, strides=STRIDES)
        return output

    def plain(self) -> Tensor:
        return plain_roi_align(self.pyramid, self.rois[:, 1:], self.level, _BINS, _SAMPLES, STRIDES)

    def reference(self) -> Tensor:
        return reference.roi_align(self.pyramid, self.rois, self.level, _BINS, _SAMPLES, strides=STRIDES)

    def inputs(self) -> list[Tensor]:
        return self.pyramid

    def with_inputs(self, inputs: list[Tensor]) -> _Boxes:
        return replace(self, pyramid=inputs)

    def part(self) -> _Boxes:
        chosen = _some_of_each(self.level, _CHECKED_ROIS)
        return replace(self, level=self.level[chosen], rois=self.rois[chosen])

    def masks(self) -> list[Tensor]:
        return [torch.ones_like(feature[:1, :1, :1, :1]) for feature in self.pyramid]

    @property
    def shape(self) -> str:
        return f"{_sizes(self.pyramid)} R={len(self.rois)}, {_BINS} x {_BINS} bins"


_Case = _Points | _Boxes


def _sizes(pyramid: Sequence[Tensor]) -> str:
    _, channels, height, width = pyramid[0].shape
    return f"L={len(pyramid)} C={channels} H={height} W={width}"


def _make_cases(settings: Settings) -> tuple[_Boxes, _Points]:
    """A detector's 512 boxes, and the points of 100 instance masks, on 256 channels of a photograph."""
    photo = load("coffee", settings.photo_side)
    scale = 1.5 * settings.photo_side / max(photo.shape[1:]) / STRIDES[-1]
    size = [math.ceil(side * scale) * STRIDES[-1] for side in photo.shape[1:]]  # about a detector's
    features = make_pyramid(F.interpolate(photo[None], size=size, mode="bilinear")[0])
    rows = features.value.flatten(2).split([height * width for height, width in features.shapes], dim=1)
    pyramid = [
        row.transpose(1, 2).unflatten(2, shape).contiguous().to(settings.device)
        for row, shape in zip(rows, features.shapes, strict=True)
    ]
    generator = torch.Generator().manual_seed(0)
    sides = size[0] * 0.9 * 0.03 ** torch.rand(_ROIS, 2, generator=generator)  # many small, few large
    first = torch.rand(_ROIS, 2, generator=generator) * (torch.tensor([size[1], size[0]]) - sides)
    rois = torch.cat([torch.zeros(_ROIS, 1), first, first + sides], 1)
    level = (2 + (sides.prod(1).sqrt() / 224).log2()).floor().clamp(0, len(pyramid) - 1).long()
    points = torch.rand(_POINTS, 2, generator=generator)
    point_level = torch.randint(len(pyramid), (_POINTS,), generator=generator)
    boxes = _Boxes(pyramid, level.to(settings.device), rois.to(settings.device))
    return boxes, _Points(pyramid, point_level.to(settings.device), points.to(settings.device))


def _check(case: _Case) -> tuple[float, float]:
    """Errors of the output and of the gradients against the reference in float64.

    Each is the largest difference divided by the reference's largest value. The op computes all channels;
    every 32nd is compared, and the others get a gradient of 0.
    """
    part = _learning(case.part())
    exact_inputs = [_few_channels(tensor.detach()).double().requires_grad_() for tensor in part.inputs()]
    output, exact = part.effops(), part.with_inputs(exact_inputs).reference()
    grad = torch.zeros_like(output)
    few = output[:, _CHECKED_CHANNELS].shape
    grad[:, _CHECKED_CHANNELS] = torch.randn(few, generator=torch.Generator().manual_seed(1)).to(output)
    grads = torch.autograd.grad(output, part.inputs(), grad)
    exact_grads = torch.autograd.grad(exact, exact_inputs, grad[:, _CHECKED_CHANNELS].double())
    errors = [
        _error(_few_channels(ours) * mask, theirs * mask)
        for ours, theirs, mask in zip(grads, exact_grads, part.masks(), strict=True)
    ]
    return _error(output[:, _CHECKED_CHANNELS], exact), float(torch.tensor(errors).max())  # NaN stays NaN


def _some_of_each(level: Tensor, count: int) -> Tensor:
    return torch.cat([(level == index).nonzero()[:count, 0] for index in range(len(STRIDES))])


def _few_channels(tensor: Tensor) -> Tensor:
    return tensor[:, _CHECKED_CHANNELS] if tensor.dim() == 4 else tensor


def _error(result: Tensor, exact: Tensor) -> float:
    result, exact = result.detach(), exact.detach()
    return float((result.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))


def _learning(case: _Case) -> _Case:
    return case.with_inputs([tensor.detach().clone().requires_grad_() for tensor in case.inputs()])


def _compare(case: _Case, settings: Settings) -> list[Row]:
    output_error, gradient_error = _check(case)
    learning, grad = _learning(case), torch.ones_like(case.effops())

    def both(run: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(run(), learning.inputs(), grad, allow_unused=True)

    rows = []
    for direction, error, ours, plain in (
        ("forward", output_error, case.effops, case.plain),
        ("fwd + bwd", gradient_error, both(learning.effops), both(learning.plain)),
    ):
        functions: dict[str, Callable[[], object]] = {"effops": ours, "plain": plain}
        times = interleaved_min(functions, seconds=settings.seconds / 4, min_rounds=2, device=settings.device)
        name = f"{case.name}, {direction}"
        rows.append(Row(case.op, name, case.shape, times["effops"], times["plain"], error, _TOLERANCE))
    return rows


def _run(settings: Settings, step: Step) -> Result:
    figures, rows = [], []
    for name, picture in (("boxes", picture_boxes), ("points", picture_points), ("gaze", picture_gaze)):
        step(name)
        figures.append(picture(settings))
    for case in _make_cases(settings):
        step(f"{case.name}: check and times")
        rows += _compare(case, settings)
    file = bars_of_times(rows, settings.output, "roi_align-times.png")
    caption = (
        "Shortest of several runs, the two taking turns. Plain PyTorch is grid_sample for all boxes or "
        f"points of a map at once. {_ROIS} boxes of {_BINS} x {_BINS} bins, {_SAMPLES} x {_SAMPLES} samples, "
        f"and {_POINTS:,} points, as PointRend's for 100 masks, on 256 channels at strides 4 to 32."
    )
    text = (
        "roi_align turns boxes of any size into small maps of one size, by bilinear samples; point_sample "
        "reads single points. Each box or point names its image and its map of a pyramid. In the pictures "
        "the maps are photographs, averaged to strides 1, 2, 4 and 8, so that what an op reads can be seen."
    )
    return Result(text, [*figures, Figure(file, "Times on this machine", caption)], rows)


SECTION = Section("RoIAlign and point samples", steps=5, run=_run)
