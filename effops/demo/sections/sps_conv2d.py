"""Masks of coins refined at their boundary with sparse maps: pictures, correctness, times."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from effops import SPS, reference, sps_conv2d, sps_refine, sps_to_dense
from effops.demo._section import Result, Row, Section, Settings, Step
from effops.demo._timing import interleaved_min
from effops.demo.sections._sps_conv2d_head import (
    REFINED,
    SIDES,
    Coins,
    Head,
    Stage,
    cells_of,
    find_coins,
    learn,
    plain_dense,
)
from effops.demo.sections._sps_conv2d_pictures import (
    Masks,
    picture_boundary,
    picture_cost,
    picture_photo,
    picture_stages,
)

_TOLERANCE = 2e-5
_HEAD_TOLERANCE = 1e-4  # the photograph is read where float32 has rounded to, and gradients are steep
_KINK = 1e-4  # of a ReLU: closer to 0, float32 and float64 may take different sides


def plain_gather(
    sps: SPS, weights: Sequence[Tensor], biases: Sequence[Tensor], dilations: Sequence[int]
) -> Tensor:
    """sps_conv2d with ReLU as EffSeg's own code has it: the neighbours of all active cells, copied."""
    margin = max(dilations) * (weights[0].shape[2] // 2)
    table = torch.cat([sps.active, sps.passive, sps.active.new_zeros(1, sps.active.shape[1])])
    ids = F.pad(sps.index_map, [margin] * 4, value=len(table) - 1)
    x, y = sps.xy.long().unbind(1)
    outputs = []
    for weight, bias, dilation in zip(weights, biases, dilations, strict=True):
        side = weight.shape[2]
        steps = dilation * (torch.arange(side, device=ids.device) - side // 2) + margin
        rows, columns = y[:, None, None] + steps[:, None], x[:, None, None] + steps
        neighbours = table[ids[sps.roi.long()[:, None, None], rows, columns].flatten(1)]
        matrix = weight.permute(2, 3, 1, 0).flatten(0, 2)
        outputs.append(F.relu(torch.addmm(bias, neighbours.flatten(1), matrix)))
    return torch.stack(outputs).sum(0)


def plain_refine(sps: SPS, scores: Tensor, num_refine: int) -> SPS:
    """sps_refine in plain PyTorch: sort, relabel, repeat."""
    count, device = min(num_refine, len(scores)), scores.device
    kept = scores.topk(count).indices.sort().values
    is_kept = torch.zeros_like(scores, dtype=torch.bool).index_fill(0, kept, True)
    demoted = (~is_kept).nonzero()[:, 0]
    new_ids = torch.empty(len(sps.active) + len(sps.passive), dtype=torch.int32, device=device)
    new_ids[kept] = 4 * torch.arange(count, dtype=torch.int32, device=device)
    later = torch.cat([torch.arange(len(sps.active), len(new_ids), device=device), demoted])
    new_ids[later] = 4 * count + torch.arange(len(later), dtype=torch.int32, device=device)
    index_map = new_ids[sps.index_map].repeat_interleave(2, 1).repeat_interleave(2, 2)
    child = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]], dtype=torch.int32, device=device)
    xy = (2 * sps.xy[kept, None] + child).flatten(0, 1)
    active, roi = (field[kept].repeat_interleave(4, 0) for field in (sps.active, sps.roi))
    index_map[roi, xy[:, 1], xy[:, 0]] = torch.arange(4 * count, dtype=torch.int32, device=device)
    return SPS(active, torch.cat([sps.passive, sps.active[demoted]]), index_map, roi, xy)


# ------------------------------------------------------------------------------------------ comparisons


