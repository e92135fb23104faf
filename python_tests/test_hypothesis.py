"""Random shapes, strides, dtypes and values. HYPOTHESIS_PROFILE=nightly runs 1000 examples of each."""

import math

import pytest
from helpers import assert_same_pattern, base_name, poisoned
from hypothesis import assume, given
from hypothesis import strategies as st

from effops.testing import LAYOUTS, check_forward, check_gradients
from effops.testing._check import expected_forward, expected_gradients, forward, gradients
from effops.testing._layouts import STRIDE_ZERO


def sizes_of(info):
    ranges = {name: st.integers(sizes[0], sizes[-1]) for name, sizes in info.size_ranges.items()}
    return st.fixed_dictionaries(ranges)


def draw_sample(data, info, device, dtypes):
    """A sample of random sizes and dtype, each of its tensors in a random layout."""
    sizes = data.draw(sizes_of(info), "sizes")
    dtype = data.draw(st.sampled_from(dtypes), "dtype")
    sample = info.build_sample(sizes, device, dtype, data.draw(st.integers(0, 2**31), "seed"))
    changes = {}
    for label, tensor in info.tensors(sample).items():
        layouts = [name for name in LAYOUTS if name not in STRIDE_ZERO or tensor.is_floating_point()]
        layout = data.draw(st.sampled_from(["contiguous", *layouts]), f"layout of {label}")
        changes[label] = tensor if layout == "contiguous" else LAYOUTS[layout](tensor)
    return info.replaced(sample, changes)


@given(data=st.data())
def test_agrees_with_reference(info, device, data):
    sample = draw_sample(data, info, device, info.dtypes)
    check_forward(info, sample)
    if info.differentiable:
        check_gradients(info, sample)


@pytest.mark.ops("has_floating_data")
@given(data=st.data())
def test_special_numbers(info, device, data):
    """NaN, Inf or one huge number in one of the inputs."""
    sample = draw_sample(data, info, device, [dtype for dtype in info.dtypes if dtype.is_floating_point])
    tensors = {label: t for label, t in info.tensors(sample).items() if t.is_floating_point()}
    label = data.draw(st.sampled_from(list(tensors)), "input")
    number = data.draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e30, -1e30, 0.0, -0.0]), "number")
    assume(number not in info.untried.get(base_name(label), ()))
    share = data.draw(st.sampled_from([0.0, 0.2, 1.0]), "share") if abs(number) != 1e30 else 0.0
    columns = info.coordinates.get(base_name(label), slice(None))
    bad = info.replaced(sample, {label: poisoned(tensors[label].contiguous(), number, 0, columns, share)})
    for actual, wanted in zip(forward(info, bad), expected_forward(info, bad), strict=True):
        assert_same_pattern(info, actual, wanted)
    if info.differentiable:
        expected = expected_gradients(info, bad)
        for other, gradient in gradients(info, bad).items():
            assert_same_pattern(info, gradient, expected[other], f"gradient of {other}")
