"""Both ways in which effops/ops/_autograd.py makes an op differentiable: the guard, and torch's own way."""

import itertools

import pytest
import torch
from helpers import assert_ran, run_python
from torch.library import opcheck

from effops.ops import _autograd

WAYS = {"guard": True, "register_autograd": False}
_library = torch.library.Library("effops", "FRAGMENT")
_ops = {}


def make_op(way):
    """A scratch op a * b * factor (b may be None: a * factor), differentiable in the given way."""
    if way in _ops:
        return _ops[way]
    name = f"scratch_{way}"
    _library.define(f"{name}(Tensor a, Tensor? b, float factor) -> Tensor")
    _library.define(f"{name}_backward(Tensor grad, Tensor a, Tensor? b, float factor) -> (Tensor, Tensor)")
    op, backward_op = (getattr(torch.ops.effops, n).default for n in (name, f"{name}_backward"))

    def forward(a, b, factor):
        return a * factor if b is None else a * b * factor

    def backward(grad, a, b, factor):
        return forward(grad, b, factor), grad.new_empty(0) if b is None else forward(grad, a, factor)

    for key in ("CPU", "Meta"):
        _library.impl(name, forward, key)
        _library.impl(f"{name}_backward", backward, key)

    def save(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])
        ctx.factor = inputs[2]

    def gradients(ctx, grad):
        found = backward_op(grad, *ctx.saved_tensors, ctx.factor)
        needs = ctx.needs_input_grad
        return found[0] if needs[0] else None, found[1] if needs[1] else None, None

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_autograd.install.__kwdefaults__, "use_guard", WAYS[way])
        _autograd.install(name, save, gradients, differentiable=(0, 1))
        _autograd.refuse_second_derivatives(name, differentiable=(0, 1, 2))
    _ops[way] = op, name
    return _ops[way]


@pytest.fixture(params=WAYS)
def scratch(request):
    return make_op(request.param)


def inputs(needs=(True, True)):
    return tuple(
        torch.linspace(1, 2, 6, dtype=torch.float64).add(i).requires_grad_(need)
        for i, need in enumerate(needs)
    )


def test_both_ways_are_there():
    assert hasattr(torch._C, "_AutoDispatchBelowAutograd"), "the guard is gone: check its replacement"
    assert make_op("guard")[0] is not make_op("register_autograd")[0]


def test_gradcheck(scratch):
    op, _ = scratch
    assert torch.autograd.gradcheck(lambda a, b: op(a, b, 3.0), inputs())
    assert torch.autograd.gradcheck(lambda a: op(a, None, 3.0), inputs()[:1])


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=2)), ids=str)
def test_gradients_only_where_needed(scratch, needs):
    op, _ = scratch
    a, b = inputs(needs)
    output = op(a, b, 3.0)
    assert output.requires_grad == any(needs)
    assert torch.equal(output, a * b * 3)
    if any(needs):
        output.sum().backward()
    for tensor, other, need in ((a, b, needs[0]), (b, a, needs[1])):
        assert (tensor.grad is not None) == need
        assert not need or torch.equal(tensor.grad, 3 * other)


def test_an_optional_input(scratch):
    op, _ = scratch
    (a, _) = inputs()
    op(a, None, 3.0).sum().backward()
    assert torch.equal(a.grad, torch.full_like(a, 3))


def test_modes_without_gradients(scratch):
    op, _ = scratch
    a, b = inputs()
    with torch.no_grad():
        assert not op(a, b, 3.0).requires_grad
    with torch.inference_mode():
        assert op(a, b, 3.0).is_inference()
    assert op(a, b, 3.0).requires_grad


def test_arguments_by_name(scratch):
    op, _ = scratch
    a, b = inputs()
    op(factor=3.0, b=b, a=a).sum().backward()
    assert torch.equal(b.grad, 3 * a)


def test_second_derivatives_are_refused(scratch):
    op, name = scratch
    a, b = inputs()
    (first,) = torch.autograd.grad(op(a, b, 3.0).sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match=rf"^{name}: second derivatives are not supported"):
        first.sum().backward()


def test_inputs_are_held_no_longer_than_the_graph(scratch):
    """save_for_backward, not attributes: changing an input in place is noticed."""
    op, _ = scratch
    a, b = inputs()
    middle = a * 1
    output = op(middle, b, 3.0)
    middle.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.compile
def test_opcheck(scratch):
    op, _ = scratch
    opcheck(op, (*inputs(), 3.0))
    opcheck(op, (*inputs((False, True)), 3.0))


@pytest.mark.compile
def test_compiled(scratch):
    op, _ = scratch
    a, b = inputs()
    torch.compile(lambda a, b: op(a, b, 3.0) + 1, backend="aot_eager", fullgraph=True)(a, b).sum().backward()
    assert torch.equal(a.grad, 3 * b)


WITHOUT_GUARD = """
import torch
guard = torch._C._AutoDispatchBelowAutograd
del torch._C._AutoDispatchBelowAutograd
import effops
torch._C._AutoDispatchBelowAutograd = guard  # torch itself needs it
from effops.ops import _autograd
from effops.testing import OP_DB, check_all
from effops.testing._check import floating, forward
assert _autograd.install.__kwdefaults__["use_guard"] is False
torch.set_num_threads(1)
for info in OP_DB:
    check_all(info)
    if not info.has_second_derivatives:
        continue
    sample = info.requiring_grad(info.build_sample(info.typical))
    leaves = list(info.leaves(sample).values())
    loss = sum(output.sum() for output in floating(forward(info, sample)))
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    try:
        sum((g ** 2).sum() for g in first).backward()
    except RuntimeError as error:
        assert str(error).startswith(f"{info.name}: second derivatives are not supported"), error
    else:
        raise AssertionError("second derivatives were not refused")
"""


@pytest.mark.same_native
def test_all_ops_without_the_guard():
    """As on a torch that does not have it."""
    assert_ran(run_python(WITHOUT_GUARD))
