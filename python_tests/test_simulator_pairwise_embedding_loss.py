"""The CUDA kernels of pairwise_embedding_loss, run in the host simulator, against a dense computation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import simulator
import torch
from torch import Tensor

F32, F64 = torch.float32, torch.float64
NORMALIZE = {"sum_w": 0, "thesis": 1, "none": 2}
OUTPUTS = ("loss", "costs", "grad_x", "grad_weights")


@dataclass(frozen=True)
class Case:
    """One shape and one set of options."""

    dtype: torch.dtype
    batch: int
    points: int
    channels: int
    normalize: str = "sum_w"
    alpha: float = 0.5
    instances: int = 3
    ignored: float = 0.2  # part of the points
    tensor_cores: bool = False
    splits: int = 1  # of the columns; 0: what the op chooses

    @property
    def tolerance(self) -> float:  # relative to the largest element
        return 1e-12 if self.dtype == F64 else 3e-5 if self.tensor_cores else 3e-6


CASES = {
    "one_channel": Case(F32, 2, 70, 1),
    "splits": Case(F64, 1, 200, 3, "thesis", splits=3),
    "many_channels": Case(F32, 1, 100, 200, "none", alpha=0.45),
    "double_channels": Case(F64, 2, 65, 33, alpha=0.3),
    "tensor_3": Case(F32, 2, 130, 3, tensor_cores=True, splits=2, instances=8),
    "tensor_16": Case(F32, 1, 64, 16, "thesis", tensor_cores=True),
    "tensor_33": Case(F32, 1, 90, 33, "none", tensor_cores=True, instances=40),
    "tensor_64": Case(F32, 1, 100, 64, alpha=0.45, tensor_cores=True),
    "tensor_128": Case(F32, 1, 70, 128, tensor_cores=True, alpha=0.47),
    "one_instance": Case(F32, 1, 150, 5, instances=1, ignored=0.0, tensor_cores=True),
    "closed_pairs": Case(F64, 2, 300, 4, instances=2, ignored=0.4, splits=0),
    "all_ignored": Case(F32, 2, 70, 4, ignored=1.0, tensor_cores=True),
    "alpha_below": Case(F64, 1, 30, 4, alpha=-2.0),
    "alpha_above": Case(F32, 1, 30, 4, alpha=2.0, tensor_cores=True),
    "one_point": Case(F64, 3, 1, 2, ignored=0.0),
}


def make_inputs(case: Case) -> dict[str, Tensor]:
    """x, labels, weights, grad_loss; points of an instance are similar, labels are any integers."""
    generator = torch.Generator().manual_seed(case.points + case.channels)
    sides = (case.batch, case.points)
    labels = torch.randint(case.instances, sides, generator=generator) * 7 + 5
    centers = torch.randn(7 * case.instances + 5, case.channels, generator=generator, dtype=F64)
    x = centers[labels] + torch.randn(*sides, case.channels, generator=generator, dtype=F64)
    labels[torch.rand(sides, generator=generator) < case.ignored] = -1
    weights = torch.rand(sides, generator=generator, dtype=F64) + 0.1
    return {
        "x": x.to(case.dtype),
        "labels": labels,
        "weights": weights.to(case.dtype),
        "grad_loss": torch.tensor(0.7, dtype=case.dtype),
    }


def sort_points(labels: Tensor) -> tuple[Tensor, Tensor]:
    """order, segments as the Python function of the op makes them."""
    order = labels.clamp(min=-1).argsort(stable=True)
    ordered = labels.gather(1, order).clamp(min=-1)
    begins = torch.ones_like(ordered)
    begins[:, 1:] = ordered.diff() != 0
    begins[ordered < 0] = 0
    return order, (begins.cumsum(1) - 1).where(ordered >= 0, -1)


def make_arguments(case: Case, inputs: dict[str, Tensor]) -> dict[str, simulator.Argument]:
    order, segments = sort_points(inputs["labels"])
    return {
        **{name: inputs[name] for name in ("x", "weights", "grad_loss")},
        "order": order,
        "segments": segments,
        "alpha": case.alpha,
        "normalize": NORMALIZE[case.normalize],
        "tensor_cores": case.tensor_cores,
        "splits": case.splits,
    }


def dense(case: Case, inputs: dict[str, Tensor], dtype: torch.dtype = F64) -> dict[str, Tensor]:
    """The outputs by N x N matrices and autograd."""
    x, weights = (inputs[name].to(dtype, copy=True).requires_grad_() for name in ("x", "weights"))
    labels = inputs["labels"]
    counts = labels >= 0
    loss, costs = x.new_zeros(()), []
    for i in range(case.batch):
        kept = counts[i].nonzero().flatten()
        unit = torch.nn.functional.normalize(x[i, kept], dim=-1)
        s = (1 + unit @ unit.T) / 2
        same = labels[i, kept, None] == labels[i, kept]
        w = weights[i, kept]
        cost = torch.where(same, 1 - s, (s - case.alpha).relu()) @ w
        divisors = {"sum_w": w.sum() ** 2, "thesis": torch.tensor(len(kept)), "none": torch.tensor(1)}
        if len(kept):
            loss = loss + (w @ cost) / divisors[case.normalize] / case.batch
        costs.append(x.new_zeros(case.points).index_put((kept,), cost.detach()))
    gradients = [torch.zeros_like(x), torch.zeros_like(weights)]
    if loss.requires_grad:
        gradients = list(torch.autograd.grad(loss, (x, weights), inputs["grad_loss"].to(dtype)))
    return dict(zip(OUTPUTS, (loss.detach(), torch.stack(costs), *gradients), strict=True))


def check(found: simulator.Results, wanted: dict[str, Tensor], tolerance: float) -> None:
    for key, value in wanted.items():
        largest = max(float(value.nan_to_num().abs().max()), 0.01)
        assert found[key].shape == value.shape, key
        close = torch.isclose(found[key].double(), value, rtol=0, atol=tolerance * largest, equal_nan=True)
        assert close.all(), (key, float((found[key] - value).abs().max()), largest)


@pytest.mark.parametrize("name", CASES)
def test_kernels(name: str) -> None:
    case = CASES[name]
    inputs = make_inputs(case)
    found = simulator.run_schedules("pairwise_embedding_loss", make_arguments(case, inputs))
    check(found, dense(case, inputs), case.tolerance)
    ignored = inputs["labels"] < 0
    assert not found["grad_x"][ignored].any()
    assert not found["grad_weights"][ignored].any()


SMALL = Case(F32, 1, 80, 5)


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("values", [(math.inf, 1.0), (math.nan, 1.0), (3e38, 2e38), (1.0, -1.0)])
def test_weights(normalize: str, values: tuple[float, float]) -> None:
    """Weights that are not finite, or whose sum is not, make their image NaN; the sum 0 has no loss."""
    case = Case(F32, 1, 2, 3, normalize, instances=1, ignored=0.0)
    inputs = make_inputs(case)
    inputs["weights"][:] = torch.tensor(values)
    found = simulator.run("pairwise_embedding_loss", make_arguments(case, inputs))
    if values == (1.0, -1.0) and normalize == "sum_w":
        assert not any(found[key].any() for key in ("loss", "grad_x", "grad_weights"))
    elif values == (1.0, -1.0):
        check(found, dense(case, inputs), case.tolerance)
    else:
        assert all(found[key].isnan().all() for key in ("loss", "grad_x", "grad_weights"))


@pytest.mark.parametrize("tensor_cores", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite(value: float, tensor_cores: bool) -> None:
    """NaN and Inf make their image NaN, but not at points that are ignored."""
    case = replace(SMALL, batch=3, tensor_cores=tensor_cores)
    inputs = make_inputs(case)
    wanted = dense(case, inputs)
    kept, ignored = (int(mask.nonzero()[0]) for mask in (inputs["labels"][1] >= 0, inputs["labels"][2] < 0))
    inputs["x"][2, ignored, 0] = value
    arguments = make_arguments(case, inputs)
    check(simulator.run("pairwise_embedding_loss", arguments), wanted, case.tolerance)
    inputs["x"][1, kept, 0] = value
    found = simulator.run("pairwise_embedding_loss", make_arguments(case, inputs))
    counts = inputs["labels"][1] >= 0
    assert found["loss"].isnan()
    assert torch.equal(found["costs"][1].isnan(), counts)
    assert torch.equal(found["grad_x"][1].isnan(), counts.unsqueeze(1).expand(-1, case.channels))
    assert torch.equal(found["grad_weights"][1].isnan(), counts)
    for image in (0, 2):
        assert torch.allclose(found["grad_x"][image].double(), wanted["grad_x"][image], rtol=0, atol=1e-6)


@pytest.mark.parametrize("tensor_cores", [False, True])
@pytest.mark.parametrize("length", [0.0, 1e-20, 1e30])
def test_lengths(length: float, tensor_cores: bool) -> None:
    """Zeros have similarity 1/2 to all and a gradient; norms over- or underflow nowhere."""
    case = replace(SMALL, tensor_cores=tensor_cores, normalize="thesis")
    inputs = make_inputs(case)
    inputs["x"][0, :3] *= length
    found = simulator.run("pairwise_embedding_loss", make_arguments(case, inputs))
    wanted = dense(case, inputs)
    norms = inputs["x"].double().norm(dim=-1, keepdim=True).clamp(min=1e-12)
    for gradients in (found, wanted):
        gradients["grad_x"] = gradients["grad_x"].double() * norms
    check(found, wanted, case.tolerance)


@pytest.mark.parametrize("tensor_cores", [False, True])
def test_any_order(tensor_cores: bool) -> None:
    """Points that are not sorted give the same; places and segments out of range are ignored."""
    case = replace(SMALL, tensor_cores=tensor_cores, points=150)
    inputs = make_inputs(case)
    arguments = make_arguments(case, inputs)
    shuffled = torch.randperm(150, generator=torch.Generator().manual_seed(2))
    order, segments = sort_points(inputs["labels"])
    order, segments = order[:, shuffled], segments[:, shuffled]
    arguments |= {"order": order, "segments": segments}
    found = simulator.run("pairwise_embedding_loss", arguments)
    check(found, dense(case, inputs), case.tolerance)
    for wrong in (-1, 150, -(2**63), 2**63 - 1, 2**32):
        order[0, wrong % 149] = segments[0, wrong % 131] = wrong
    inputs["labels"][0, [place for place in range(150) if place not in order]] = -1
    for place, segment in zip(order[0].tolist(), segments[0].tolist(), strict=True):
        if not 0 <= segment < 150 and 0 <= place < 150:
            inputs["labels"][0, place] = -1
    found = simulator.run("pairwise_embedding_loss", arguments)
    check(found, dense(case, inputs), case.tolerance)


def test_repeated_places() -> None:
    """A point that is named twice is read and written inside of the tensors."""
    arguments = make_arguments(SMALL, make_inputs(SMALL))
    arguments["order"] = torch.full((1, SMALL.points), SMALL.points - 1)
    found = simulator.run("pairwise_embedding_loss", arguments)
    assert found["loss"].isfinite()
