"""Comparisons of an op with its definition. They also serve to check an installation on a new machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from effops.testing._info import OpInfo, SampleInput


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors of an op's output."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def floating(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those that can have gradients."""
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def assert_close(
    actual: Tensor, expected: Tensor, tolerance: float, what: str = "result", smallest_scale: float = 0.0
) -> None:
    """Raises AssertionError unless shapes agree, the largest error is at most ``tolerance`` times the
    largest expected element, and the error's norm is at most half of that relative to the norm.

    Elements that are all smaller are measured against the smallest scale.
    """
    assert actual.shape == expected.shape, f"{what}: shape {[*actual.shape]}, expected {[*expected.shape]}"
    if not expected.is_floating_point():
        assert torch.equal(actual, expected), f"{what}: {actual} differs from {expected}"
        return
    if expected.numel() == 0:
        return
    expected = expected.double()
    error = (actual.double() - expected).abs()
    scale = expected.abs().max().clamp(min=smallest_scale)
    norm = expected.norm().clamp(min=smallest_scale * math.sqrt(expected.numel()))
    worst, error_norm = error.max(), error.norm()
    if not (worst <= tolerance * scale and error_norm <= tolerance / 2 * norm):  # NaN fails
        where = torch.nonzero(error == worst)[:1].tolist()
        raise AssertionError(
            f"{what}: largest error {worst:.3g} at {where}, {worst / scale:.3g} of the largest element "
            f"(tolerance {tolerance:g}); norm of the error {error_norm / norm:.3g} "
            f"(tolerance {tolerance / 2:g})"
        )


def in_float64(sample: SampleInput) -> SampleInput:
    """The sample with its (already rounded) floating-point tensors in float64."""
    return sample.map_floating(lambda tensor: tensor.double())


def forward(info: OpInfo, sample: SampleInput) -> list[Tensor]:
    """The outputs of the op."""
    return tensors_of(info.computed(info.op(*sample.args, **sample.kwargs)))


def expected_forward(info: OpInfo, sample: SampleInput) -> list[Tensor]:
    """The outputs of the reference, computed in float64."""
    exact = in_float64(sample)
    return tensors_of(info.computed(info.reference(*exact.args, **exact.kwargs)))


def grad_outputs(outputs: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """A random gradient for each floating-point output, exact in its dtype."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype).to(output.device)
        for output in floating(outputs)
    ]


def gradients(
    info: OpInfo, sample: SampleInput, output_gradients: Sequence[Tensor] | None = None
) -> dict[str, Tensor]:
    """The op's gradient for every differentiable tensor, by label. A missing one is an error."""
    return _gradients(info, info.op, sample, output_gradients, missing_is_zero=False)


def expected_gradients(
    info: OpInfo, sample: SampleInput, output_gradients: Sequence[Tensor] | None = None
) -> dict[str, Tensor]:
    """The same by autograd through the reference in float64."""
    if output_gradients is None:  # drawn for the outputs' dtypes
        output_gradients = grad_outputs(forward(info, sample))
    exact = [gradient.double() for gradient in output_gradients]
    return _gradients(info, info.reference, in_float64(sample), exact, missing_is_zero=True)


def _gradients(
    info: OpInfo,
    function: Any,
    sample: SampleInput,
    output_gradients: Sequence[Tensor] | None,
    missing_is_zero: bool,
) -> dict[str, Tensor]:
    sample = info.requiring_grad(sample)
    leaves = info.leaves(sample)
    outputs = floating(tensors_of(info.computed(function(*sample.args, **sample.kwargs))))
    found = torch.autograd.grad(
        outputs,
        list(leaves.values()),
        grad_outputs(outputs) if output_gradients is None else output_gradients,
        allow_unused=missing_is_zero,
        materialize_grads=missing_is_zero,
    )
    return dict(zip(leaves, found, strict=True))


def check_forward(info: OpInfo, sample: SampleInput) -> None:
    """Raises AssertionError unless the op agrees with its reference."""
    expected = expected_forward(info, sample)
    for i, (actual, wanted) in enumerate(zip(forward(info, sample), expected, strict=True)):
        tolerance = info.tolerance(actual.dtype, sample).forward
        what = f"{info.name}[{sample.name}], output {i}"
        assert_close(actual, wanted, tolerance, what, info.smallest_scale)


def check_gradients(info: OpInfo, sample: SampleInput) -> None:
    """Raises AssertionError unless the op's gradients agree with those through the reference."""
    leaves = info.leaves(sample)
    expected = expected_gradients(info, sample)
    for label, gradient in gradients(info, sample).items():
        what = f"{info.name}[{sample.name}], gradient of {label}"
        assert gradient.dtype == leaves[label].dtype, f"{what}: dtype {gradient.dtype}"
        assert gradient.device == leaves[label].device, f"{what}: device {gradient.device}"
        tolerance = info.tolerance(gradient.dtype, sample).gradient
        assert_close(gradient, expected[label], tolerance, what, info.smallest_scale)


def check_all(info: OpInfo, device: str = "cpu") -> int:
    """Checks forward and gradients on all samples and dtypes; returns the number of samples."""
    count = 0
    for dtype in info.dtypes:
        for sample in info.samples(device, dtype):
            check_forward(info, sample)
            if info.differentiable:
                check_gradients(info, sample)
            count += 1
    return count
