"""Making binary descriptors: pack_bits, unpack_bits, topk_pack and binnorm of [100000, 256] (ZippyPoint's
descriptors, 64 ones of 256)."""

from __future__ import annotations

import peers_hamming
import pytest
import torch
from torch import Tensor

import effops

_ROWS, _BITS, _ONES = 100_000, 256, 64
_BINNORM_ROWS = 10_000  # the peer needs 60 copies


def _logits(rows: int, device: str) -> Tensor:
    return torch.randn(rows, _BITS, generator=torch.Generator().manual_seed(0)).to(device)


def _note(benchmark, op: str, rows: int, dtype: str, direction: str = "forward") -> None:
    benchmark.group = op
    benchmark.extra_info.update(op=op, shape=f"{op} [{rows}, {_BITS}]", dtype=dtype, direction=direction)


def _numpy_peer(name: str, device: str, **settings):
    """The function of NumPy, bits from the lowest on; {} on a GPU."""
    if device != "cpu":
        return lambda x: {}
    function = getattr(pytest.importorskip("numpy"), name)
    return lambda x: {
        f"numpy.{name}": lambda: function(x.numpy(), axis=1, bitorder="little", **settings),
    }


def test_topk_pack(device, race, benchmark):
    x = _logits(_ROWS, device)
    found = effops.unpack_bits(effops.topk_pack(x, _ONES), _BITS)
    assert torch.equal(found, peers_hamming.plain_topk_pack(x, _ONES))
    _note(benchmark, "topk_pack", _ROWS, "float32")
    race(
        lambda: effops.topk_pack(x, _ONES),
        {"topk + scatter": lambda: peers_hamming.plain_topk_pack(x, _ONES)},
        points=x.numel(),
    )


def test_pack_bits(device, race, benchmark):
    x = _logits(_ROWS, device) > 0
    _note(benchmark, "pack_bits", _ROWS, "bool")
    race(lambda: effops.pack_bits(x), _numpy_peer("packbits", device)(x), points=x.numel())


def test_unpack_bits(device, race, benchmark):
    packed = effops.pack_bits(_logits(_ROWS, device)).view(torch.uint8)
    _note(benchmark, "unpack_bits", _ROWS, "uint8")
    race(
        lambda: effops.unpack_bits(packed, _BITS),
        _numpy_peer("unpackbits", device)(packed),
        points=_ROWS * _BITS,
    )


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_binnorm(direction, device, race, benchmark):
    x, grad = _logits(_BINNORM_ROWS, device), torch.ones(_BINNORM_ROWS, _BITS, device=device)
    functions = {
        "effops": effops.binnorm,
        "bracketing": peers_hamming.PlainBinNorm.apply,
        "bisection": peers_hamming.PlainBisection.apply,
    }
    for function in functions.values():
        torch.testing.assert_close(function(x, _ONES), effops.binnorm(x, _ONES), rtol=1e-3, atol=1e-4)
    calls = {name: lambda f=f: f(x, _ONES) for name, f in functions.items()}
    if direction != "forward":
        leaf = x.clone().requires_grad_()
        calls = {
            name: lambda f=f: torch.autograd.grad(f(leaf, _ONES), leaf, grad) for name, f in functions.items()
        }
    _note(benchmark, "binnorm", _BINNORM_ROWS, "float32", direction)
    race(calls.pop("effops"), calls, points=x.numel())