@dataclass(frozen=True)
class _Fusion:
    """The fused convolutions of one stage: an SPS and what it is convolved with."""

    sps: SPS
    weights: list[Tensor]
    biases: list[Tensor]
    dilations: list[int]

    def effops(self) -> Tensor:
        output: Tensor = sps_conv2d(
            *_fields(self.sps), self.weights, self.biases, self.dilations, activation="relu"
        )
        return output

    def gather(self) -> Tensor:
        return plain_gather(self.sps, self.weights, self.biases, self.dilations)

    def inputs(self) -> list[Tensor]:
        return [self.sps.active, self.sps.passive, *self.weights, *self.biases]

    def with_inputs(self, inputs: list[Tensor]) -> _Fusion:
        active, passive, *rest = inputs
        sps, count = replace(self.sps, active=active, passive=passive), len(self.weights)
        return _Fusion(sps, rest[:count], rest[count:], self.dilations)

    @property
    def shape(self) -> str:
        maps, height, width = self.sps.index_map.shape
        share = len(self.sps.active) / self.sps.index_map.numel()
        return f"{maps} maps of {height} x {width}, F={self.sps.active.shape[1]}, {share:.0%} active"


def _fields(sps: SPS) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return sps.active, sps.passive, sps.index_map, sps.roi, sps.xy


def _fusion(head: Head, stage: Stage) -> _Fusion:
    active = F.relu(head.fusion.input_proj(stage.before.active))
    return _Fusion(replace(stage.before, active=active), *head.branches())


def _learning(fusion: _Fusion, dtype: torch.dtype) -> _Fusion:
    return fusion.with_inputs([tensor.detach().to(dtype).requires_grad_() for tensor in fusion.inputs()])


def _check(fusion: _Fusion) -> tuple[float, float]:
    """Errors of the output and of the gradients against the reference in float64.

    Each is the largest difference divided by the reference's largest value. Where a branch is close to the
    kink of the ReLU the gradient is 0.
    """
    exact, part = _learning(fusion, torch.float64), _learning(fusion, torch.float32)
    branches = [
        reference.sps_conv2d(*_fields(exact.sps), weight, bias, dilation)
        for weight, bias, dilation in zip(exact.weights, exact.biases, exact.dilations, strict=True)
    ]
    smooth = torch.stack([branch.abs() > _KINK for branch in branches]).all(0)
    result, expected = part.effops(), torch.stack(branches).relu().sum(0)
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result) * smooth
    grads = torch.autograd.grad(result, part.inputs(), grad)
    exact_grads = torch.autograd.grad(expected, exact.inputs(), grad.double())
    errors = [_error(*pair) for pair in zip(grads, exact_grads, strict=True)]
    return _error(result, expected), float(torch.tensor(errors).max())  # NaN stays NaN


def _error(result: Tensor, exact: Tensor) -> float:
    result, exact = result.detach(), exact.detach()
    return float((result.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))


def _compare_stages(
    head: Head, stages: Sequence[Stage], settings: Settings
) -> tuple[list[Row], dict[str, dict[str, float]]]:
    """The fused convolutions of each stage, and those of the last one with all gradients.

    Plain PyTorch in the rows is the faster one of a dense convolution and a gather.
    """
    rows: list[Row] = []
    all_times: dict[str, dict[str, float]] = {}
    for number, stage in enumerate(stages, 1):
        fusion = _fusion(head, stage)
        programs = _programs(fusion)
        directions: dict[str, Mapping[str, Callable[[], object]]] = {
            "forward": {name: torch.no_grad()(run) for name, (run, _) in programs.items()},
            "fwd + bwd": {name: _with_gradients(*program) for name, program in programs.items()},
        }
        for (direction, functions), error in zip(directions.items(), _check(fusion), strict=True):
            if direction == "forward" or stage is stages[-1]:
                case = f"stage {number}, {direction}"
                all_times[case] = times = _time(functions, settings)
                plain = min(times["gather"], times["dense"])
                rows.append(Row("sps_conv2d", case, fusion.shape, times["effops"], plain, error, _TOLERANCE))
    return rows, all_times


def _programs(fusion: _Fusion) -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
    """Each program and the inputs that it has gradients for."""
    learning = _learning(fusion, torch.float32)
    dense = sps_to_dense(learning.sps).detach().requires_grad_()
    run_dense = partial(plain_dense, dense, learning.weights, learning.biases, learning.dilations)
    return {
        "effops": (learning.effops, learning.inputs()),
        "gather": (learning.gather, learning.inputs()),
        "dense": (run_dense, [dense, *learning.weights, *learning.biases]),
    }


