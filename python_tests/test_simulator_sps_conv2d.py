"""The CUDA kernels of sps_conv2d, run in the host simulator, against the reference in float64."""

from __future__ import annotations

import pytest
import simulator
import torch
from torch import Tensor

from effops import reference

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# Relative to the largest element: rounding of the result, and of sums in float32.
TOLERANCE = {F32: 2e-5, BF16: 8e-3, F16: 1e-3}
SCALAR, DIRECT = 0, -1  # engines; other numbers: warps side by side on tensor cores
Arguments = dict[str, simulator.Argument]


def make_sps(dtype: torch.dtype, features: int, wide: bool, sides: tuple[int, int, int]) -> dict[str, Tensor]:
    """Maps [R, H, W] of about 60 % active cells; the passive rows have several cells each."""
    generator = torch.Generator().manual_seed(features)
    mask = torch.rand(sides, generator=generator) < 0.6
    roi, y, x = mask.nonzero().unbind(1)
    active = len(roi)
    passive = max(1, int((~mask).sum()) // 3)
    index_map = active + torch.randint(passive, sides, generator=generator)
    order = torch.randperm(active, generator=generator)
    roi, y, x = roi[order], y[order], x[order]
    index_map[roi, y, x] = torch.arange(active)
    return {
        "active": torch.randn(active, features, generator=generator, dtype=F64).to(dtype),
        "passive": torch.randn(passive, features, generator=generator, dtype=F64).to(dtype),
        "index_map": index_map.to(torch.int64 if wide else torch.int32),
        "roi": roi.int(),
        "xy": torch.stack([x, y], 1).int(),
    }


def make_weights(dtype: torch.dtype, outputs: int, inputs: int, kernels: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(outputs)
    return [torch.randn(outputs, inputs, k, k, generator=generator, dtype=F64).to(dtype) for k in kernels]


def assert_close(name: str, found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    limit = TOLERANCE[dtype] * max(1.0, float(wanted.abs().max())) if wanted.numel() else 0
    assert torch.allclose(found.double(), wanted, rtol=0, atol=limit), name


CASES = {
    # name: dtype, engine, features, outputs, groups, (kernel, dilation) per branch, relu, bias, wide, maps
    "scalar": (F32, SCALAR, 20, 70, 1, ((3, 1), (1, 1)), True, True, False, (2, 7, 9)),
    "few": (F32, SCALAR, 3, 2, 1, ((3, 2),), True, True, True, (1, 3, 4)),
    "narrow": (BF16, 1, 24, 27, 1, ((3, 1), (1, 1)), True, True, False, (3, 8, 9)),
    "odd": (F16, 2, 5, 20, 1, ((1, 1),), False, True, True, (1, 5, 4)),
    "middle": (F16, 2, 16, 64, 1, ((1, 1),), True, False, False, (1, 4, 5)),
    "wide": (BF16, 4, 8, 100, 1, ((1, 1),), True, True, False, (1, 4, 3)),
    "groups": (BF16, 1, 32, 48, 2, ((1, 1), (1, 1)), True, True, False, (1, 4, 5)),
    "depthwise": (F16, DIRECT, 24, 24, 24, ((3, 1), (5, 2)), True, True, False, (2, 7, 6)),
    "small_groups": (F32, DIRECT, 6, 9, 3, ((3, 1),), True, True, True, (1, 6, 5)),
}


def run_reference(
    sps: dict[str, Tensor], weights: list[Tensor], biases: list[Tensor], arguments: Arguments
) -> dict[str, Tensor]:
    leaves = {name: t.double().requires_grad_() if t.is_floating_point() else t for name, t in sps.items()}
    weights = [w.double().requires_grad_() for w in weights]
    biases = [b.double().requires_grad_() for b in biases]
    activation = "relu" if arguments["relu"] else None
    output = reference.sps_conv2d(
        *leaves.values(), weights, biases or None, arguments["dilation"], activation, arguments["groups"]
    )
    gradients = torch.autograd.grad(
        output,
        [leaves["active"], leaves["passive"], *weights, *biases],
        arguments["grad_output"].double(),
        materialize_grads=True,
    )
    names = ["grad_active", "grad_passive"]
    names += [
        f"grad_{kind}{d}" for kind, of in (("weight", weights), ("bias", biases)) for d in range(len(of))
    ]
    return {"output": output.detach(), **dict(zip(names, gradients, strict=True))}


def make_case(name: str) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor], Arguments]:
    dtype, engine, features, outputs, groups, branches, relu, has_bias, wide, sides = CASES[name]
    sps = make_sps(dtype, features, wide, sides)
    weights = make_weights(dtype, outputs, features // groups, tuple(k for k, _ in branches))
    biases = [w[:, 0, 0, 0].clone() for w in weights] if has_bias else []
    generator = torch.Generator().manual_seed(3)
    arguments: Arguments = {
        **sps,
        "dilation": [d for _, d in branches],
        "groups": groups,
        "relu": relu,
        "engine": engine,
        "splits": 2,
        "grad_output": torch.randn(len(sps["active"]), outputs, generator=generator, dtype=F64).to(dtype),
    }
    arguments |= {f"weight{d}": weight for d, weight in enumerate(weights)}
    arguments |= {f"bias{d}": bias for d, bias in enumerate(biases)}
    return sps, weights, biases, arguments


@pytest.mark.parametrize("name", CASES)
def test_kernels(name: str) -> None:
    sps, weights, biases, arguments = make_case(name)
    result = simulator.run_schedules("sps_conv2d", arguments)
    for key, wanted in run_reference(sps, weights, biases, arguments).items():
        assert_close(key, result[key], wanted, CASES[name][0])


@pytest.mark.parametrize("name", ["scalar", "narrow"])
def test_padding_multiplies_nothing(name: str) -> None:
    """Infinite and NaN weights give the results that they give without a border, and NaN nowhere else."""
    sps, weights, biases, arguments = make_case(name)
    weights[0][1, 0, 0, 0] = torch.inf
    weights[0][2, 1, 2, 2] = torch.nan
    result = simulator.run_schedules("sps_conv2d", arguments)
    wanted = run_reference(sps, weights, biases, arguments)
    for key in ("output", "grad_active", "grad_passive"):
        finite = wanted[key].isfinite()
        assert torch.equal(result[key].isfinite(), finite)
        assert 0 < finite.sum() < finite.numel()
        zero = torch.zeros((), dtype=F64)
        found = torch.where(finite, result[key].double(), zero)
        assert_close(key, found, torch.where(finite, wanted[key], zero), CASES[name][0])


@pytest.mark.parametrize("engine", [SCALAR, DIRECT])
def test_out_of_range_is_skipped(engine: int) -> None:
    """Ids and cells that do not exist read nothing and get gradient 0."""
    name = "small_groups" if engine == DIRECT else "few"
    sps, weights, biases, arguments = make_case(name)
    rows, count = len(sps["active"]), len(sps["active"]) + len(sps["passive"])
    cells = sps["index_map"].view(-1)
    first, second, *_ = (cells >= rows).nonzero()[:, 0]
    cells[first], cells[second] = count, -1
    bad = torch.arange(4)
    sps["roi"][0], sps["roi"][1], sps["xy"][2, 0], sps["xy"][3, 1] = -1, 9, -5, 2**31 - 1
    result = simulator.run_schedules("sps_conv2d", arguments)
    bias = torch.stack([b.double().relu() for b in biases]).sum(0)
    assert_close("bias", result["output"][bad], bias.expand(4, -1), F32)
    assert not result["grad_active"][bad].any()
    # The others are those of a map with zeros there.
    cells[first], cells[second] = count, count
    sps["passive"] = torch.cat([sps["passive"], torch.zeros_like(sps["passive"][:1])])
    good = {**sps, "roi": sps["roi"].clone(), "xy": sps["xy"].clone()}
    good["roi"][bad], good["xy"][bad] = 0, 0
    wanted = run_reference(good, weights, biases, arguments)
    assert_close("output", result["output"][4:], wanted["output"][4:], F32)
