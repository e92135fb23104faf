"""The CUDA kernels of select_conv2d, run in the host simulator, against the reference in float64."""

from __future__ import annotations

import pytest
import simulator
import torch
from torch import Tensor

from effops import reference

F64, F16 = torch.float64, torch.float16
TOLERANCE = {F64: 1e-12, F16: 2e-3}  # relative to the largest element
SCALAR, TENSOR = 0, 1
Arguments = dict[str, simulator.Argument]

CASES = {
    # name: dtype, engine, Ci, Co, kernel, dilations, bias, int64 choices, sides
    "identity": (F64, SCALAR, 5, 5, 3, (1, 0, 2), True, True, (2, 5, 6)),
    "tensor": (F16, TENSOR, 8, 24, 3, (1, 3), False, False, (1, 7, 8)),
    "tensor_identity": (F16, TENSOR, 9, 9, 1, (0, 1), True, False, (1, 4, 7)),
}


def random(generator: torch.Generator, dtype: torch.dtype, *sizes: int) -> Tensor:
    return torch.randn(sizes, generator=generator, dtype=F64).to(dtype)


@pytest.mark.parametrize("name", CASES)
def test_kernels(name: str) -> None:
    dtype, engine, inputs, outputs, kernel, dilations, has_bias, wide, sides = CASES[name]
    generator = torch.Generator().manual_seed(outputs)
    batch, height, width = sides
    x = random(generator, dtype, batch, inputs, height, width)
    weights = random(generator, dtype, len(dilations), outputs, inputs, kernel, kernel)
    bias = random(generator, dtype, len(dilations), outputs) if has_bias else None
    choice = torch.randint(-1, len(dilations), sides, generator=generator)
    choice[:, : height // 2] = 0  # tiles that meet few of the branches
    grad_output = random(generator, dtype, batch, outputs, height, width)
    arguments: Arguments = {
        "x": x.permute(0, 2, 3, 1).contiguous(),
        "grad_output": grad_output.permute(0, 2, 3, 1).contiguous(),
        "weights": weights,
        "choice": choice if wide else choice.int(),
        "dilations": dilations,
        "engine": engine,
        "splits": 2,
    }
    if bias is not None:
        arguments["bias"] = bias
    result = simulator.run_schedules("select_conv2d", arguments)

    leaves = [leaf.double().requires_grad_() for leaf in (x, weights, bias) if leaf is not None]
    output = reference.select_conv2d(leaves[0], leaves[1], choice, dilations, *leaves[2:])
    gradients = torch.autograd.grad(output, leaves, grad_output.double())
    wanted = dict(zip(("grad_x", "grad_weights", "grad_bias"), gradients, strict=False))
    wanted["output"] = output.detach()
    for key, value in wanted.items():
        found = result[key].permute(0, 3, 1, 2) if key in ("grad_x", "output") else result[key]
        limit = TOLERANCE[dtype] * max(1.0, float(value.abs().max()))
        assert torch.allclose(found.double(), value, rtol=0, atol=limit), key
