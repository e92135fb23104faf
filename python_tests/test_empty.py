"""Empty inputs: right shapes, zeros, and gradients that are tensors."""

import pytest
from helpers import assert_bit_equal

from effops.testing import check_forward, check_gradients
from effops.testing._check import expected_forward, expected_gradients, forward, gradients

pytestmark = pytest.mark.kinds("empty")


def test_output(info, sample):
    for actual, wanted in zip(forward(info, sample), expected_forward(info, sample), strict=True):
        assert_bit_equal(actual.double(), wanted.double())


@pytest.mark.ops("differentiable")
def test_every_input_gets_a_gradient(info, sample):
    expected = expected_gradients(info, sample)
    found = gradients(info, sample)  # raises if one is missing
    for label, leaf in info.leaves(sample).items():
        assert (found[label].shape, found[label].dtype) == (leaf.shape, leaf.dtype)
        assert_bit_equal(found[label].double(), expected[label])


def test_every_size_can_be_zero(info, device):
    """One at a time, from the sizes of the typical sample."""
    for name, sizes in info.size_ranges.items():
        if 0 not in sizes:
            continue
        sample = info.build_sample({**info.typical, name: 0}, device)
        check_forward(info, sample)
        if info.differentiable:
            check_gradients(info, sample)
