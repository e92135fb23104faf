"""torch.compile: one graph for all sizes, gradients included; Inductor on the smallest sample."""

import pytest
import torch
from helpers import assert_same_results, results
from torch._dynamo.testing import CompileCounterWithBackend

from effops.testing._check import floating, forward, gradients

pytestmark = pytest.mark.compile


class Compiled:
    """An op's entry with the public function compiled; counts the graphs."""

    def __init__(self, info, backend="aot_eager", dynamic=True):
        self.counter = CompileCounterWithBackend(backend)
        self.op = torch.compile(info.op, backend=self.counter, fullgraph=True, dynamic=dynamic)
        self._info = info

    def __getattr__(self, name):
        return getattr(self._info, name)


def ordinary_samples(info, device):
    return [sample for sample in info.samples(device) if sample.kind == "ordinary"]


def assert_made_at_once(graphs):
    """No call but the first made a graph; that traces twice what has a float argument, a default included."""
    assert graphs[0] in (1, 2)
    assert graphs[-1] == graphs[0]


def test_changing_sizes_share_a_graph(info, device):
    compiled, graphs = Compiled(info), []
    for sample in ordinary_samples(info, device):
        assert_same_results(info, forward(compiled, sample), forward(info, sample), info.tolerances)
        graphs.append(compiled.counter.frame_count)
    assert_made_at_once(graphs)


@pytest.mark.ops("differentiable")
def test_changing_sizes_share_a_graph_with_gradients(info, device):
    compiled, graphs = Compiled(info), []
    for sample in ordinary_samples(info, device):
        assert_same_results(info, gradients(compiled, sample), gradients(info, sample), info.tolerances)
        graphs.append(compiled.counter.frame_count)
    assert_made_at_once(graphs)


@pytest.mark.ops("dynamic")
def test_marked_dimensions_are_not_specialised(info, device):
    """mark_dynamic raises where a fake kernel or a check fixes the size."""
    compiled = Compiled(info, dynamic=None)
    for sample in ordinary_samples(info, device):
        for label, tensor in info.tensors(sample).items():
            for dim in info.dynamic.get(label, {}):
                torch._dynamo.mark_dynamic(tensor, dim)
        assert_same_results(info, forward(compiled, sample), forward(info, sample), info.tolerances)
    assert compiled.counter.frame_count == 1


def test_every_form_of_the_arguments(info, device):
    """Lists, None, other dtypes: one sample of each combination of types, with sizes that vary."""
    forms = {}
    for sample in info.samples(device):
        leaves = torch.utils._pytree.tree_leaves((sample.args, dict(sample.kwargs)))
        form = tuple(leaf.dtype if isinstance(leaf, torch.Tensor) else type(leaf) for leaf in leaves)
        forms.setdefault(form, sample)
    for sample in forms.values():
        torch._dynamo.reset()  # there is a limit to the graphs of one function
        assert_same_results(info, results(Compiled(info), sample), results(info, sample), info.tolerances)


@pytest.mark.ops("differentiable")
def test_gradients_only_where_needed(info, device):
    sample = info.build_sample(info.typical, device)
    label, leaf = next(iter(info.leaves(sample).items()))
    sample = info.replaced(sample, {label: leaf.detach().requires_grad_()})
    compiled = Compiled(info)
    sum(output.sum() for output in floating(forward(compiled, sample))).backward()
    found = info.leaves(sample)[label].grad
    incoming = [torch.ones_like(output) for output in floating(forward(info, sample))]
    expected = gradients(info, sample, incoming)
    assert_same_results(info, [found], [expected[label]], info.tolerances)
    assert all(leaf.grad is None for other, leaf in info.leaves(sample).items() if other != label)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")  # Inductor's imports
def test_inductor(info, device):
    """Beside pointwise code, which Inductor fuses around the op; forward and gradients."""
    sample = info.build_sample(info.smallest, device)

    class Scaled(Compiled):
        def __init__(self):
            super().__init__(info)
            self.op = torch.compile(lambda *args, **kw: scale(info.op(*args, **kw)), fullgraph=True)

    def scale(output):
        return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: 2 * t, output)

    actual, expected = results(Scaled(), sample), results(info, sample)
    assert_same_results(info, actual, [2 * tensor for tensor in expected], info.tolerances)
