"""Checks of operators that torch ships: schema, autograd registration, fake kernel, tracing."""

import pytest
import torch
from helpers import backward_calls
from torch.library import opcheck

from effops.testing._check import forward, grad_outputs

# The kernels are called as in test_reference.py and test_gradients.py, at ten times the price.
pytestmark = pytest.mark.same_native
CHEAP = ("test_schema", "test_autograd_registration", "test_faketensor")
FLOAT32 = pytest.mark.dtypes(torch.float32)
FULL_AND_HALF = pytest.mark.dtypes(torch.float32, torch.bfloat16)


def tracing_checks(info):
    static = () if info.data_dependent_shape else ("test_aot_dispatch_static",)
    return (*static, "test_aot_dispatch_dynamic")


def leaves_require_grad(info, sample):
    return info.native(info.requiring_grad(sample))


@FULL_AND_HALF
def test_forward(info, sample):
    opcheck(info.torch_op, info.native(sample), test_utils=CHEAP)


@FULL_AND_HALF
@pytest.mark.ops("differentiable")
def test_forward_with_gradients(info, sample):
    opcheck(info.torch_op, leaves_require_grad(info, sample), test_utils=CHEAP)


@FULL_AND_HALF
@pytest.mark.ops("differentiable")
@pytest.mark.kinds("ordinary", "empty")
def test_backward(info, sample):
    """As autograd calls it, for each set of inputs that need gradients."""
    for _, args in backward_calls(info, sample):
        opcheck(info.backward_op, args, test_utils=CHEAP)


@FLOAT32
@pytest.mark.ops("differentiable")
@pytest.mark.kinds("ordinary")
def test_backward_under_autograd(info, sample):
    """Inputs of the backward op need gradients when it is differentiated again."""
    args = info.backward_args(grad_outputs(forward(info, sample)), leaves_require_grad(info, sample))
    opcheck(info.backward_op, args, test_utils=CHEAP)


@pytest.mark.compile
@FLOAT32
@pytest.mark.kinds("ordinary")
def test_tracing(info, sample):
    opcheck(info.torch_op, info.native(sample), test_utils=tracing_checks(info))


@pytest.mark.compile
@FLOAT32
@pytest.mark.ops("differentiable")
@pytest.mark.kinds("ordinary", "empty")
def test_tracing_with_gradients(info, sample):
    """Of the dtype, tracing knows what the fake kernels say, which the checks above compare in both."""
    opcheck(info.torch_op, leaves_require_grad(info, sample), test_utils=tracing_checks(info))


@pytest.mark.compile
@FLOAT32
@pytest.mark.ops("differentiable")
@pytest.mark.kinds("ordinary")
def test_tracing_backward(info, sample):
    *_, (_, args) = backward_calls(info, sample)
    opcheck(info.backward_op, args, test_utils=tracing_checks(info))
