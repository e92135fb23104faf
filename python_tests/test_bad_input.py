"""Wrong inputs raise a typed error that names the op and the argument, and never crash the process."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from effops.testing._check import forward, grad_outputs


def native_or_raw(info, error_input):
    """Arguments for the torch op; as they are where the public function's conversions fail."""
    try:
        return info.native(error_input)
    except (RuntimeError, TypeError, ValueError):
        return error_input.args


def test_there_are_enough(info):
    names = [error.name for error in info.error_inputs()]
    assert len(names) == len(set(names)), "names of error inputs must differ"
    assert len(names) >= 20
    assert all(error.match.startswith(f"^{info.name}: expected ") for error in info.error_inputs())


def test_public_function(info, device, error_input):
    with pytest.raises(error_input.error, match=error_input.match):
        info.op(*error_input.args, **error_input.kwargs)


@pytest.mark.ops("differentiable")
def test_public_function_with_gradients(info, device, error_input):
    """The same through the autograd kernel."""
    args = tree_map_only(
        torch.Tensor,
        lambda t: t.detach().requires_grad_() if t.dtype == torch.float32 else t,
        error_input.args,
    )
    with pytest.raises(error_input.error, match=error_input.match):
        info.op(*args, **error_input.kwargs)


def test_torch_op(info, device, error_input):
    # The kernel for meta tensors is Python; everything else is refused by C++ or by torch's schema check.
    errors = RuntimeError if error_input.on_one_device else (ValueError, TypeError)
    args = native_or_raw(info, error_input) if error_input.native else error_input.args
    with pytest.raises(errors, match=info.name):
        info.torch_op(*args)


@pytest.mark.ops("differentiable")
@pytest.mark.errors("seen_by_backward")
def test_backward_op(info, device, error_input):
    """Backward ops can be called too, with whatever comes along."""
    good = info.build_sample(info.typical, device)
    incoming = grad_outputs(forward(info, good))
    args = native_or_raw(info, error_input)
    with pytest.raises(RuntimeError, match=info.name):
        info.backward_op(*info.backward_args(incoming, args))


@pytest.mark.ops("differentiable")
def test_backward_op_refuses_a_wrong_gradient(info, device):
    sample = info.build_sample(info.typical, device)
    native = info.native(sample)
    first, *others = grad_outputs(forward(info, sample))
    wrong = [first[None], first.double(), first.half(), first.long()]
    if first.dim() > 0:
        wrong += [first[0], torch.cat([first, first]), first[..., :-1], first[:, :0], first.flatten()]
    for gradient in wrong:
        with pytest.raises(RuntimeError, match=rf"{info.name}_backward: expected grad"):
            info.backward_op(*info.backward_args([gradient, *others], native))


@pytest.mark.same_native  # none
@pytest.mark.errors("seen_by_fake_kernel")
def test_fake_kernel(info, device, error_input):
    """What fails by metadata alone fails while tracing, with the same error."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        args, kwargs = tree_map_only(
            torch.Tensor, mode.from_tensor, (error_input.args, dict(error_input.kwargs))
        )
        with pytest.raises(error_input.error, match=error_input.match):
            info.op(*args, **kwargs)


@pytest.mark.compile
def test_under_compile(info, device):
    """Three of the errors that a size can cause, raised while Dynamo traces."""
    compiled = torch.compile(info.op, backend="eager", fullgraph=True)
    errors = [
        error
        for error in info.error_inputs(device)
        if error.error is ValueError and error.seen_by_fake_kernel
    ]
    for error in errors[:: len(errors) // 3][:3]:
        with pytest.raises(Exception, match=error.match.removeprefix("^")):
            compiled(*error.args, **error.kwargs)
        torch._dynamo.reset()


def test_the_op_works_after_errors(info, device):
    sample = info.build_sample(info.typical, device)
    before = forward(info, sample)
    for error in info.error_inputs(device):
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            info.torch_op(*error.args, **error.kwargs)
    for output, again in zip(before, forward(info, sample), strict=True):
        assert torch.equal(output, again)


def nonsense(tensor, generator):
    """About half of the integers replaced, with ends of ranges and what wraps around to small numbers."""
    numbers = (-(2**63), -(2**32), -1, 0, 1, 2, 3, 4, 7, 2**24, 2**31, 2**32 + 1, 2**62, 2**63 - 1)
    limits = torch.iinfo(tensor.dtype)
    fitting = torch.tensor([n for n in numbers if limits.min <= n <= limits.max], dtype=tensor.dtype)
    picks = fitting[torch.randint(len(fitting), tensor.shape, generator=generator)]
    keep = torch.rand(tensor.shape, generator=generator) < 0.5
    return torch.where(keep.to(tensor.device), tensor, picks.to(tensor.device))


def finite_or_message(info, sample):
    """Whether the outputs are finite, or the message of the ValueError."""
    try:
        outputs = forward(info, sample)
    except ValueError as error:
        return str(error)
    return all(bool(output.isfinite().all()) for output in outputs if output.is_floating_point())


def test_random_metadata_never_crashes(info, device):
    """Integer tensors of nonsense: the op returns finite numbers or refuses."""
    sample = info.build_sample(info.typical, device)
    tensors = info.tensors(sample).items()
    integers = {
        label: tensor
        for label, tensor in tensors
        if not tensor.is_floating_point() and tensor.dtype != torch.bool
    }
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        changes = {label: nonsense(tensor, generator) for label, tensor in integers.items()}
        result = finite_or_message(info, info.replaced(sample, changes))
        assert result is True or result.startswith(f"{info.name}: expected ")
