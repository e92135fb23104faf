"""The CUDA kernels of filter_flow, run in the host simulator, against the reference in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import simulator
import torch
from torch import Tensor

from effops import reference

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
QUADS, PIXELS, DIRECT = 0, 1, 2
NORMALIZE = ("softmax", "none", "sum")
PADDING = ("zeros", "replicate", "reflect", "renormalize")
# Relative to the largest element.
TOLERANCE = {F64: 1e-12, F32: 2e-5, BF16: 1e-2, F16: 2e-3}


class Case(NamedTuple):
    engine: int
    dtype: torch.dtype  # of the filters
    normalize: str
    padding: str
    kernel: int
    channels: int
    sides: tuple[int, int, int]  # batch, height, width
    groups: int = 1
    stride: int = 1
    upsample: int = 1
    dilation: int = 1
    image: torch.dtype | None = None  # its dtype, if another
    flow: bool = False
    channels_last: bool = False
    scale: float = 2.0  # of the filters


CASES = {
    "quads": Case(QUADS, F32, "softmax", "zeros", 5, 3, (1, 19, 72), flow=True, scale=9.0),
    "quads_even": Case(QUADS, F32, "sum", "replicate", 4, 2, (2, 9, 8), image=F16, channels_last=True),
    "quads_reflect": Case(QUADS, F32, "none", "reflect", 9, 2, (1, 3, 4), groups=2),
    "quads_inside": Case(QUADS, F32, "softmax", "renormalize", 3, 1, (1, 12, 132)),
    "quads_half": Case(QUADS, BF16, "softmax", "renormalize", 6, 3, (1, 10, 68), flow=True),
    "quads_mixed": Case(QUADS, BF16, "none", "zeros", 1, 4, (1, 3, 4), image=F32, flow=True),
    "quads_flow": Case(QUADS, F32, "softmax", "zeros", 3, 0, (1, 5, 8), flow=True),
    "quads_runs": Case(QUADS, F32, "softmax", "zeros", 3, 11, (1, 4, 8), flow=True, channels_last=True),
    "pixels": Case(PIXELS, F64, "softmax", "zeros", 3, 3, (1, 10, 37), flow=True, scale=9.0),
    "pixels_dilated": Case(PIXELS, F64, "sum", "reflect", 9, 2, (1, 7, 5), dilation=3, flow=True),
    "pixels_strided": Case(
        PIXELS, F64, "none", "renormalize", 4, 6, (1, 9, 11), stride=2, groups=2, flow=True
    ),
    "pixels_upsampled": Case(PIXELS, F64, "softmax", "replicate", 3, 2, (1, 3, 5), upsample=3),
    "pixels_runs": Case(PIXELS, F64, "softmax", "zeros", 3, 9, (1, 4, 5), stride=3, channels_last=True),
    "pixels_even_runs": Case(PIXELS, F64, "sum", "replicate", 2, 10, (1, 3, 4), upsample=2),
    "pixels_flow": Case(PIXELS, F64, "sum", "zeros", 2, 0, (1, 3, 5), flow=True),
    "direct": Case(DIRECT, F64, "softmax", "renormalize", 5, 3, (2, 4, 7), dilation=2, flow=True),
    "direct_reflect": Case(DIRECT, F64, "none", "reflect", 3, 5, (1, 4, 1), dilation=1000, upsample=2),
    "direct_replicate": Case(DIRECT, F64, "sum", "replicate", 4, 5, (1, 6, 7), stride=2, dilation=2),
    "direct_zeros": Case(DIRECT, F64, "sum", "zeros", 3, 1, (1, 3, 3), dilation=2, flow=True),
}


def random(generator: torch.Generator, dtype: torch.dtype, *sizes: int) -> Tensor:
    return torch.randn(sizes, generator=generator, dtype=F64).to(dtype)


class Inputs:
    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(case.kernel)
        batch, height, width = case.sides
        out = [-(-side * case.upsample // case.stride) for side in (height, width)]
        self.case = case
        self.sums = F64 if case.dtype == F64 else F32
        image_dtype = case.image or case.dtype
        self.image = random(generator, image_dtype, batch, case.channels, height, width)
        self.filters = random(generator, case.dtype, batch, case.groups * case.kernel**2, *out) * case.scale
        if case.normalize == "sum" or (case.normalize == "none" and case.padding == "renormalize"):
            self.filters = self.filters.abs() + 0.1
        self.grad_output = random(generator, image_dtype, batch, case.channels, *out)
        self.grad_flow = random(generator, self.sums, batch, 2 * case.groups, *out) if case.flow else None

    def simulate(self, **options: bool) -> simulator.Results:
        case = self.case
        arguments: dict[str, simulator.Argument] = {
            "image": self._in_format(self.image),
            "filters": self.filters,
            "grad_output": self._in_format(self.grad_output),
            "normalize": NORMALIZE.index(case.normalize),
            "padding_mode": PADDING.index(case.padding),
            "stride": case.stride,
            "upsample": case.upsample,
            "dilation": case.dilation,
            "groups": case.groups,
            "engine": case.engine,
            "channels_last": case.channels_last,
        }
        if self.grad_flow is not None:
            arguments["grad_flow"] = self._in_format(self.grad_flow)
        results = simulator.run_schedules("filter_flow", arguments, **options)
        if case.channels_last:
            for key in ("output", "flow", "grad_image", "folded_grad_image"):
                if key in results:
                    results[key] = results[key].permute(0, 3, 1, 2)
        return results

    def reference(self) -> dict[str, Tensor]:
        case = self.case
        image, filters = (x.double().requires_grad_() for x in (self.image, self.filters))
        output, flow = reference.filter_flow(
            image,
            filters,
            case.normalize,
            case.padding,
            True,
            stride=case.stride,
            upsample=case.upsample,
            dilation=case.dilation,
            groups=case.groups,
        )
        # The kernels begin with the output as it was rounded.
        results, grads = [output], [self.grad_output.double()]
        wanted = {"output": output.detach()}
        if self.grad_flow is not None:
            results.append(flow)
            grads.append(self.grad_flow.double())
            wanted["flow"] = flow.detach()
        found = torch.autograd.grad(results, (image, filters), grads)
        return wanted | dict(zip(("grad_image", "grad_filters"), found, strict=True))

    def _in_format(self, maps: Tensor) -> Tensor:
        if not self.case.channels_last:
            return maps
        return maps.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def check(found: simulator.Results, wanted: dict[str, Tensor], tolerance: float) -> None:
    wanted = wanted | {"folded_grad_image": wanted["grad_image"]}
    assert {"output", "grad_image"} <= found.keys() or {"output", "folded_grad_image"} <= found.keys()
    for key in wanted.keys() & found.keys():
        value, got = wanted[key], found[key].double()
        finite = value[value.isfinite()].abs()
        limit = tolerance * max(1.0, float(finite.max()) if finite.numel() else 0.0)
        assert torch.allclose(got, value, rtol=0, atol=limit, equal_nan=True), key


def tolerance_of(inputs: Inputs) -> float:
    return max(TOLERANCE[inputs.image.dtype], TOLERANCE[inputs.filters.dtype])


@pytest.mark.parametrize("name", CASES)
def test_kernels(name: str) -> None:
    inputs = Inputs(CASES[name])
    check(inputs.simulate(), inputs.reference(), tolerance_of(inputs))


NONFINITE = {
    # Weights that meet nothing outside the image: what they are reaches no pixel.
    "quads": Case(QUADS, F32, "none", "zeros", 5, 3, (1, 8, 8)),
    "quads_left_out": Case(QUADS, BF16, "softmax", "renormalize", 4, 2, (1, 5, 8), flow=True),
    "pixels": Case(PIXELS, F64, "none", "zeros", 3, 2, (1, 6, 5)),
    "pixels_left_out": Case(PIXELS, F64, "sum", "renormalize", 3, 5, (1, 3, 3), stride=2, flow=True),
    "direct": Case(DIRECT, F64, "none", "renormalize", 3, 2, (1, 4, 5), dilation=2, flow=True),
}


def outside(case: Case) -> Tensor:
    """Which taps lie outside the image: [1, K * K, Ho, Wo]."""
    taps = (torch.arange(case.kernel) - case.kernel // 2) * case.dilation
    rows, columns = (torch.arange(0, side, case.stride) + taps[:, None] for side in case.sides[1:])
    is_row, is_column = (
        (at < 0) | (at >= side) for at, side in zip((rows, columns), case.sides[1:], strict=True)
    )
    return (is_row[:, None, :, None] | is_column[None, :, None, :]).flatten(0, 1)[None]


@pytest.mark.parametrize("name", NONFINITE)
def test_padding_is_not_multiplied(name: str) -> None:
    case = NONFINITE[name]
    inputs = Inputs(case)
    inputs.filters[outside(case).expand_as(inputs.filters)] = torch.nan
    wanted = inputs.reference()
    assert wanted["output"].isfinite().all()
    check(inputs.simulate(), wanted, tolerance_of(inputs))

    # Nor are infinite gradients multiplied with it. (Where weights are normalised they reach all of them.)
    if case.padding != "zeros":
        return
    inputs.grad_output[..., 0, 0] = torch.inf
    found, grad = inputs.simulate()["grad_filters"], inputs.reference()["grad_filters"]
    assert torch.equal(found.isnan(), grad.isnan())


@pytest.mark.parametrize(("engine", "dtype"), [(QUADS, F32), (DIRECT, F64)])
def test_infinite_logits(engine: int, dtype: torch.dtype) -> None:
    inputs = Inputs(Case(engine, dtype, "softmax", "replicate", 3, 2, (1, 4, 8), flow=True))
    inputs.filters[:, ::2] = -torch.inf  # weights of 0
    inputs.filters[..., 0, 0] = -torch.inf  # nothing but these: NaN
    inputs.filters[:, 4, 3, 5] = torch.inf  # NaN
    inputs.filters[:, 5, 2, 2] = torch.nan
    inputs.filters[:, 7, 1, 6] = 1e30
    check(inputs.simulate(), inputs.reference(), tolerance_of(inputs))
