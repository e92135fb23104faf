"""The CUDA kernels of roi_align, run in the host simulator, against the reference."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import simulator
import torch
from torch import Tensor

from effops import reference

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
TOLERANCE = {F32: 2e-5, F64: 1e-12, BF16: 8e-3, F16: 2e-3}  # relative to the largest element
SIZES = ((6, 9), (3, 4))
STRIDES = (2.0, 5.0)


@dataclass(frozen=True)
class Case:
    """One shape and one set of options."""

    dtype: torch.dtype
    channels: int
    rois: int
    output_size: tuple[int, int] = (2, 3)
    sampling_ratio: int = 2
    aligned: bool = True
    channels_last: bool = False
    half_rois: bool = False


def make_maps(case: Case) -> list[Tensor]:
    generator = torch.Generator().manual_seed(case.channels)
    maps = []
    for height, width in SIZES:
        feature = torch.randn(2, case.channels, height, width, generator=generator, dtype=F64).to(case.dtype)
        layout = torch.channels_last if case.channels_last else torch.contiguous_format
        maps.append(feature.contiguous(memory_format=layout))
    return maps


def make_boxes(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(case.rois)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(case.rois, 2, generator=generator, dtype=F64)

    centre, half = uniform(0, 18), uniform(-1, 9)  # some are inverted
    image = torch.randint(2, (case.rois, 1), generator=generator).double()
    rois = torch.cat([image, centre - half, centre + half], dim=1)
    rois[3::13, 1] = torch.nan
    rois[4::13, 3:] = torch.inf
    rois[5::13, 1:] = torch.tensor([-1e30, -1e30, 1e30, 1e30], dtype=F64)
    rois = rois.to(case.dtype if case.half_rois or case.dtype == F64 else F32)
    return {"rois": rois, "level": torch.randint(2, (case.rois,), generator=generator)}


def expected(
    case: Case, maps: list[Tensor], boxes: dict[str, Tensor], grad_output: Tensor
) -> dict[str, Tensor]:
    compute = F64 if case.dtype == F64 else F32  # the border rule jumps: positions are those of the kernels
    leaves = [feature.to(compute).requires_grad_() for feature in maps]
    rois, options = boxes["rois"].to(compute), (case.output_size, case.sampling_ratio, case.aligned)
    output = reference.roi_align(leaves, rois, boxes["level"], *options, strides=STRIDES)
    gradients = torch.autograd.grad(output, leaves, grad_output.to(compute))
    return {"output": output.detach()} | {f"grad_map{i}": gradient for i, gradient in enumerate(gradients)}


def run(
    case: Case, maps: list[Tensor], boxes: dict[str, Tensor], grad_output: Tensor
) -> list[simulator.Results]:
    height, width = case.output_size
    named = {f"map{i}": feature for i, feature in enumerate(maps)}
    options = {
        "height": height,
        "width": width,
        "sampling_ratio": case.sampling_ratio,
        "aligned": case.aligned,
    }
    strides = torch.tensor(STRIDES, dtype=F64)
    arguments = {**named, **boxes, **options, "strides": strides, "grad_output": grad_output}
    return simulator.run_all("roi_align", {**arguments, "channels_last": case.channels_last})


def check(case: Case, results: list[simulator.Results], wanted: dict[str, Tensor]) -> None:
    def assert_close(name: str, found: Tensor, reference_result: Tensor) -> None:
        limit = TOLERANCE[case.dtype] * max(1.0, float(reference_result.abs().max()))
        assert torch.allclose(found.double(), reference_result.double(), rtol=0, atol=limit), name

    for result in results:
        assert_close("output", result["output"], wanted["output"])
        for i in range(len(SIZES)):
            deterministic = result[f"deterministic_grad_map{i}"]
            assert_close("atomics", result[f"grad_map{i}"], wanted[f"grad_map{i}"])
            assert_close("deterministic", deterministic, wanted[f"grad_map{i}"])
            assert torch.equal(deterministic, results[0][f"deterministic_grad_map{i}"])


CASES = (
    Case(F32, 1, 14),
    Case(F32, 5, 6, sampling_ratio=0, aligned=False),
    Case(F32, 9, 7, (1, 1), sampling_ratio=0),
    Case(F32, 33, 3, (3, 3), sampling_ratio=1, channels_last=True),
    Case(F32, 16, 4, (9, 8), sampling_ratio=1, channels_last=True),  # more bins than a tile has
    Case(F64, 3, 7),
    Case(F64, 34, 2, channels_last=True, sampling_ratio=3),
    Case(BF16, 8, 5, half_rois=True),
    Case(F16, 17, 4, channels_last=True),
)


def random_gradient(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    shape = (case.rois, case.channels, *case.output_size)
    return torch.randn(shape, generator=generator, dtype=F64).to(case.dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels(case: Case) -> None:
    maps, boxes, gradient = make_maps(case), make_boxes(case), random_gradient(case)
    check(case, run(case, maps, boxes, gradient), expected(case, maps, boxes, gradient))


def test_ids_out_of_range_are_skipped() -> None:
    """They read nothing, give 0 and pass on no gradient."""
    outside = ((-1.0, 0), (2.0, 0), (float("nan"), 0), (float("inf"), 1), (0.0, -1), (0.0, 2), (1.0, 2**40))
    case = Case(F32, 2, 6 + len(outside))
    maps, boxes, gradient = make_maps(case), make_boxes(case), random_gradient(case)
    good = {name: tensor[:6] for name, tensor in boxes.items()}
    wanted = expected(case, maps, good, gradient[:6])
    wanted["output"] = torch.cat([wanted["output"], torch.zeros(len(outside), 2, *case.output_size)])
    for r, (image, level) in enumerate(outside, 6):
        boxes["rois"][r] = torch.tensor([image, 1.0, 1.0, 6.0, 6.0])
        boxes["level"][r] = level
    check(case, run(case, maps, boxes, gradient), wanted)
