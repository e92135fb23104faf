"""The CUDA kernels of ms_deform_attn, run in the host simulator, against the reference in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import simulator
import torch
from torch import Tensor

from effops import reference

RUNS = (*((schedule, "memory") for schedule in simulator.SCHEDULES), (simulator.SCHEDULES[-1], "races"))
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# Relative to 1 + |expected|: rounding of the result, and of float32 coordinates before a difference.
TOLERANCE = {F32: 2e-5, F64: 1e-12, BF16: 1e-2, F16: 2e-3}


@dataclass(frozen=True)
class Case:
    """One shape and one way to launch it."""

    dtype: torch.dtype
    channels: int
    levels: int = 2
    points: int = 3
    queries: int = 5
    heads: int = 2
    vectors: bool = False  # 16-byte accesses
    half_points: bool = False  # locations and weights in the dtype of value, not float32
    sizes_on_device: bool = False
    consecutive: bool = False  # no level_start_index
    table: bool = False

    def __str__(self) -> str:
        flags = [
            name
            for name in ("vectors", "half_points", "sizes_on_device", "consecutive", "table")
            if getattr(self, name)
        ]
        dtype = str(self.dtype).removeprefix("torch.")
        return "-".join(
            [dtype, f"D{self.channels}", f"L{self.levels}", f"P{self.points}", f"Q{self.queries}", *flags]
        )


CASES = (
    Case(F32, 1, levels=5, points=1),
    Case(F32, 3, sizes_on_device=True),
    Case(F32, 8, vectors=True, levels=1, points=1, consecutive=True),
    Case(F32, 32, vectors=True, levels=4, points=4, heads=1, queries=19),
    Case(F32, 33, levels=1, points=2, queries=1),
    Case(F32, 40, vectors=True, sizes_on_device=True, consecutive=True),
    Case(F32, 64, vectors=True, levels=5, points=1, table=True),
    Case(F32, 128, vectors=True, levels=3, points=1),
    Case(F64, 3, half_points=True),
    Case(F64, 8, vectors=True, half_points=True, levels=5, points=1, sizes_on_device=True),
    Case(F64, 40, vectors=True),
    Case(BF16, 32, vectors=True, levels=5, points=1),
    Case(BF16, 40, vectors=True, half_points=True, heads=1),
    Case(BF16, 33, heads=1, half_points=True),
    Case(F16, 64, vectors=True, half_points=True, levels=1, points=5),
    Case(F16, 1, levels=5, points=1, consecutive=True, sizes_on_device=True),
)


@dataclass
class Inputs:
    value: Tensor
    spatial_shapes: Tensor
    level_starts: Tensor | None
    locations: Tensor
    weights: Tensor
    grad_output: Tensor


def unsampled_rows(rows: int, sizes: Tensor, starts: Tensor | None) -> Tensor:
    area = sizes.prod(1)
    first = area.cumsum(0) - area if starts is None else starts
    row = torch.arange(rows)[:, None]
    return ~((row >= first) & (row < first + area)).any(1)


def make_inputs(case: Case, batch: int = 2, seed: int = 0) -> Inputs:
    """Overlapping levels, points in and out of them, NaN and Inf coordinates, NaN in all rows outside."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([(5, 7), (3, 4), (2, 2), (1, 1), (1, 6)])[: case.levels]
    rows = 120 if case.dtype != F64 else 60  # more than one tile of owned rows
    starts = torch.tensor([3, 20, 1, 0, 50])[: case.levels]
    points_dtype = case.dtype if case.half_points else F32
    shape = (batch, case.queries, case.heads, case.levels, case.points)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=F64)

    locations = torch.rand((*shape, 2), generator=generator, dtype=F64) * 1.6 - 0.3
    locations[0, 0, 0, 0, 0, 0] = float("nan")
    locations[-1, -1, -1, -1, -1, 1] = float("inf")
    value = normal(batch, rows, case.heads, case.channels)
    value[:, unsampled_rows(rows, sizes, None if case.consecutive else starts)] = float("nan")
    return Inputs(
        value=value.to(case.dtype),
        spatial_shapes=sizes,
        level_starts=None if case.consecutive else starts,
        locations=locations.to(points_dtype),
        weights=normal(*shape).to(points_dtype),
        grad_output=normal(batch, case.queries, case.heads * case.channels).to(case.dtype),
    )


def expected_results(inputs: Inputs) -> dict[str, Tensor]:
    value, locations, weights = (
        tensor.double().requires_grad_() for tensor in (inputs.value, inputs.locations, inputs.weights)
    )
    output = reference.ms_deform_attn(value, inputs.spatial_shapes, inputs.level_starts, locations, weights)
    output.backward(inputs.grad_output.double())
    return {
        "output": output.detach(),
        "grad_value": value.grad,
        "grad_locations": locations.grad,
        "grad_weights": weights.grad,
    }


