"""The CUDA kernels of mean_shift, run in the host simulator, against the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import simulator
import torch
from torch import Tensor

from effops import reference

F32, F64 = torch.float32, torch.float64


@dataclass(frozen=True)
class Case:
    """One shape and one set of options."""

    channels: int
    points: int
    dtype: torch.dtype = F32
    batch: int = 1
    seeds: int | None = None
    kappa: float = 6.0
    eta: float = 1.0
    iterations: int = 2
    tol: float = -1.0
    weights: bool = True
    return_all: bool = False
    medium: bool = False
    tensor_cores: bool = True
    multiprocessors: int = 2

    @property
    def tolerance(self) -> float:
        """Of the largest number of a result."""
        if self.dtype == F64:
            return 1e-12
        return 6e-3 if self.medium else 2e-5


CASES = {
    # Small engine.
    "line": Case(1, 5, kappa=2.0, eta=0.5),
    "sphere": Case(3, 130, batch=2, iterations=1, multiprocessors=1),
    "sphere_double": Case(3, 9, F64, seeds=4, eta=0.7),
    "splits": Case(2, 260, seeds=3, weights=False, return_all=True),
    # Tensor engine: every number of channels, both precisions.
    "16": Case(7, 131, iterations=1, multiprocessors=1),
    "16_medium": Case(16, 20, medium=True, return_all=True),
    "32": Case(29, 36, eta=0.6),
    "32_medium": Case(24, 40, medium=True, seeds=5, iterations=1),
    "64": Case(33, 40, seeds=17, kappa=12.0, iterations=1, multiprocessors=1),
    "64_medium": Case(64, 66, medium=True, iterations=1),
    "128": Case(65, 34, iterations=1),
    "128_medium": Case(128, 9, medium=True, weights=False, iterations=1),
    # Scalar engine.
    "scalar": Case(5, 40, tensor_cores=False, multiprocessors=1),
    "scalar_double": Case(7, 40, F64, batch=2, seeds=3, return_all=True),
    "slices": Case(200, 7, iterations=1),
    "slices_double": Case(70, 9, F64, eta=0.5, iterations=1),
    # Ends.
    "no_iterations": Case(4, 6, iterations=0),
    "no_points": Case(3, 0, seeds=2),
    "no_seeds": Case(16, 4, seeds=0),
    "one_point": Case(4, 1, F64, return_all=True),
}


def make_inputs(case: Case) -> dict[str, Tensor]:
    """Points in a few clusters; the tensors that have gradients, and that of the output."""
    generator = torch.Generator().manual_seed(case.channels + case.points)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=F64)

    centers = random(case.batch, 4, case.channels)
    members = torch.arange(case.points) % 4
    x = centers[:, members] + 0.3 * random(case.batch, case.points, case.channels)
    inputs = {"x": x, "kappa_tensor": torch.tensor([case.kappa])}
    if case.weights:
        inputs["weights"] = 0.5 + torch.rand(case.batch, case.points, generator=generator)
    rows = case.points if case.seeds is None else case.seeds
    if case.seeds is not None:
        inputs["seeds"] = centers[:, :1] + 0.5 * random(case.batch, rows, case.channels)
    levels = (case.iterations + 1,) if case.return_all else ()
    inputs["grad_output"] = random(*levels, case.batch, rows, case.channels)
    return {name: value.to(case.dtype) for name, value in inputs.items()}


def make_arguments(case: Case, inputs: dict[str, Tensor]) -> dict[str, simulator.Argument]:
    return {
        **inputs,
        "kappa": case.kappa,
        "eta": case.eta,
        "iterations": case.iterations,
        "tol": case.tol,
        "precision": int(case.medium),
        "return_all": case.return_all,
        "has_tensor_cores": case.tensor_cores,
        "multiprocessors": case.multiprocessors,
    }


def expected(case: Case, inputs: dict[str, Tensor], dtype: torch.dtype = F64) -> dict[str, Tensor]:
    leaves = {
        name: value.to(dtype, copy=True).requires_grad_()
        for name, value in inputs.items()
        if name != "grad_output"
    }
    output = reference.mean_shift(
        leaves["x"],
        leaves.get("kappa_tensor", case.kappa),
        case.eta,
        case.iterations,
        leaves.get("weights"),
        case.return_all,
        seeds=leaves.get("seeds"),
        tol=None if case.tol < 0 else case.tol,
    )
    wanted = {"iterates" if case.return_all else "output": output.detach()}
    if "grad_output" in inputs:
        gradients = torch.autograd.grad(
            output, list(leaves.values()), inputs["grad_output"].to(dtype), materialize_grads=True
        )
        for name, gradient in zip(leaves, gradients, strict=True):
            wanted["grad_" + name.removesuffix("_tensor")] = gradient
    return wanted


def check(case: Case, found: simulator.Results, wanted: dict[str, Tensor]) -> None:
    for name, value in wanted.items():
        assert found[name].shape == value.shape, name
        largest = float(value.abs().max()) if value.numel() else 0.0
        error = float((found[name].double() - value).abs().max()) if value.numel() else 0.0
        assert error <= case.tolerance * max(1.0, largest), (name, error, largest)


@pytest.mark.parametrize("name", CASES)
def test_kernels(name: str) -> None:
    case = CASES[name]
    inputs = make_inputs(case)
    found = simulator.run_schedules("mean_shift", make_arguments(case, inputs))
    check(case, found, expected(case, inputs))
    assert found["steps"].tolist() == [case.iterations] * case.batch


ENGINES = {"small": Case(3, 6), "tensor": Case(5, 6), "scalar": Case(5, 6, tensor_cores=False)}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("name", "value"), [("x", math.nan), ("x", -math.inf), ("weights", math.inf), ("seeds", math.nan)]
)
def test_not_finite(engine: str, name: str, value: float) -> None:
    """NaN and Inf reach the rows and gradients that the reference says, in one image of two."""
    case = replace(ENGINES[engine], batch=2, seeds=3 if name == "seeds" else None, iterations=1)
    inputs = make_inputs(case)
    inputs[name][1, 2] = value
    found = simulator.run("mean_shift", make_arguments(case, inputs))
    for key, wanted in expected(case, inputs, F32).items():
        assert torch.allclose(found[key], wanted, rtol=0, atol=case.tolerance, equal_nan=True), key


@pytest.mark.parametrize("engine", ENGINES)
def test_without_saving(engine: str) -> None:
    """The last iterate is the same where no other is kept, and where all are the output."""
    case = ENGINES[engine]
    inputs = make_inputs(case)
    saving = simulator.run("mean_shift", make_arguments(case, inputs))
    del inputs["grad_output"]
    alone = simulator.run("mean_shift", make_arguments(case, inputs))
    every = simulator.run("mean_shift", make_arguments(replace(case, return_all=True), inputs))
    assert torch.equal(alone["output"], saving["output"])
    assert torch.equal(every["iterates"], saving["iterates"])
    assert torch.equal(every["iterates"][-1], saving["output"])


def test_weights_overflow() -> None:
    """An image whose weights have no finite sum is lost."""
    case = Case(3, 5, iterations=0, return_all=True)
    inputs = make_inputs(case)
    inputs["weights"].fill_(1e38)
    assert simulator.run("mean_shift", make_arguments(case, inputs))["iterates"].isnan().all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kappa", [-1.0, math.nan, math.inf])
def test_no_kappa(engine: str, kappa: float) -> None:
    """A tensor on the device that holds no kappa makes NaN."""
    case = ENGINES[engine]
    inputs = make_inputs(case) | {"kappa_tensor": torch.tensor([kappa])}
    found = simulator.run("mean_shift", make_arguments(case, inputs))
    assert found["output"].isnan().all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kappa", [0.0, 1e4, 1e30])
def test_rows_that_stay(engine: str, kappa: float) -> None:
    """Rows where all kernel values are 0 stay where they are, and their gradients pass."""
    case = replace(ENGINES[engine], seeds=2, kappa=kappa)
    inputs = make_inputs(case)
    inputs["x"] = torch.eye(case.channels)[:2].repeat(1, 3, 1)
    inputs["seeds"] = torch.eye(case.channels)[[0, 2]].unsqueeze(0)
    del inputs["kappa_tensor"]
    found = simulator.run("mean_shift", make_arguments(case, inputs))
    check(case, found, expected(case, inputs, F32))


def test_no_weights_at_all() -> None:
    """Weights of 0 in one image of two."""
    case = Case(4, 5, F64, batch=2)
    inputs = make_inputs(case)
    inputs["weights"][1] = 0
    found = simulator.run("mean_shift", make_arguments(case, inputs))
    check(case, found, expected(case, inputs))


def test_short_rows() -> None:
    """A row without a direction, and gradients through the smallest norm."""
    case = Case(3, 5, F64, eta=0.5)
    inputs = make_inputs(case)
    inputs["x"][0, 1] = 0
    found = simulator.run("mean_shift", make_arguments(case, inputs))
    check(case, found, expected(case, inputs))


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("return_all", [False, True])
def test_tol(dtype: torch.dtype, return_all: bool) -> None:
    """Images stop on their own; what follows repeats their last iterate, also backward."""
    case = Case(3, 8, dtype, batch=3, kappa=4.0, iterations=4, tol=0.05, return_all=return_all)
    inputs = make_inputs(case)
    inputs["x"][1] = inputs["x"][1, :1]  # stops at once
    found = simulator.run_schedules("mean_shift", make_arguments(case, inputs))
    check(case, found, expected(case, inputs))
    moves = (found["iterates"][1:] - found["iterates"][:-1]).norm(dim=3).amax(2) > case.tol
    steps = 1 + moves[:-1].long().cumprod(0).sum(0)
    assert found["steps"].tolist() == steps.tolist()
    assert 1 == steps[1] < int(steps.max())
    assert float(found["sums"][1:, :, 1].abs().max()) == 0


def test_far_from_overflow() -> None:
    """Rows of 1e30 have a norm."""
    case = Case(16, 4, iterations=1)
    inputs = make_inputs(case)
    inputs["x"] *= 1e30
    found = simulator.run("mean_shift", make_arguments(case, inputs))
    check(case, found, expected(case, inputs))
