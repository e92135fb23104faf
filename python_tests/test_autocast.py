"""Autocast: value-like inputs become half precision, coordinates stay float32, float64 stays as it is."""

import pytest
import torch
from helpers import assert_bit_equal, base_name

from effops.testing import check_forward
from effops.testing._check import forward, gradients, tensors_of

pytestmark = pytest.mark.ops("autocast")
HALF = (torch.float16, torch.bfloat16)
both_halves = pytest.mark.parametrize("half", HALF, ids=["to_float16", "to_bfloat16"])


def cast(info, sample, half, float32_rule=torch.float32):
    """What autocast must make of the sample, by the rules in the op's entry."""
    changes = {}
    for label, tensor in info.tensors(sample).items():
        rule = info.autocast.get(base_name(label))
        if rule == "cast" and tensor.dtype in (torch.float32, *HALF):
            changes[label] = tensor.to(half)
        elif rule == "float32" and tensor.dtype in (torch.float32, *HALF):
            changes[label] = tensor.to(float32_rule)
    return info.replaced(sample, changes)


@both_halves
@pytest.mark.dtypes(torch.float32, *HALF)
def test_inputs_are_cast_by_their_rules(info, device, dtype, half):
    sample = info.build_sample(info.typical, device, dtype)
    expected = cast(info, sample, half)
    with torch.autocast(device, half):
        outputs = forward(info, sample)
        native = tensors_of(info.native_computed(info.torch_op(*info.native(sample))))
    for actual, through_torch, wanted in zip(outputs, native, forward(info, expected), strict=True):
        assert_bit_equal(actual, wanted)
        assert_bit_equal(through_torch, wanted)
    check_forward(info, expected)


@both_halves
def test_coordinates_keep_their_precision(info, device, half):
    """The sample tells: with half-precision coordinates the result would differ. Labels do not."""
    if "float32" not in info.autocast.values():
        return
    sample = info.build_sample(info.typical, device)
    with torch.autocast(device, half):
        outputs = forward(info, sample)
    if not any(output.is_floating_point() for output in outputs):
        return
    wrong = forward(info, cast(info, cast(info, sample, half, half), half, torch.float32))
    assert not all(torch.equal(a, b) for a, b in zip(outputs, wrong, strict=True))


@both_halves
def test_float64_is_never_cast(info, device, half):
    sample = info.build_sample(info.typical, device, torch.float64)
    with torch.autocast(device, half):
        outputs = forward(info, sample)
    for actual, wanted in zip(outputs, forward(info, sample), strict=True):
        assert_bit_equal(actual, wanted)


@both_halves
@pytest.mark.ops("differentiable")
def test_gradients(info, device, half):
    """Those of the cast inputs, in the dtypes of the original ones."""
    sample = info.build_sample(info.typical, device)
    with torch.autocast(device, half):
        found = gradients(info, sample)
    expected = gradients(info, cast(info, sample, half))
    for label, leaf in info.leaves(sample).items():
        assert found[label].dtype == leaf.dtype
        assert_bit_equal(found[label], expected[label].to(leaf.dtype), label)


def test_disabled_inside(info, device):
    sample = info.build_sample(info.typical, device)
    with torch.autocast(device, torch.bfloat16), torch.autocast(device, enabled=False):
        outputs = forward(info, sample)
    for actual, wanted in zip(outputs, forward(info, sample), strict=True):
        assert_bit_equal(actual, wanted)
