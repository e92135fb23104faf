"""Gradients: finite differences, the reference's autograd, who gets one, and no second derivatives."""

import pytest
import torch
from helpers import assert_bit_equal, base_name, random_like, subsets

from effops.testing import assert_close, check_gradients
from effops.testing._check import forward, grad_outputs, gradients, tensors_of

pytestmark = pytest.mark.ops("differentiable")
MOST_ELEMENTS = 1500  # of the inputs of gradcheck, which calls the op twice for each


def floating_outputs(output):
    return [tensor for tensor in tensors_of(output) if tensor.is_floating_point()]


@pytest.mark.same_native  # thousands of calls that differ in one number: test_gradients_agree_with_reference
@pytest.mark.dtypes(torch.float64)
@pytest.mark.kinds("ordinary", "awkward", "empty")
def test_gradcheck(info, sample):
    leaves = info.leaves(sample)
    if not sample.smooth or sum(leaf.numel() for leaf in leaves.values()) > MOST_ELEMENTS:
        check_gradients(info, sample)
        return

    def function(*tensors):
        changed = info.replaced(sample, dict(zip(leaves, tensors, strict=True)))
        return tuple(floating_outputs(info.op(*changed.args, **changed.kwargs)))

    inputs = [leaf.clone().requires_grad_() for leaf in leaves.values()]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=False, check_batched_grad=True)


def test_gradients_agree_with_reference(info, sample):
    check_gradients(info, sample)


def test_gradients_only_for_inputs_that_need_them(info, device, dtype):
    sample = info.build_sample(info.typical, device, dtype)
    wanted = gradients(info, sample)
    for needed in subsets(info.leaves(sample)):
        leaves = {label: info.leaves(sample)[label].detach().requires_grad_() for label in needed}
        partial = info.replaced(sample, leaves)
        outputs = floating_outputs(info.op(*partial.args, **partial.kwargs))
        torch.autograd.backward(outputs, grad_outputs(outputs))
        for label, tensor in info.leaves(partial).items():
            if label in needed:
                assert_bit_equal(tensor.grad, wanted[label], f"{label} when {needed} need gradients")
            else:
                assert tensor.grad is None


def test_no_graph_without_need(info, device):
    sample = info.build_sample(info.typical, device)
    assert not any(output.requires_grad for output in forward(info, sample))
    needy = info.requiring_grad(sample)
    with torch.no_grad():
        assert not any(output.requires_grad for output in forward(info, needy))
    with torch.inference_mode():
        assert not any(output.requires_grad for output in forward(info, needy))
    assert all(output.requires_grad for output in floating_outputs(forward(info, needy)))


def test_gradients_accumulate(info, device):
    sample = info.requiring_grad(info.build_sample(info.typical, device, torch.float64))
    for _ in range(2):
        outputs = floating_outputs(forward(info, sample))
        torch.autograd.backward(outputs, grad_outputs(outputs))
    once = gradients(info, sample)
    for label, leaf in info.leaves(sample).items():
        assert_close(leaf.grad, 2 * once[label], 1e-12, label)


@pytest.mark.dtypes(torch.float64)
@pytest.mark.kinds("ordinary", "awkward")
def test_linear_arguments_are_linear_and_adjoint(info, sample):
    """<A x, y> = <x, A^T y>, and A (2 x + z) = 2 A x + A z."""
    for label, x in info.leaves(sample).items():
        if base_name(label) not in info.linear_in or x.dtype != torch.float64:
            continue

        def apply(tensor, label=label):
            changed = info.replaced(sample, {label: tensor})
            return floating_outputs(info.op(*changed.args, **changed.kwargs))[: info.linear_outputs]

        z = random_like(x, 1)
        for both, of_x, of_z in zip(apply(2 * x + z), apply(x), apply(z), strict=True):
            assert_close(both, 2 * of_x + of_z, 1e-11, f"linearity in {label}")
        x = x.detach().requires_grad_()
        outputs = apply(x)
        y = grad_outputs(outputs, seed=2)
        (adjoint,) = torch.autograd.grad(outputs, x, y)
        products = [(output * gradient).sum() for output, gradient in zip(outputs, y, strict=True)]
        forward_product, adjoint_product = sum(products).detach(), (x * adjoint).sum().detach()
        size = sum(product.abs() for product in products) + x.norm() * adjoint.norm()
        assert abs(forward_product - adjoint_product) <= 1e-12 * size


@pytest.mark.parametrize("through", ["public", "torch_op"])
def test_second_derivatives_are_refused(info, device, through):
    sample = info.requiring_grad(info.build_sample(info.typical, device, torch.float64))
    leaves = info.leaves(sample)

    def call():
        if through == "public":
            return floating_outputs(info.op(*sample.args, **sample.kwargs))
        return floating_outputs(info.native_computed(info.torch_op(*info.native(sample))))

    refusal = rf"^{info.name}: second derivatives are not supported"
    for of, leaf in leaves.items():
        outputs = call()
        y = [gradient.requires_grad_() for gradient in grad_outputs(outputs)]
        (first,) = torch.autograd.grad(outputs, leaf, y, create_graph=True)
        assert first.requires_grad, f"the gradient of {of} is silently constant"
        constant = {label for label in leaves if base_name(label) in info.constant_gradients}
        for target in (*y, *(leaves[label] for label in leaves if label not in constant)):
            with pytest.raises(RuntimeError, match=refusal):
                torch.autograd.grad((first**2).sum(), target, retain_graph=True)
        for label in constant:  # the true zeros
            found = torch.autograd.grad((first**2).sum(), leaves[label], retain_graph=True, allow_unused=True)
            assert found == (None,)


def test_second_derivatives_are_refused_in_a_penalty(info, device):
    """The usual way to meet them: a gradient penalty beside the loss."""
    sample = info.requiring_grad(info.build_sample(info.typical, device))
    leaves = list(info.leaves(sample).values())
    loss = sum(output.sum() for output in floating_outputs(forward(info, sample)))
    penalty = sum((g**2).sum() for g in torch.autograd.grad(loss, leaves, create_graph=True))
    if not info.has_second_derivatives:  # the gradients are constants
        assert not penalty.requires_grad
        return
    with pytest.raises(RuntimeError, match=rf"^{info.name}: second derivatives are not supported"):
        (loss + penalty).backward()
