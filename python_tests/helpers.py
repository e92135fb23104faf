"""What several property tests share."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from effops import _load
from effops.testing import assert_close
from effops.testing._check import forward, grad_outputs, gradients

REPOSITORY = Path(__file__).resolve().parent.parent
HAS_CUDA = torch.cuda.is_available() and _load.cuda_missing_reason is None
DEVICES = ("cpu", "cuda") if HAS_CUDA else ("cpu",)


def base_name(label):
    """The argument that a label belongs to: pyramid[1] -> pyramid."""
    return label.split("[")[0]


def has_promised_layout(info, sample, result, label=""):
    """Of an output, or of the gradient of the argument: contiguous, or channels_last where that is kept."""
    source = info.tensors(sample).get(label or info.keeps_channels_last)
    keeps = source is not None and label in ("", info.keeps_channels_last, *info.own_formats)
    if keeps and not source.is_contiguous() and source.is_contiguous(memory_format=torch.channels_last):
        return result.is_contiguous(memory_format=torch.channels_last)
    return result.is_contiguous()


def subsets(items, smallest=1):
    """All subsets with at least `smallest` members."""
    items = list(items)
    counts = range(smallest, len(items) + 1)
    return [subset for count in counts for subset in itertools.combinations(items, count)]


def assert_bit_equal(actual, expected, what="result"):
    """Same numbers to the last bit; NaN equals NaN."""
    assert actual.dtype == expected.dtype, what
    assert actual.shape == expected.shape, what
    same = (actual == expected) | ((actual != actual) & (expected != expected))
    assert bool(same.all()), f"{what}: {int((~same).sum())} of {same.numel()} elements differ"


def assert_same_results(info, actual, expected, tolerances, kind="forward"):
    """Lists or dicts of tensors that agree within the tolerance of their dtype."""
    pairs = zip(_values(actual), _values(expected), strict=True)
    for i, (a, e) in enumerate(pairs):
        assert a.dtype == e.dtype
        tolerance = getattr(tolerances[a.dtype], kind) if a.is_floating_point() else 0.0
        assert_close(a, e, tolerance, f"{info.name}, {kind} {i}", info.smallest_scale)


def results(info, sample):
    """Outputs, then gradients (of differentiable ops) in the order of the arguments."""
    outputs = forward(info, sample)
    return outputs + (list(gradients(info, sample).values()) if info.differentiable else [])


class RecordCalls(TorchDispatchMode):
    """Keeps the arguments of every call of a torch op."""

    def __init__(self, op):
        super().__init__()
        self.op = op
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is self.op:
            self.calls.append(tree_map_only(torch.Tensor, torch.Tensor.detach, args))
        return func(*args, **(kwargs or {}))


def backward_calls(info, sample):
    """What autograd calls the backward op with, for each set of inputs that need gradients."""
    for needed in subsets(info.leaves(sample)):
        leaves = {label: info.leaves(sample)[label].detach().requires_grad_() for label in needed}
        outputs = [output for output in forward(info, info.replaced(sample, leaves)) if output.requires_grad]
        with RecordCalls(info.backward_op) as record:
            torch.autograd.grad(outputs, list(leaves.values()), grad_outputs(outputs))
        (call,) = record.calls
        yield needed, call


def run_python(code, **environment):
    """Runs code in a new interpreter with warnings as errors; returns the finished process."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=Path(__file__).parent,  # not the root, whose sources would hide an installed copy
        capture_output=True,
        text=True,
        timeout=300,
    )


def assert_ran(process):
    assert process.returncode == 0, process.stdout + process.stderr


def random_like(tensor, seed):
    """Normally distributed numbers of the tensor's shape and dtype."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return numbers.to(tensor.dtype).to(tensor.device)


def _values(tensors):
    return list(tensors.values() if isinstance(tensors, dict) else tensors)


def poisoned(tensor, number, seed, columns=slice(None), share=0.1):
    """The tensor with at least one element, and about the given share of them, set to the number.

    `columns` of the last dimension may be changed.
    """
    if tensor.dim() == 0 or tensor.numel() == 0:
        return tensor.clone()
    generator = torch.Generator().manual_seed(seed)
    result = tensor.clone()
    target = result[..., columns]
    hit = torch.rand(target.shape, generator=generator) < share
    if hit.numel() > 0 and not hit.any():
        hit.view(-1)[torch.randint(hit.numel(), (), generator=generator)] = True
    target[hit.to(tensor.device)] = number
    return result


def assert_same_pattern(info, actual, expected, what="result"):
    """The same elements are finite, and agree (huge ones in a scale of their own); signs of Inf agree.

    Integers are the same.

    Whether a sum that meets an Inf ends as Inf or as NaN depends on its order and may differ.
    """
    assert actual.shape == expected.shape, what
    if not expected.is_floating_point():
        assert torch.equal(actual, expected), what
        return
    tolerance = max(1e-2, info.tolerances[actual.dtype].gradient)
    actual, expected = actual.double(), expected.to(actual.dtype).double()  # overflows as the dtype does
    finite = expected.isfinite()
    wrong = finite != actual.isfinite()
    if bool(wrong.any()):
        got, wanted = actual[wrong][:3].tolist(), expected[wrong][:3].tolist()
        raise AssertionError(f"{what}: at {wrong.nonzero()[:3].tolist()} got {got}, expected {wanted}")
    infinite = actual.isinf() & expected.isinf()
    assert torch.equal(actual[infinite], expected[infinite]), f"{what}: signs of Inf differ"
    huge = finite & (expected.abs() > 1e15)
    for part in (huge, finite & ~huge):
        if bool(part.any()):
            scale = expected[part].abs().max().clamp(min=info.smallest_scale)
            worst = (actual[part] - expected[part]).abs().max()
            assert bool(worst <= tolerance * scale), (
                f"{what}: error {worst:.3g} among numbers up to {scale:.3g}"
            )
