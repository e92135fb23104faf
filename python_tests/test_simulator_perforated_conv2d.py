"""The CUDA kernels of perforated_conv2d, run in the host simulator, against the reference in float64."""

from __future__ import annotations

import pytest
import simulator
import torch
from torch import Tensor
from torch.nn import functional

from effops import reference

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
TOLERANCE = {F32: 2e-5, BF16: 1.6e-2}  # relative to the largest element; products of bf16 round their factors
SCALAR, TENSOR, DIRECT = 0, 1, -1
FILLS = ("zero", "keep", "nearest")
Arguments = dict[str, simulator.Argument]

CASES = {
    # name: dtype, engine, Ci, Co, groups, kernel, stride, padding, dilation, fill, mask, channels_last
    "scalar": (F32, SCALAR, 5, 3, 1, (3, 3), (1, 1), (1, 1), (1, 1), "nearest", F32, True),
    "strided": (F32, SCALAR, 4, 6, 1, (3, 2), (2, 1), (1, 2), (1, 2), "keep", torch.bool, False),
    "tensor": (BF16, TENSOR, 16, 20, 1, (3, 3), (1, 1), (2, 2), (2, 2), "zero", F32, False),
    "masked": (BF16, TENSOR, 6, 8, 1, (1, 1), (1, 1), (0, 0), (1, 1), "nearest", BF16, True),
    "depthwise": (F32, DIRECT, 8, 8, 8, (3, 3), (1, 1), (1, 1), (1, 1), "zero", F32, True),
}


def make_plan(mask: Tensor) -> tuple[Arguments, Tensor]:
    """The plan as the device makes it: positions of the capacity, of which `count` are there."""
    positions, rows = reference.plan_mask(mask).positions, reference.plan_mask(mask).rows
    kept = len(positions)
    padded = torch.full((mask.numel(),), -7)
    padded[:kept] = positions
    image, y, x = (t[:, None] for t in torch.unravel_index(torch.arange(mask.numel()), mask.shape))
    other_image, other_y, other_x = torch.unravel_index(positions, mask.shape)
    distance = ((y - other_y) ** 2 + (x - other_x) ** 2).double()
    distance = torch.where(image == other_image, distance, torch.inf)
    nearest = distance.argmin(1)
    nearest[distance.amin(1) == torch.inf] = -1
    order = nearest.sort(stable=True).indices[int((nearest < 0).sum()) :]
    offsets = torch.zeros(mask.numel() + 1, dtype=torch.int64)
    offsets[1:] = torch.bincount(nearest[nearest >= 0], minlength=mask.numel()).cumsum(0)
    copies = torch.cat([order, torch.full((mask.numel() - len(order),), -7)])
    plan: Arguments = {
        "positions": padded,
        "rows": rows,
        "count": torch.tensor([kept]),
        "nearest": nearest.view(mask.shape),
        "copy_offsets": offsets,
        "copies": copies,
    }
    return plan, rows


def random(generator: torch.Generator, dtype: torch.dtype, *sizes: int) -> Tensor:
    return torch.randn(sizes, generator=generator, dtype=F64).to(dtype)


def in_layout(maps: Tensor, channels_last: bool) -> Tensor:
    return maps.permute(0, 2, 3, 1).contiguous() if channels_last else maps.contiguous()


def as_maps(result: Tensor, channels_last: bool) -> Tensor:
    return result.permute(0, 3, 1, 2) if channels_last else result


@pytest.mark.parametrize("name", CASES)
def test_kernels(name: str) -> None:
    dtype, engine, inputs, outputs, groups, kernel, stride, padding, dilation, fill, of_mask, last = CASES[
        name
    ]
    generator = torch.Generator().manual_seed(inputs)
    x = random(generator, dtype, 2, inputs, 6, 7)
    weight = random(generator, dtype, outputs, inputs // groups, *kernel)
    bias = random(generator, dtype, outputs)
    dense = functional.conv2d(x.double(), weight.double(), bias.double(), stride, padding, dilation, groups)
    mask = torch.rand(dense.shape[0], *dense.shape[2:], generator=generator) < 0.4
    if of_mask != torch.bool:
        mask = mask.to(of_mask) * random(generator, of_mask, *mask.shape)
    base = random(generator, dtype, *dense.shape) if fill == "keep" else None
    grad_output = random(generator, dtype, *dense.shape)
    plan, rows = make_plan(mask)
    arguments: Arguments = {
        **plan,
        "x": in_layout(x, True),
        "weight": weight,
        "bias": bias,
        "mask": mask,
        "grad_output": in_layout(grad_output, last),
        "dense": in_layout(dense.to(dtype), last),
        "channels_last": last,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "fill": FILLS.index(fill),
        "engine": engine,
        "splits": 2,
    }
    if base is not None:
        arguments["base"] = in_layout(base, last)
    result = simulator.run_schedules("perforated_conv2d", arguments)

    leaves = {"x": x, "weight": weight, "bias": bias, "mask": mask, "base": base}
    leaves = {
        key: leaf.double().requires_grad_() if leaf is not None and leaf.is_floating_point() else leaf
        for key, leaf in leaves.items()
    }
    mask_leaf = leaves["mask"].to(F64) if of_mask != torch.bool else mask
    output = reference.perforated_conv2d(
        leaves["x"], leaves["weight"], mask_leaf, leaves["bias"], stride, padding, dilation, groups, fill,
        leaves["base"],
    )  # fmt: skip
    needed = {key: leaf for key, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    gradients = torch.autograd.grad(output, list(needed.values()), grad_output.double())
    wanted = {f"grad_{key}": grad for key, grad in zip(needed, gradients, strict=True)}
    wanted["output"] = output.detach()
    wanted.setdefault("grad_base", torch.where(rows[:, None] < 0, grad_output.double(), 0))
    factor = torch.ones(mask.shape) if of_mask == torch.bool else mask.double()
    wanted["multiplied"] = torch.where(rows[:, None] < 0, dense, dense * factor[:, None])
    for key, value in wanted.items():
        found = result[key]
        if key == "grad_x":
            found = as_maps(found, True)
        elif key in ("output", "grad_base", "multiplied"):
            found = as_maps(found, last)
        limit = TOLERANCE[dtype] * max(1.0, float(value.abs().max()))
        assert torch.allclose(found.double(), value, rtol=0, atol=limit), key
