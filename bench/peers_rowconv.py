"""The ops of the rowconv engine in plain PyTorch, as well as it goes, and what benchmarks of maps share.

Every function is differentiable and runs on every device. Rows are gathered by `index_select`, whose gradient
is the quickest of PyTorch's gathers on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effops import SPS

Call = Callable[[], Any]

# Norm of the error over that of the values. An activation that is 0 but for rounding moves a few rows of a
# gradient, and convolutions of cuDNN in float32 are those of TF32 unless torch is told.
_TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 2e-2}


def checked_calls(
    functions: Mapping[str, Callable[..., Tensor | tuple[Tensor, ...]]],
    inputs: Sequence[Tensor],
    direction: str,
    kept: Tensor | None = None,
    tolerance: float | None = None,
) -> dict[str, Call]:
    """Calls of the functions with the inputs, forward or with the gradients of all, once they agree.

    Where `kept` is given and False, the results of the peers do not matter. `tolerance`: that of check_close.
    """
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    inputs = [leaf.detach() for leaf in leaves]
    generator, grads = torch.Generator().manual_seed(9), []
    for first in _tuple(next(iter(functions.values()))(*inputs)):
        values = torch.randn(first.shape, generator=generator)
        grad = torch.empty_like(first).copy_(values)  # in the layout of the result
        grads.append(grad if kept is None else grad * kept)

    def forward(function: Callable[..., Tensor | tuple[Tensor, ...]]) -> Call:
        return lambda: function(*inputs)

    def both(function: Callable[..., Tensor | tuple[Tensor, ...]]) -> Call:
        return lambda: torch.autograd.grad(_tuple(function(*leaves)), leaves, grads)

    calls = {name: forward(f) if direction == "forward" else both(f) for name, f in functions.items()}
    results = [_tuple(call()) for call in calls.values()]
    if direction == "forward" and kept is not None:
        results = [tuple(tensor * kept for tensor in result) for result in results]
    for name, result in zip(calls, results, strict=True):
        for found, expected in zip(result, results[0], strict=True):
            check_close(name, found, expected, tolerance)
    return calls


def _tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def check_close(name: str, found: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """`tolerance`: of the norm of the error, in units of the norm of the values. None: that of the dtype."""
    assert found.shape == expected.shape, name
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    assert error <= (tolerance or _TOLERANCES[found.dtype]), f"{name}: error {error:.1e}"


def check_same_sps(found: SPS, expected: SPS) -> None:
    for field in ("active", "passive", "index_map", "roi", "xy"):
        assert torch.equal(getattr(found, field), getattr(expected, field)), field


# ------------------------------------------------------------------------------------------ SPS


def sps_conv2d(
    sps: SPS,
    active: Tensor,
    passive: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    dilations: Sequence[int],
    activation: str | None = None,
) -> Tensor:
    """A matrix product of the rows of all taps, side by side, for each branch; sps gives the places."""
    rows = torch.cat([active, passive, active.new_zeros(1, active.shape[1])])
    branches = []
    for weight, bias, dilation in zip(weights, biases, dilations, strict=True):
        ids = _tap_ids(sps, weight.shape[-1], dilation, empty=len(rows) - 1)
        taps = rows.index_select(0, ids.flatten()).view(len(active), -1)
        branch = torch.addmm(bias, taps, weight.permute(2, 3, 1, 0).flatten(0, 2))
        branches.append(branch.relu() if activation == "relu" else branch)
    total = branches[0]
    for branch in branches[1:]:
        total = total + branch
    return total


def sps_conv2d_of_all(sps: SPS, active: Tensor, passive: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Dense maps, convolved at all of their cells."""
    maps = _dense_maps(replace(sps, active=active, passive=passive))
    rows = F.conv2d(maps, weight, bias, padding=weight.shape[-1] // 2).permute(0, 2, 3, 1).flatten(0, 2)
    height, width = sps.index_map.shape[1:]
    return rows.index_select(0, (sps.roi * height + sps.xy[:, 1]) * width + sps.xy[:, 0])


def _tap_ids(sps: SPS, kernel: int, dilation: int, empty: int) -> Tensor:
    """[NA, k, k], `empty` outside the map."""
    height, width = sps.index_map.shape[1:]
    steps = dilation * (torch.arange(kernel, dtype=torch.int32, device=sps.xy.device) - kernel // 2)
    x = sps.xy[:, 0, None, None] + steps
    y = sps.xy[:, 1, None, None] + steps[:, None]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    cells = (sps.roi[:, None, None] * height + y.clamp(0, height - 1)) * width + x.clamp(0, width - 1)
    ids = sps.index_map.flatten().index_select(0, cells.flatten()).view(cells.shape)
    return torch.where(inside, ids, empty)


def sps_from_dense(x: Tensor, mask: Tensor) -> SPS:
    rows = x.permute(0, 2, 3, 1)
    before = mask.flatten().cumsum(0, dtype=torch.int32).view(mask.shape)  # active cells up to this one
    cells = torch.arange(mask.numel(), dtype=torch.int32, device=mask.device).view(mask.shape)
    places = mask.nonzero()
    # a passive cell comes after all active ones, and after as many passive ones as lie before it
    index_map = torch.where(mask, before - 1, len(places) + cells - before)
    places = places.int()
    return SPS(rows[mask], rows[~mask], index_map, places[:, 0].contiguous(), places[:, 1:].flip(1))


def sps_to_dense(sps: SPS) -> Tensor:
    return _dense_maps(sps).contiguous()


def _dense_maps(sps: SPS) -> Tensor:
    """channels_last."""
    rows = torch.cat([sps.active, sps.passive])
    cells = rows.index_select(0, sps.index_map.flatten())
    return cells.view(*sps.index_map.shape, -1).permute(0, 3, 1, 2)


def sps_refine(sps: SPS, scores: Tensor, num_refine: int) -> SPS:
    """With upsampling."""
    old_active, old_passive, device = len(sps.active), len(sps.passive), scores.device
    is_kept = torch.zeros(old_active, dtype=torch.bool, device=device)
    is_kept.scatter_(0, scores.topk(num_refine, sorted=False).indices, True)
    # the sizes are known: on CUDA the host does not wait
    kept = is_kept.nonzero_static(size=num_refine)[:, 0]
    demoted = is_kept.logical_not().nonzero_static(size=old_active - num_refine)[:, 0]
    active = sps.active.index_select(0, kept).repeat_interleave(4, dim=0)
    passive = torch.cat([sps.passive, sps.active.index_select(0, demoted)])

    new_ids = torch.empty(old_active + old_passive, dtype=torch.int32, device=device)
    numbers = torch.arange(max(old_active, old_passive), dtype=torch.int32, device=device)
    new_ids[kept] = 4 * numbers[: len(kept)]
    new_ids[demoted] = len(active) + old_passive + numbers[: len(demoted)]
    new_ids[old_active:] = len(active) + numbers[:old_passive]
    ids = new_ids.index_select(0, sps.index_map.flatten()).view(sps.index_map.shape)
    child = numbers[:4].view(2, 1, 2)
    index_map = ids[:, :, None, :, None] + (ids < len(active))[:, :, None, :, None] * child
    offsets = torch.stack([numbers[:4] % 2, numbers[:4] // 2], 1)  # (x, y)
    xy = (2 * sps.xy.index_select(0, kept)[:, None] + offsets).flatten(0, 1)
    roi = sps.roi.index_select(0, kept).repeat_interleave(4)
    return SPS(active, passive, index_map.flatten(3).flatten(1, 2), roi, xy)


# ------------------------------------------------------------------------------------------ dense maps


def perforated_conv2d(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """3 x 3, same padding: the kept positions as rows of a matrix product."""
    batch, channels, height, width = x.shape
    rows = torch.cat([x.permute(0, 2, 3, 1).reshape(-1, channels), x.new_zeros(1, channels)])
    places = mask.nonzero()
    cells = torch.arange(len(rows) - 1, device=x.device).view(batch, height, width)
    cells = F.pad(cells, (1, 1, 1, 1), value=len(rows) - 1)
    ids = torch.stack(
        [cells[places[:, 0], places[:, 1] + v, places[:, 2] + u] for v in range(3) for u in range(3)], 1
    )
    taps = rows.index_select(0, ids.flatten()).view(len(places), -1)
    result = torch.addmm(bias, taps, weight.permute(2, 3, 1, 0).flatten(0, 2))
    out = result.new_zeros(batch * height * width, len(weight))
    out = out.index_copy(0, mask.flatten().nonzero()[:, 0], result)
    return out.view(batch, height, width, -1).permute(0, 3, 1, 2)


def select_conv2d(
    x: Tensor, weights: Tensor, choice: Tensor, dilations: Sequence[int], bias: Tensor
) -> Tensor:
    """All branches everywhere, and the sum of those that are chosen."""
    total = torch.zeros_like(x)
    for number, dilation in enumerate(dilations):
        branch = x
        if dilation > 0:
            padding = dilation * (weights.shape[-1] // 2)
            branch = F.conv2d(x, weights[number], bias[number], padding=padding, dilation=dilation)
        total = total + branch * (choice == number)[:, None]
    return total
