"""Golden values of topk_pack: hand-computed rows, torch.topk without ties, a stable sort with them."""

import math

import numpy as np
import pytest
import torch

import effops

NAN, INF = math.nan, math.inf
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def chosen(topk_pack, row, k, dtype=torch.float32):
    """Where the ones are."""
    packed = topk_pack(torch.tensor(row, dtype=dtype), k)
    return effops.reference.unpack_bits(packed, len(row)).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("row", "k", "expected"),
    [
        ([1.0, 3.0, 2.0], 1, [1]),
        ([1.0, 3.0, 2.0], 2, [1, 2]),
        ([-1.0, -3.0, -2.0], 2, [0, 2]),
        ([5.0, 5.0, 5.0, 5.0], 2, [0, 1]),
        ([1.0, 2.0, 2.0, 2.0, 3.0], 3, [1, 2, 4]),
        ([-0.0, 0.0, -0.0, 0.0], 2, [0, 1]),
        ([0.0, -0.0, 1.0], 2, [0, 2]),
        ([-0.0, -1.0, 0.0, 1.0], 2, [0, 3]),
        ([1.0, NAN, INF, 2.0], 1, [1]),
        ([1.0, NAN, INF, 2.0], 2, [1, 2]),
        ([NAN, 1.0, -NAN, NAN], 2, [0, 2]),
        ([1.0, -NAN, 5.0], 1, [1]),
        ([-INF, -INF, -1.0], 2, [0, 2]),
        ([INF, 1.0, INF, INF], 2, [0, 2]),
        ([1.0, 2.0], 0, []),
        ([1.0, 2.0], 2, [0, 1]),
        ([NAN, NAN], 2, [0, 1]),
        ([3.0], 1, [0]),
    ],
)
def test_by_hand(topk_pack, row, k, expected, dtype):
    assert chosen(topk_pack, row, k, dtype) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("width", "k"), [(1, 1), (7, 3), (64, 1), (65, 64), (256, 64), (1000, 999), (4096, 1024)]
)
def test_agrees_with_topk(topk_pack, width, k, dtype):
    x = torch.randn(6, width, dtype=dtype, generator=torch.Generator().manual_seed(width))
    expected = torch.zeros(6, width, dtype=torch.bool).scatter(1, x.topk(k).indices, True)
    assert torch.equal(topk_pack(x, k), effops.reference.pack_bits(expected))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("values", [1, 2, 5, 40])
@pytest.mark.parametrize("k", [0, 1, 30, 64, 200, 299, 300])
def test_ties_go_to_the_lowest_index(topk_pack, k, values, dtype):
    generator = torch.Generator().manual_seed(k)
    x = torch.randint(values, (4, 300), generator=generator).to(dtype) - values // 2
    order = np.argsort(-x.double().numpy(), axis=1, kind="stable")
    expected = torch.zeros(4, 300, dtype=torch.bool).scatter(1, torch.from_numpy(order[:, :k].copy()), True)
    assert torch.equal(topk_pack(x, k), effops.reference.pack_bits(expected))


@pytest.mark.parametrize("dtype", FLOATS)
def test_weight_is_k_whatever_the_row_holds(topk_pack, dtype):
    """Any bits as floating-point numbers: subnormal, huge, infinite, NaN of all kinds."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(256, (50, 130 * dtype.itemsize), dtype=torch.uint8, generator=generator)
    x = raw.view(dtype)
    for k in (0, 1, 65, 129, 130):
        weight = np.bitwise_count(topk_pack(x, k).numpy().view(np.uint64)).sum(1)
        assert (weight == k).all()


def test_descriptors_of_zippypoint(topk_pack):
    """64 of 256 bits, in 32 bytes where float32 takes 1024."""
    x = torch.randn(20, 256, generator=torch.Generator().manual_seed(0))
    packed = topk_pack(x, 64)
    assert packed.shape == (20, 4)
    assert packed.numel() * packed.element_size() * 32 == x.numel() * x.element_size()


def test_no_gradient(topk_pack):
    """Neither an error nor a warning (warnings are errors here)."""
    x = torch.randn(3, 70, requires_grad=True)
    packed = topk_pack(x, 9)
    assert not packed.requires_grad
    assert torch.equal(packed, topk_pack(x.detach(), 9))


def test_autocast_does_not_round_the_logits():
    """As bfloat16 the two largest would tie."""
    x = torch.tensor([1.0, 1.0001, 1.0002])
    with torch.autocast("cpu", torch.bfloat16):
        assert effops.topk_pack(x, 1).item() == 0b100


@pytest.mark.parametrize("k", [-1, 4])
def test_k_out_of_range(topk_pack, k):
    with pytest.raises(ValueError, match=rf"topk_pack: expected k in \[0, 3\], got {k}"):
        topk_pack(torch.zeros(2, 3), k)
