"""vmap agrees with a loop, forward and backward, without torch's slow fallback."""

import pytest
import torch
from helpers import backward_calls, subsets
from torch.utils._pytree import tree_flatten, tree_leaves, tree_structure, tree_unflatten

from effops.testing import assert_close
from effops.testing._check import floating, forward, grad_outputs, tensors_of

pytestmark = pytest.mark.ops("vmap_batched")
MEMBERS = 3


@pytest.fixture(autouse=True)
def _no_fallback():
    """The fallback (a loop, with a warning) is an error."""
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


def batched_tensors(info, sample):
    return info.tensors(sample, info.vmap_batched)


def vmapped(info, sample, in_dims):
    """The op over the given dimension of each tensor in `in_dims` (by label); the others are shared."""
    labels = list(in_dims)

    def function(*tensors):
        changed = info.replaced(sample, dict(zip(labels, tensors, strict=True)))
        return info.op(*changed.args, **changed.kwargs)

    return torch.vmap(function, in_dims=tuple(in_dims.values()))


def run_and_compare(info, device, in_dims, dtype=None):
    dtype = dtype or info.exact_dtype
    members = [info.build_sample(info.typical, device, dtype, seed) for seed in range(MEMBERS)]
    base = members[0]
    stacked = [
        torch.stack([info.tensors(member)[label] for member in members], dim)
        for label, dim in in_dims.items()
    ]
    found = tensors_of(vmapped(info, base, in_dims)(*stacked))
    for k, member in enumerate(members):
        of_member = {label: info.tensors(member)[label] for label in in_dims}
        for actual, wanted in zip(found, forward(info, info.replaced(base, of_member)), strict=True):
            assert_close(actual[k], wanted, info.tolerance(actual.dtype).forward, f"member {k}, {in_dims}")


def test_every_choice_of_batched_inputs(info, device):
    labels = batched_tensors(info, info.build_sample(info.typical, device))
    for chosen in subsets(labels):
        run_and_compare(info, device, dict.fromkeys(chosen, 0))


def test_every_dimension(info, device):
    tensors = batched_tensors(info, info.build_sample(info.typical, device))
    for label, tensor in tensors.items():
        for dim in range(-1, tensor.dim() + 1):
            run_and_compare(info, device, {label: dim})
    run_and_compare(info, device, {label: i % (t.dim() + 1) for i, (label, t) in enumerate(tensors.items())})


@pytest.mark.dtypes(torch.float32, torch.bfloat16)
def test_dtypes(info, device, dtype):
    labels = batched_tensors(info, info.build_sample(info.typical, device))
    run_and_compare(info, device, dict.fromkeys(labels, 0), dtype)


def test_nested(info, device):
    dtype = info.exact_dtype
    base = info.build_sample(info.typical, device, dtype)
    labels = list(batched_tensors(info, base))
    grid = [[info.build_sample(info.typical, device, dtype, 2 * i + j) for j in (0, 1)] for i in (0, 1)]
    stacked = [
        torch.stack([torch.stack([info.tensors(member)[label] for member in row]) for row in grid])
        for label in labels
    ]
    found = tensors_of(torch.vmap(vmapped(info, base, dict.fromkeys(labels, 0)))(*stacked))
    for i, row in enumerate(grid):
        for j, member in enumerate(row):
            same = {label: info.tensors(member)[label] for label in labels}
            for actual, wanted in zip(found, forward(info, info.replaced(base, same)), strict=True):
                assert_close(actual[i, j], wanted, 1e-12)


