"""Without CUDA kernels, CUDA tensors get a message that says why and what to do."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from effops import _load
from effops.ops._checks import check_backend

REASON = "effops was built without CUDA; install a wheel that has it"


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(_load, "cuda_missing_reason", REASON)


def fake(device):
    """A tensor that says it is on the device, which need not exist."""
    with FakeTensorMode():
        return torch.empty(2, device=device)


@pytest.mark.usefixtures("no_cuda")
def test_public_function(info):
    message = rf"^{info.name}: no CUDA kernels: {REASON}"
    sample = info.build_sample(info.typical)
    with FakeTensorMode():
        on_cuda = sample.map(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda"))
        with pytest.raises(RuntimeError, match=message):
            info.op(*on_cuda.args, **on_cuda.kwargs)


@pytest.mark.usefixtures("no_cuda")
def test_check_backend():
    with pytest.raises(RuntimeError, match=rf"^an_op: no CUDA kernels: {REASON}"):
        check_backend("an_op", fake("cuda"))
    check_backend("an_op", torch.empty(2))
    check_backend("an_op", torch.empty(2, device="meta"))


def test_check_backend_with_cuda(monkeypatch):
    monkeypatch.setattr(_load, "cuda_missing_reason", None)
    check_backend("an_op", fake("cuda"))


@pytest.mark.parametrize("device", ["xpu", "mps"])
def test_other_devices(device):
    with pytest.raises(RuntimeError, match=rf"^an_op: expected tensors on cpu or cuda, got {device}"):
        check_backend("an_op", fake(device))


def test_reason_of_this_installation():
    """Either there is a reason, or the library is there and torch has CUDA."""
    library = _load.library_dir / "libeffops_cuda.so"
    if torch.version.cuda is None:
        assert "was built without CUDA; install a CUDA build of torch" in _load.cuda_missing_reason
    elif library.exists():
        assert _load.cuda_missing_reason is None
    else:
        assert "effops was built without CUDA" in _load.cuda_missing_reason


def test_torch_without_cuda(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", None)
    reason = _load._load_cuda(tmp_path / "libeffops_cuda.so")
    assert reason == f"torch {torch.__version__} was built without CUDA; install a CUDA build of torch"


def test_library_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "effops was built without CUDA; install a wheel" in _load._load_cuda(
        tmp_path / "libeffops_cuda.so"
    )


def test_library_does_not_load(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    library = tmp_path / "libeffops_cuda.so"
    library.write_bytes(b"not a library")
    reason = _load._load_cuda(library)
    assert reason.startswith("libeffops_cuda.so did not load: ")
    assert "invalid ELF header" in reason or "file too short" in reason
