"""torch.export with dynamic sizes, saved and loaded; AOTInductor on the smallest sample."""

import dataclasses
import io

import pytest
import torch
from helpers import DEVICES, assert_same_results
from torch.export import Dim
from torch.utils._pytree import tree_map

from effops.testing import OP_DB
from effops.testing._check import forward, tensors_of

pytestmark = pytest.mark.compile


class Call(torch.nn.Module):
    """The public function as a module of :func:`arguments`; other arguments by name are its settings."""

    def __init__(self, info, sample):
        super().__init__()
        self.op = info.op
        tensors = named_tensors(sample)
        self.settings = {name: value for name, value in sample.kwargs.items() if name not in tensors}

    def forward(self, named, *args):
        return self.op(*args, **named, **self.settings)


class Calls(torch.nn.ModuleList):
    """Several of them, side by side."""

    def forward(self, *inputs):
        return [call(*args) for call, args in zip(self, inputs, strict=True)]


def named_tensors(sample):
    return {name: value for name, value in sample.kwargs.items() if tensors_of(value)}


def arguments(sample):
    """The tensors given by name, and the positional arguments."""
    return named_tensors(sample), *sample.args


class Spec:
    """Dynamic dimensions of one tensor; being no container, a leaf of the arguments' structure."""

    def __init__(self, dims):
        self.dims = dims


def dynamic_shapes(info, sample):
    """For torch.export: the entry's named dimensions in the structure of the arguments."""
    dims = {name: Dim(name) for sizes in info.dynamic.values() for name in sizes.values()}
    specs = {
        label: Spec({dim: dims[name] for dim, name in sizes.items()}) for label, sizes in info.dynamic.items()
    }
    marked = info.replaced(sample, specs)
    named = {name: marked.kwargs[name] for name in named_tensors(sample)}
    return tree_map(
        dims_of, {"named": named, "args": marked.args}, is_leaf=lambda value: dataclasses.is_dataclass(value)
    )


def dims_of(value):
    """Of a leaf; torch.export takes a list for a dataclass."""
    if dataclasses.is_dataclass(value):
        return [dims_of(getattr(value, part.name)) for part in dataclasses.fields(value)]
    return value.dims if isinstance(value, Spec) else None


def ordinary_samples(info):
    return [sample for sample in info.samples() if sample.kind == "ordinary"]


@pytest.mark.ops("dynamic")
@pytest.mark.devices("cpu")
def test_export_with_dynamic_sizes(info, device):
    first, *others = ordinary_samples(info)
    program = torch.export.export(
        Call(info, first),
        arguments(first),
        dynamic_shapes=dynamic_shapes(info, first),
        strict=False,
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for module in (program.module(), torch.export.load(file).module()):
        for sample in (first, *others):
            outputs = tensors_of(info.computed(module(*arguments(sample))))
            assert_same_results(info, outputs, forward(info, sample), info.tolerances)


@pytest.mark.ops("dynamic")
@pytest.mark.devices("cpu")
def test_exported_program_holds_the_op(info, device):
    """Not its decomposition, and nothing but conversions of the arguments beside it."""
    sample = ordinary_samples(info)[0]
    program = torch.export.export(Call(info, sample), arguments(sample), strict=True)
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called.count(info.torch_op) == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")  # Inductor's imports
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")  # torch's own use of it
@pytest.mark.parametrize("device", DEVICES)
def test_aot_inductor(device, tmp_path):
    """One program that calls every op: g++ takes as long for one op as for all."""
    samples = [info.build_sample(info.smallest, device) for info in OP_DB]
    model = Calls(Call(info, sample) for info, sample in zip(OP_DB, samples, strict=True))
    inputs = tuple(arguments(sample) for sample in samples)
    path = torch._inductor.aoti_compile_and_package(
        torch.export.export(model, inputs),
        package_path=str(tmp_path / "ops.pt2"),
        inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},
    )
    outputs = torch._inductor.aoti_load_package(path)(*inputs)
    for info, sample, output in zip(OP_DB, samples, outputs, strict=True):
        found = tensors_of(info.computed(output))
        assert_same_results(info, found, forward(info, sample), info.tolerances)
