"""Runs the property tests over ``effops.testing.OP_DB``.

A test is parametrised by its arguments: ``info`` (an op), ``device``, ``dtype``, ``sample`` (one of the op's
samples, by name) or ``error_input``. Marks narrow that down: ``ops("differentiable")``, ``kinds("empty")``,
``dtypes(torch.float64)``, ``devices("cpu")``, ``errors("native")``.
Ops on integers run in all of their dtypes.
"""

import functools
import logging
import os

import pytest
import torch
from helpers import DEVICES
from hypothesis import settings
from torch.utils._pytree import tree_leaves

from effops.testing import OP_DB

MARKS = (
    "compile: compiles graphs or C++ code (slow; left out of the sanitizer run)",
    "same_native: slow, and native code runs as in tests without this mark (left out of the sanitizer run)",
    "ops(field): only ops for which this field of OpInfo says something (of a file and of a test: both)",
    "kinds(*kinds): only samples of these kinds: ordinary, awkward, empty, strided",
    "dtypes(*dtypes): only these dtypes, where the op supports them (of ops on integers, all)",
    "devices(*devices): only these devices",
    "errors(field): only error inputs of which this property of ErrorInput holds",
)


def pytest_configure(config):
    for mark in MARKS:
        config.addinivalue_line("markers", mark)
    # Most inputs are too small for threads; tests that are about threads set their number themselves.
    torch.set_num_threads(1)
    # Otherwise thousands of lines stand beside every failure.
    logging.getLogger("torch.__trace").addFilter(lambda record: False)
    settings.register_profile("ci", max_examples=60, deadline=None, derandomize=True)
    settings.register_profile("nightly", max_examples=1000, deadline=None)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_generate_tests(metafunc):
    """Fans a test out over those of the names in ``_OPTIONS`` that it (or a fixture of it) takes."""
    names = [name for name in _OPTIONS if name in metafunc.fixturenames]
    if "info" not in names:
        return
    marks = list(metafunc.definition.iter_markers())
    marked = {mark.name: mark.args for mark in marks}
    marked["ops"] = tuple(field for mark in marks if mark.name == "ops" for field in mark.args)
    cases = [()]
    for name in names:
        cases = [(*case, value) for case in cases for value in _OPTIONS[name](marked, case)]
    ids = ["-".join(str(getattr(v, "name", v)).removeprefix("torch.") for v in case) for case in cases]
    metafunc.parametrize(names, cases, ids=ids)


def _ops(marked, _case):
    return [info for info in OP_DB if all(getattr(info, field) for field in marked["ops"])]


def _devices(marked, _case):
    return [device for device in DEVICES if device in marked.get("devices", DEVICES)]


def _dtypes(marked, case):
    supported = case[0].dtypes
    if not case[0].has_floating_data:
        return supported
    return [dtype for dtype in supported if dtype in marked.get("dtypes", supported)]


def _sample_names(marked, case):
    kinds = marked.get("kinds", ("ordinary", "awkward", "empty", "strided"))
    return [name for name, kind in case[0].sample_kinds.items() if kind in kinds]


def _error_names(marked, case):
    """Wrong values are skipped by CUDA kernels, for which the host never waits."""
    info, device = case[:2]
    (field,) = marked.get("errors", ("name",))
    errors = [error for error in info.error_inputs() if getattr(error, field)]
    return [error.name for error in errors if device == "cpu" or not error.needs_values]


_OPTIONS = {
    "info": _ops,
    "device": _devices,
    "dtype": _dtypes,
    "sample_name": _sample_names,
    "error_name": _error_names,
}


# Tests come in the order of their parameters, and drawing an op's samples takes longer than most tests.
@functools.lru_cache(maxsize=2)
def _samples(info, device, dtype):
    return {sample.name: sample for sample in info.samples(device, dtype)}


@functools.lru_cache(maxsize=2)
def _error_inputs(info, device):
    return {error.name: error for error in info.error_inputs(device)}


def _versions(case):
    tensors = tree_leaves((case.args, dict(case.kwargs)))
    return [tensor._version for tensor in tensors if isinstance(tensor, torch.Tensor)]


@pytest.fixture
def sample(info, device, dtype, sample_name):
    """One of the op's samples, which other tests get too."""
    sample = _samples(info, device, dtype)[sample_name]
    before = _versions(sample)
    yield sample
    assert _versions(sample) == before, "a test must not change its sample"


@pytest.fixture
def error_input(info, device, error_name):
    """One of the op's wrong inputs, which other tests get too."""
    return _error_inputs(info, device)[error_name]


@pytest.fixture
def threads():
    """Sets the number of threads; the old one comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _fresh_compiler(request):
    """Compilation tests neither see nor leave graphs of others.

    Those of an op whose result has a size that depends on the data set the option that it needs.
    """
    if request.node.get_closest_marker("compile") is None:
        yield
        return
    info = request.getfixturevalue("info") if "info" in request.fixturenames else None
    torch._dynamo.reset()
    with torch._dynamo.config.patch(
        capture_dynamic_output_shape_ops=info is not None and info.data_dependent_shape
    ):
        yield
    torch._dynamo.reset()