def _with_gradients(run: Callable[[], Tensor], inputs: Sequence[Tensor]) -> Callable[[], object]:
    grad = torch.ones_like(run())
    return lambda: torch.autograd.grad(run(), inputs, grad)


def _compare_head(
    head: Head, coins: Coins, stages: Sequence[Stage], settings: Settings
) -> tuple[Row, dict[str, float]]:
    """The whole head, sparse and dense, and both against the dense one in float64."""
    active = [stage.active for stage in stages]
    dense = partial(head.dense, coins.pyramid, coins.boxes, active)
    exact_pyramid = [level.double() for level in coins.pyramid]
    exact = copy.deepcopy(head).double().dense(exact_pyramid, coins.boxes.double(), active)
    errors = [_error(stage.logits, expected) for stage, expected in zip(stages, exact, strict=True)]
    times = _time({"effops": partial(head, coins.pyramid, coins.boxes), "dense": dense}, settings)
    shape = f"{len(coins.boxes)} masks, {SIDES[0]} x {SIDES[0]} to {SIDES[-1]} x {SIDES[-1]}"
    row = Row(
        "sps_conv2d", "head, forward", shape, times["effops"], times["dense"], max(errors), _HEAD_TOLERANCE
    )
    return row, times


def _compare_refine(stages: Sequence[Stage], settings: Settings) -> Row:
    """The split before the last stage."""
    sps = stages[-2].after
    scores = -stages[-2].logits[cells_of(sps)].abs()
    maps, height, width = sps.index_map.shape
    count = REFINED[-1] * maps
    refine = partial(sps_refine, sps, scores, count)
    pairs = zip(_fields(refine()), _fields(reference.sps_refine(sps, scores, count)), strict=True)
    error = max(_error(result, exact.double()) for result, exact in pairs)
    times = _time({"effops": refine, "plain": partial(plain_refine, sps, scores, count)}, settings)
    shape = f"{maps} maps of {height} x {width}, F={sps.active.shape[1]}, {count:,} of {len(scores):,}"
    return Row("sps_refine", "before stage 3", shape, times["effops"], times["plain"], error, 0.0)


def _time(functions: Mapping[str, Callable[[], object]], settings: Settings) -> dict[str, float]:
    return interleaved_min(functions, seconds=settings.seconds / 5, min_rounds=2, device=settings.device)


def _run(settings: Settings, step: Step) -> Result:
    step("learning to outline coins")
    coins = find_coins(settings.device)
    others, unseen = coins.part(slice(0, None, 2)), coins.part(slice(1, None, 2))
    head = learn(others, settings.learning_steps // 2)
    with torch.no_grad():
        coarse, stages = head(unseen.pyramid, unseen.boxes)
        step("pictures")
        masks = Masks(unseen, others, coarse, stages)
        figures = [picture(settings, masks) for picture in (picture_photo, picture_stages, picture_boundary)]
        step("head: check and times")
        head_row, head_times = _compare_head(head, unseen, stages, settings)
        refine_row = _compare_refine(stages, settings)
    step("stages: check and times")
    rows, times = _compare_stages(head, stages, settings)
    figures.append(picture_cost(settings, masks, times | {"whole head": head_times}, head_row.error))
    text = (
        "A map of structure-preserving sparsity (SPS) keeps the features of all cells, but computes new ones "
        "only where they are wanted: sps_refine chooses those cells and doubles the resolution, and "
        "sps_conv2d convolves them with everything around them. Here a mask head, after EffSeg, refines "
        "coarse masks of coins to eight times the resolution at their boundary. Plain PyTorch in the table "
        "is the faster one of a dense convolution of all cells and a gather of the active ones' neighbours."
    )
    return Result(text, figures, [*rows, head_row, refine_row])


SECTION = Section("Sparse maps: masks refined at the boundary", steps=4, run=_run)