def simulate(
    case: Case,
    inputs: Inputs,
    run: tuple[str, simulator.Check] = RUNS[0],
    *,
    forward: bool = False,
    need_value: bool = False,
    need_points: bool = False,
    deterministic: bool = False,
) -> simulator.Results:
    """Results start as NaN, except grad_value, into which kernels add."""
    arguments: dict[str, simulator.Argument] = {
        name: tensor for name, tensor in vars(inputs).items() if tensor is not None
    }
    arguments |= {
        "vectors": case.vectors,
        "sizes_on_device": case.sizes_on_device,
        "table": case.table,
        "forward": forward,
        "backward": need_value or need_points,
        "need_value": need_value,
        "need_points": need_points,
        "deterministic": deterministic,
    }
    schedule, check = run
    return simulator.run("ms_deform_attn", arguments, schedule=schedule, check=check)


def assert_close(results: simulator.Results, expected: dict[str, Tensor]) -> None:
    for name, got in results.items():
        want = expected[name.removeprefix("deterministic_")]
        assert got.shape == want.shape, name
        error = ((got.double() - want).abs() / (1 + want.abs())).nan_to_num(nan=float("inf"))
        # The gradient of a location is a slope times the size of the level.
        allowed = TOLERANCE[got.dtype] * (10 if name == "grad_locations" else 1)
        assert not error.numel() or error.max() < allowed, f"{name}: {error.max():.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("run", RUNS, ids="-".join)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case: Case, run: tuple[str, simulator.Check]) -> None:
    inputs = make_inputs(case)
    results = simulate(case, inputs, run, forward=True, need_value=True, need_points=True, deterministic=True)
    assert len(results) == 5
    assert_close(results, expected_results(inputs))


@pytest.mark.parametrize("case", [CASES[3], CASES[4]], ids=str)
def test_computes_only_needed_gradients(case: Case) -> None:
    inputs = make_inputs(case)
    expected = expected_results(inputs)
    for needed in ("value", "points"):
        results = simulate(case, inputs, need_value=needed == "value", need_points=needed == "points")
        assert ("grad_value" in results) == (needed == "value")
        assert_close(results, expected)


@pytest.mark.parametrize("case", [CASES[3], CASES[9]], ids=str)
def test_deterministic_gradient_is_the_same_in_every_schedule(case: Case) -> None:
    inputs = make_inputs(case)
    inputs.locations *= 0.3  # many points per row
    results = [simulate(case, inputs, run, deterministic=True)["deterministic_grad_value"] for run in RUNS]
    assert all(torch.equal(result, results[0]) for result in results)


def test_many_channels_take_several_turns() -> None:
    case = Case(F64, 66, vectors=True, heads=1, queries=2)  # 33 accesses of 16 bytes, 32 lanes
    inputs = make_inputs(case, batch=1)
    assert_close(simulate(case, inputs, forward=True), expected_results(inputs))


def test_misaligned_values_go_through_single_elements() -> None:
    case = Case(F32, 8, heads=1, queries=2)
    inputs = make_inputs(case, batch=1)
    storage = torch.empty(inputs.value.numel() + 1)
    storage[1:] = inputs.value.flatten()
    inputs.value = storage[1:].view_as(inputs.value)
    assert inputs.value.data_ptr() % 16
    results = simulate(case, inputs, forward=True, need_value=True, need_points=True, deterministic=True)
    assert_close(results, expected_results(inputs))


@pytest.mark.parametrize("size", [(0, 3), (3, -1), (7, 2**40), (2**24, 1), (200, 1)], ids=str)
def test_invalid_level_is_skipped(size: tuple[int, int]) -> None:
    case = Case(F32, 8, vectors=True, heads=1, queries=2, levels=3, points=2, sizes_on_device=True)
    inputs = make_inputs(case, batch=1)
    other_levels = torch.tensor([1.0, 0.0, 1.0])[:, None]
    expected = expected_results(replace(inputs, weights=inputs.weights * other_levels))
    expected["grad_weights"] *= other_levels
    inputs.spatial_shapes[1] = torch.tensor(size)
    results = simulate(case, inputs, forward=True, need_value=True, need_points=True, deterministic=True)
    assert_close(results, expected)


def test_infinite_gradient_reaches_only_sampled_pixels() -> None:
    case = Case(F32, 8, vectors=True, heads=1, queries=3)
    inputs = make_inputs(case, batch=1)
    finite = expected_results(inputs)["grad_value"]
    inputs.grad_output[0, 1] = float("inf")
    alone = replace(
        inputs,
        locations=inputs.locations[:, 1:2],
        weights=inputs.weights[:, 1:2],
        grad_output=torch.ones_like(inputs.grad_output[:, 1:2]),
    )
    touched = expected_results(alone)["grad_value"] != 0
    assert touched.any()
    assert not touched.all()
    for name, got in simulate(case, inputs, need_value=True, deterministic=True).items():
        assert not got[touched].isfinite().any(), name
        assert_close({name: got[~touched]}, {"grad_value": finite[~touched]})


def test_no_queries_give_a_zero_gradient() -> None:
    case = Case(F32, 3)
    inputs = make_inputs(case)
    for name in ("locations", "weights", "grad_output"):
        setattr(inputs, name, getattr(inputs, name)[:, :0].contiguous())
    (grad_value,) = simulate(case, inputs, deterministic=True).values()
    assert torch.equal(grad_value, torch.zeros_like(grad_value))