@pytest.mark.ops("differentiable")
def test_gradients_through_vmap(info, device):
    """Backward of a vmapped op: members that share an input add to its gradient."""
    members = [info.build_sample(info.typical, device, torch.float64, seed) for seed in range(MEMBERS)]
    base = members[0]
    for batched in subsets(info.leaves(base)):
        stacks = [torch.stack([info.tensors(member)[label] for member in members]) for label in batched]
        stacks = [stack.requires_grad_() for stack in stacks]
        shared = {
            label: leaf.detach().requires_grad_()
            for label, leaf in info.leaves(base).items()
            if label not in batched
        }
        sample = info.replaced(base, shared)
        outputs = floating(tensors_of(vmapped(info, sample, dict.fromkeys(batched, 0))(*stacks)))
        incoming = grad_outputs(outputs)
        inputs = [*stacks, *shared.values()]
        found = torch.autograd.grad(outputs, inputs, incoming)
        looped = []
        for k in range(MEMBERS):
            member = {label: stack[k] for label, stack in zip(batched, stacks, strict=True)}
            looped.append(floating(forward(info, info.replaced(sample, member))))
        expected = torch.autograd.grad(
            [torch.stack(output) for output in zip(*looped, strict=True)], inputs, incoming
        )
        for actual, wanted in zip(found, expected, strict=True):
            assert_close(actual, wanted, 1e-12, f"batched {batched}")


def vmap_some(function, args, batched):
    """The function over the first dimension of the tensors at the given places of the flattened arguments."""
    flat, structure = tree_flatten(args)

    def call(*tensors):
        leaves = list(flat)
        for place, tensor in zip(batched, tensors, strict=True):
            leaves[place] = tensor
        return function(*tree_unflatten(leaves, structure))

    return torch.vmap(call)


@pytest.mark.ops("differentiable")
def test_backward_op(info, device):
    """Its own rule, with the gradient of the output batched, the saved inputs, and both."""
    members = [info.build_sample(info.typical, device, torch.float64, seed) for seed in range(MEMBERS)]
    for calls in zip(*(backward_calls(info, member) for member in members), strict=True):
        flats = [tree_leaves(args) for _, args in calls]
        floating = [
            i for i, v in enumerate(flats[0]) if isinstance(v, torch.Tensor) and v.is_floating_point()
        ]
        for batched in (floating[:1], floating[1:], floating, floating[:2]):
            stacked = [torch.stack([flat[i] for flat in flats]) for i in batched]
            found = tensors_of(vmap_some(info.backward_op, calls[0][1], batched)(*stacked))
            for k, flat in enumerate(flats):
                leaves = [flat[i] if i in batched else value for i, value in enumerate(flats[0])]
                args = tree_unflatten(leaves, tree_structure(calls[0][1]))
                for actual, wanted in zip(found, tensors_of(info.backward_op(*args)), strict=True):
                    assert_close(actual[k], wanted, 1e-12, f"{calls[0][0]} needed, {batched} batched")


@pytest.mark.ops("differentiable")
def test_batched_gradients(info, device):
    """Several gradients of the output at once, for each set of inputs (torch's older vmap)."""
    sample = info.requiring_grad(info.build_sample(info.typical, device, torch.float64))
    leaves = info.leaves(sample)
    for labels in subsets(leaves):
        inputs = [leaves[label] for label in labels]
        outputs = floating(forward(info, sample))
        several = [grad_outputs(outputs, seed) for seed in range(MEMBERS)]
        stacked = [torch.stack(gradients) for gradients in zip(*several, strict=True)]
        found = torch.autograd.grad(outputs, inputs, stacked, is_grads_batched=True, retain_graph=True)
        for k, incoming in enumerate(several):
            expected = torch.autograd.grad(outputs, inputs, incoming, retain_graph=True)
            for actual, wanted in zip(found, expected, strict=True):
                assert_close(actual[k], wanted, 1e-12)


@pytest.mark.ops("vmap_shared")
def test_what_must_be_shared_is_refused(info, device):
    sample = info.build_sample(info.typical, device)
    for label, tensor in info.tensors(sample, info.vmap_shared).items():
        stacked = torch.stack([tensor] * MEMBERS)
        with pytest.raises(ValueError, match=rf"^{info.name}: expected {label} to be shared by all of vmap"):
            vmapped(info, sample, {label: 0})(stacked)
