"""NaN, Inf and huge numbers: what they reach is what they reach in the definition, no more and no less."""

import math

import pytest
import torch
from helpers import assert_same_pattern, base_name, poisoned

from effops.testing._check import expected_forward, expected_gradients, forward, grad_outputs, gradients

SPECIAL = {"nan": math.nan, "inf": math.inf, "minus_inf": -math.inf, "1e30": 1e30, "minus_1e30": -1e30}
special = pytest.mark.parametrize("number", SPECIAL.values(), ids=SPECIAL.keys())
SEEDS = range(4)


def share_of(number):
    """Of the elements that become special: one alone if it is finite, as two could cancel."""
    return 0.0 if math.isfinite(number) else 0.1


def floating_tensors(info, sample):
    return {label: tensor for label, tensor in info.tensors(sample).items() if tensor.is_floating_point()}


@special
@pytest.mark.ops("has_floating_data")
@pytest.mark.dtypes(torch.float32, torch.float64, torch.bfloat16)
def test_special_numbers_in_an_input(info, device, dtype, number):
    """In one input at a time, at random places."""
    for seed in SEEDS:
        sample = info.build_sample(info.typical, device, dtype, seed)
        for label, tensor in floating_tensors(info, sample).items():
            columns = info.coordinates.get(base_name(label), slice(None))
            bad = info.replaced(sample, {label: poisoned(tensor, number, seed, columns, share_of(number))})
            what = f"{number} in {label}, seed {seed}"
            for actual, wanted in zip(forward(info, bad), expected_forward(info, bad), strict=True):
                assert_same_pattern(info, actual, wanted, what)
            if info.differentiable:
                expected = expected_gradients(info, bad)
                for other, gradient in gradients(info, bad).items():
                    of = f"{what}: gradient of {other}"
                    assert_same_pattern(info, gradient, expected[other], of)


@special
@pytest.mark.ops("differentiable")
@pytest.mark.dtypes(torch.float32, torch.float64, torch.bfloat16)
def test_special_numbers_in_the_gradient_of_the_output(info, device, dtype, number):
    for seed in SEEDS:
        sample = info.build_sample(info.typical, device, dtype, seed)
        incoming = [
            poisoned(g, number, seed, share=share_of(number)) for g in grad_outputs(forward(info, sample))
        ]
        expected = expected_gradients(info, sample, incoming)
        for label, gradient in gradients(info, sample, incoming).items():
            what = f"{number}, seed {seed}: gradient of {label}"
            assert_same_pattern(info, gradient, expected[label], what)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "minus_inf"])
@pytest.mark.ops("has_floating_data")
@pytest.mark.kinds("awkward")
@pytest.mark.dtypes(torch.float32)
def test_special_numbers_in_awkward_samples(info, sample, number):
    """In every input at once, rarely. Sums may meet several of them."""
    changes = {}
    for seed, (label, tensor) in enumerate(floating_tensors(info, sample).items()):
        columns = info.coordinates.get(base_name(label), slice(None))
        changes[label] = poisoned(tensor, number, seed, columns, share=0.03)
    bad = info.replaced(sample, changes)
    for actual, wanted in zip(forward(info, bad), expected_forward(info, bad), strict=True):
        assert_same_pattern(info, actual, wanted, str(number))


@pytest.mark.ops("coordinates")
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "minus_inf"])
def test_points_without_coordinates_contribute_nothing(info, device, dtype, number):
    """All of them NaN or Inf: zeros, and gradients of zero, even beside values that are NaN."""
    sample = info.build_sample(info.typical, device, dtype)
    for label, tensor in info.tensors(sample, tuple(info.coordinates)).items():
        nowhere = tensor.clone()
        nowhere[..., info.coordinates[base_name(label)]] = number
        bad = info.replaced(sample, {label: nowhere})
        assert all(bool((output == 0).all()) for output in forward(info, bad))
        if info.differentiable:
            for other, gradient in gradients(info, bad).items():
                assert bool((gradient == 0).all()), other
        others = floating_tensors(info, bad)
        del others[label]
        worse = info.replaced(bad, {other: t.new_full(t.shape, math.nan) for other, t in others.items()})
        assert all(bool((output == 0).all()) for output in forward(info, worse))
