"""Any strides: values and gradients are those of contiguous inputs; inputs stay as they are."""

import pytest
import torch
from helpers import assert_same_results, has_promised_layout, results

from effops.testing import LAYOUTS
from effops.testing._check import forward, grad_outputs, gradients
from effops.testing._layouts import STRIDE_ZERO

HALF_OR_FULL = pytest.mark.dtypes(torch.float32, torch.float64, torch.bfloat16)


def contiguous(sample):
    """The same numbers in memory of their own, without gaps."""
    return sample.map(lambda t: t.detach().resolve_neg().clone(memory_format=torch.contiguous_format))


def changed_tensors(info, sample, layout):
    """The sample with one of its tensors in the layout, for each of them."""
    for label, tensor in info.tensors(sample).items():
        if layout not in STRIDE_ZERO or tensor.is_floating_point():
            yield info.replaced(sample, {label: LAYOUTS[layout](tensor)})


def bytes_of(tensor):
    """All of the tensor's storage, gaps included."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage()).clone()


@HALF_OR_FULL
@pytest.mark.kinds("strided")
def test_all_inputs_in_a_layout(info, sample):
    assert_same_results(info, results(info, sample), results(info, contiguous(sample)), info.tolerances)


@HALF_OR_FULL
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_input_in_a_layout(info, device, dtype, layout):
    for sizes in (info.typical, *info.other_paths):
        base = info.build_sample(sizes, device, dtype)
        for sample in changed_tensors(info, base, layout):
            actual, expected = results(info, sample), results(info, contiguous(sample))
            assert_same_results(info, actual, expected, info.tolerances)


@HALF_OR_FULL
@pytest.mark.ops("differentiable")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_the_output_in_a_layout(info, device, dtype, layout):
    for sizes in (info.typical, *info.other_paths):
        sample = info.build_sample(sizes, device, dtype)
        incoming = [LAYOUTS[layout](gradient) for gradient in grad_outputs(forward(info, sample))]
        dense = [g.resolve_neg().clone(memory_format=torch.contiguous_format) for g in incoming]
        actual, expected = gradients(info, sample, incoming), gradients(info, sample, dense)
        assert_same_results(info, actual, expected, info.tolerances, "gradient")


@pytest.mark.kinds("ordinary", "strided", "empty")
@pytest.mark.dtypes(torch.float32)
def test_inputs_stay_as_they_are(info, sample):
    sample = info.requiring_grad(sample) if info.differentiable else sample
    tensors = info.tensors(sample)
    before = {label: (bytes_of(tensor), tensor._version) for label, tensor in tensors.items()}
    outputs = forward(info, sample)
    if info.differentiable:
        wanted = [output for output in outputs if output.requires_grad]
        torch.autograd.grad(wanted, list(info.leaves(sample).values()), grad_outputs(wanted))
    for label, tensor in tensors.items():
        data, version = before[label]
        assert torch.equal(bytes_of(tensor), data), f"{label} was written to"
        assert tensor._version == version, label


@pytest.mark.dtypes(torch.float32)
def test_results_are_new_and_have_the_promised_layout(info, sample):
    """Outputs and gradients share memory neither with the inputs nor with each other."""
    incoming = grad_outputs(forward(info, sample))
    inputs = [*info.tensors(sample).values(), *incoming]
    made = forward(info, sample)
    assert all(has_promised_layout(info, sample, output) for output in made)
    if info.differentiable:
        found = gradients(info, sample, incoming)
        for label in (info.keeps_channels_last, *info.own_formats):
            assert label not in found or has_promised_layout(info, sample, found[label], label), label
        made += found.values()
    used = {tensor.untyped_storage().data_ptr() for tensor in inputs if tensor.numel() > 0}
    for tensor in made:
        if tensor.numel() > 0:
            storage = tensor.untyped_storage().data_ptr()
            assert storage not in used
            used.add(storage)
