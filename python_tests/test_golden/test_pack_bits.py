"""Golden values of pack_bits and unpack_bits: hand-computed words and numpy.packbits."""

import math

import numpy as np
import pytest
import torch
from torch.library import opcheck

import effops

WIDTHS = (0, 1, 7, 8, 9, 63, 64, 65, 127, 128, 130, 256, 1000, 4096)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def random_bits(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.5


@pytest.mark.parametrize(
    ("position", "words"),
    [(0, [1, 0]), (1, [2, 0]), (62, [2**62, 0]), (63, [-(2**63), 0]), (64, [0, 1]), (65, [0, 2])],
)
def test_one_bit(pack_bits, unpack_bits, position, words):
    x = torch.zeros(66, dtype=torch.bool)
    x[position] = True
    packed = pack_bits(x)
    assert packed.tolist() == words
    assert torch.equal(unpack_bits(packed, 66), x)


def test_all_ones(pack_bits):
    """The padding is 0 all the same."""
    assert pack_bits(torch.ones(130)).tolist() == [-1, -1, 3]
    assert pack_bits(torch.ones(2, 63)).tolist() == [[2**63 - 1]] * 2


@pytest.mark.parametrize("dtype", FLOATS)
def test_positive_numbers_are_ones(pack_bits, dtype):
    tiny = torch.finfo(dtype).tiny
    ones = [1.0, math.inf, tiny, tiny / 4]
    others = [-1.0, 0.0, -0.0, math.nan, -math.nan, -math.inf, -tiny, -tiny / 4]
    assert pack_bits(torch.tensor(ones + others, dtype=dtype)).tolist() == [0b1111]


def test_bytes_other_than_0_are_ones(pack_bits):
    assert pack_bits(torch.tensor([0, 1, 2, 127, 128, 255, 0], dtype=torch.uint8)).tolist() == [0b0111110]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.bool, torch.uint8])
@pytest.mark.parametrize("width", WIDTHS)
def test_agrees_with_numpy(pack_bits, unpack_bits, width, dtype):
    bits = random_bits(5, width)
    x = (2 * bits.float() - 1).to(dtype) if dtype.is_floating_point else bits.to(dtype)
    packed = pack_bits(x)
    assert packed.shape == (5, -(-width // 64))
    expected = np.packbits(bits.numpy(), axis=-1, bitorder="little")
    found = packed.numpy().view(np.uint8)
    assert np.array_equal(found[:, : expected.shape[1]], expected)
    assert not found[:, expected.shape[1] :].any()
    assert torch.equal(unpack_bits(packed, width), bits)
    assert torch.equal(unpack_bits(torch.from_numpy(expected), width), bits)


@pytest.mark.parametrize("width", [0, 1, 8, 63, 64, 100, 192])
def test_unpack_reads_only_the_first_bits(unpack_bits, width):
    words = torch.randint(-(2**63), 2**63 - 1, (4, 3), generator=torch.Generator().manual_seed(1))
    every = np.unpackbits(words.numpy().view(np.uint8), axis=-1, bitorder="little").astype(bool)
    found = unpack_bits(words, width)
    assert found.dtype == torch.bool
    assert np.array_equal(found.numpy(), every[:, :width])
    assert torch.equal(unpack_bits(words.view(torch.uint8), width), found)


@pytest.mark.parametrize(
    ("words", "most"), [(torch.zeros(2, 3, dtype=torch.int64), 192), (torch.zeros(3).byte(), 24)]
)
def test_more_bits_than_there_are(unpack_bits, words, most):
    assert not unpack_bits(words, most).any()
    for count in (most + 1, -1):
        with pytest.raises(
            ValueError, match=rf"unpack_bits: expected num_bits in \[0, {most}\], got {count}"
        ):
            unpack_bits(words, count)


def test_no_gradient(pack_bits):
    """Neither an error nor a warning (warnings are errors here)."""
    x = torch.randn(3, 70, requires_grad=True)
    packed = pack_bits(x)
    assert not packed.requires_grad
    assert torch.equal(packed, pack_bits(x.detach()))


@pytest.mark.parametrize("name", ["pack_bits", "topk_pack"])
def test_opcheck_with_an_input_that_requires_grad(name):
    arguments = (9,) if name == "topk_pack" else ()
    op = getattr(torch.ops.effops, name)
    opcheck(
        op,
        (torch.randn(3, 70, requires_grad=True), *arguments),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.compile
def test_compiled_for_any_width():
    compiled = torch.compile(effops.pack_bits, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, width in ((3, 70), (5, 130), (2, 4000)):
            x = random_bits(rows, width).float()
            assert torch.equal(compiled(x), effops.pack_bits(x))
