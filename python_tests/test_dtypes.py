"""Which dtypes an op takes, and how they mix."""

import pytest
import torch
from helpers import base_name, subsets

from effops.testing import check_forward, check_gradients
from effops.testing._check import forward, tensors_of

EVERY_DTYPE = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.complex128,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.bool,
)
HALF = (torch.float16, torch.bfloat16)


def test_supported_dtypes(info, device, dtype):
    """The floating-point outputs have the dtype of the values."""
    sample = info.build_sample(info.typical, device, dtype)
    outputs = forward(info, sample)
    expected = tensors_of(info.computed(info.reference(*sample.args, **sample.kwargs)))
    assert [output.dtype for output in outputs] == [output.dtype for output in expected]
    allowed = {dtype, torch.float32} if info.float32_results and dtype in HALF else {dtype}
    assert {output.dtype for output in outputs if output.is_floating_point()} <= allowed
    assert allowed & {output.dtype for output in outputs} or not info.differentiable


@pytest.mark.ops("differentiable")
def test_unsupported_dtypes(info, device):
    sample = info.build_sample(info.typical, device)
    for dtype in set(EVERY_DTYPE) - set(info.dtypes):
        changes = {label: leaf.to(dtype) for label, leaf in info.leaves(sample).items()}
        wrong = info.replaced(sample, changes)
        with pytest.raises(TypeError, match=rf"^{info.name}: expected \w+.* of dtype .*float32"):
            info.op(*wrong.args, **wrong.kwargs)
        with pytest.raises(RuntimeError, match=rf"^{info.name}: expected \w+.* of dtype .*float32"):
            info.torch_op(*info.native(wrong))


@pytest.mark.ops("float32_beside_half")
@pytest.mark.dtypes(*HALF)
def test_float32_beside_half(info, device, dtype):
    """Each set of inputs that may stay float32 does, and keeps its precision and its gradient's dtype."""
    sample = info.build_sample(info.typical, device, dtype)
    exact = info.tensors(info.build_sample(info.typical, device))
    labels = [label for label in info.tensors(sample) if base_name(label) in info.float32_beside_half]
    for chosen in subsets(labels):
        mixed = info.replaced(sample, {label: exact[label] for label in chosen})
        check_forward(info, mixed)
        if info.differentiable:
            check_gradients(info, mixed)


@pytest.mark.ops("has_floating_data")
@pytest.mark.dtypes(*HALF)
def test_sums_are_not_kept_in_half_precision(info, device, dtype):
    """The result is the exact one rounded once, which sums in half precision miss by far."""
    sample = info.build_sample(info.large[0], device, dtype)
    exact = info.build_sample(info.large[0], device, dtype).map_floating(lambda tensor: tensor.double())
    rounding = torch.finfo(dtype).eps / 2
    for output, wanted in zip(forward(info, sample), forward(info, exact), strict=True):
        if output.is_floating_point():
            error = (output.double() - wanted).norm() / wanted.norm()
            assert error <= 0.6 * rounding  # a uniform rounding error has 0.41 to 0.58 of the largest one
