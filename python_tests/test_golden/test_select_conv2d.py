"""Golden values of select_conv2d: sums of dense convolutions over the pixels that choose them."""

import pytest
import torch
import torch.nn.functional as F
from rowconv_inputs import FLOATS, INF, NAN, assert_near, double, gradients

MULTI_POOL = [0, 1, 2, 4, 6, 8, 10]


def random_choice(*shape, branches, seed=0):
    """From -1 (nothing) to the last branch."""
    return torch.randint(-1, branches, shape, generator=torch.Generator().manual_seed(seed))


def select_dense(x, weights, choice, dilations, bias=None):
    """Oracle: all branches everywhere, times one-hot maps."""
    out = torch.zeros(len(x), weights.shape[1], *x.shape[2:], dtype=x.dtype)
    for p, dilation in enumerate(dilations):
        padding = dilation * (weights.shape[-1] // 2)
        branch_bias = None if bias is None else bias[p]
        branch = x if dilation == 0 else F.conv2d(x, weights[p], branch_bias, 1, padding, dilation)
        out = out + branch * (choice == p)[:, None]
    return out


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("dilations", "kernel", "outputs"),
    [(MULTI_POOL, 3, 3), ([1, 2, 4], 3, 5), ([1], 1, 2), ([3, 1], 5, 1), ([0, 0], 1, 3), ([2, 0, 2], 3, 3)],
    ids=str,
)
def test_agrees_with_dense_convolutions(select_conv2d, dilations, kernel, outputs, has_bias):
    branches = len(dilations)
    x = double(2, 3, 9, 13).requires_grad_()
    weights = double(branches, outputs, 3, kernel, kernel, seed=1).requires_grad_()
    bias = double(branches, outputs, seed=2).requires_grad_() if has_bias else None
    choice = random_choice(2, 9, 13, branches=branches)
    out = select_conv2d(x, weights, choice, dilations, bias)
    expected = select_dense(x, weights, choice, dilations, bias)
    assert_near(out, expected)
    leaves, grad_output = [x, weights] + ([bias] if has_bias else []), double(*out.shape, seed=3)
    for actual, wanted in zip(
        gradients(out, leaves, grad_output), gradients(expected, leaves, grad_output), strict=True
    ):
        assert_near(actual, wanted)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("choice_dtype", [torch.int32, torch.int64])
def test_by_hand(select_conv2d, dtype, choice_dtype):
    """A row of 5 pixels: nothing, a copy, sums of 3 pixels at distance 1 and 2 (plus 10), nothing."""
    x = torch.tensor([[[[1, 2, 4, 8, 16]]]], dtype=dtype)
    weights = torch.ones(3, 1, 1, 3, 3, dtype=dtype)
    bias = torch.tensor([[5], [0], [10]], dtype=dtype)
    choice = torch.tensor([[[-1, 0, 1, 2, -1]]], dtype=choice_dtype)
    out = select_conv2d(x, weights, choice, [0, 1, 2], bias)
    assert out.dtype == dtype
    assert out.flatten().tolist() == [0, 2, 2 + 4 + 8, 2 + 8 + 10, 0]


def test_single_choices(select_conv2d):
    """One branch for all pixels is a dense convolution, a copy, or nothing."""
    x, weights, bias = double(2, 3, 6, 5), double(7, 3, 3, 3, 3, seed=1), double(7, 3, seed=2)
    for p, dilation in enumerate(MULTI_POOL):
        out = select_conv2d(x, weights, torch.full((2, 6, 5), p), MULTI_POOL, bias)
        if dilation == 0:
            assert torch.equal(out, x)
            assert out.data_ptr() != x.data_ptr()
        else:
            assert_near(out, F.conv2d(x, weights[p], bias[p], 1, dilation, dilation))
    out = select_conv2d(x, weights, torch.full((2, 6, 5), -1), MULTI_POOL, bias)
    assert torch.equal(out, torch.zeros_like(x))


def test_ignored_branches_change_nothing(select_conv2d):
    """The weights of the identity, and those of a branch that no pixel chooses, get gradient 0."""
    x, clean, bias = double(1, 2, 5, 5), double(3, 2, 2, 3, 3, seed=1), double(3, 2, seed=2)
    choice = torch.randint(2, (1, 5, 5), generator=torch.Generator().manual_seed(0))  # not the last one
    found = []
    for number in (0.0, NAN, INF):
        weights, offsets = clean.clone(), bias.clone()
        weights[::2] = offsets[::2] = number
        leaves = [x.requires_grad_(), weights.requires_grad_(), offsets.requires_grad_()]
        out = select_conv2d(leaves[0], leaves[1], choice, [0, 1, 2], leaves[2])
        found.append([out, *gradients(out, leaves)])
    for other in found[1:]:
        assert all(torch.equal(actual, wanted) for actual, wanted in zip(other, found[0], strict=True))
    assert not found[0][2][::2].any()
    assert not found[0][3][::2].any()


@pytest.mark.parametrize("number", [NAN, INF])
def test_what_is_not_read_changes_nothing(select_conv2d, number):
    """One pixel is copied, one reads its neighbours at distance 2; all others may be anything."""
    choice = torch.full((1, 7, 8), -1)
    choice[0, 6, 7], choice[0, 1, 1] = 0, 1
    read = torch.zeros(7, 8, dtype=torch.bool)
    read[6, 7] = read[1, 1] = read[1, 3] = read[3, 1] = read[3, 3] = True
    clean, found = double(1, 2, 7, 8), []
    for x in (clean, torch.where(read, clean, number)):
        leaves = [x.requires_grad_(), double(2, 2, 2, 3, 3, seed=1).requires_grad_()]
        out = select_conv2d(*leaves, choice, [0, 2])
        found.append([out, *gradients(out, leaves)])
    for actual, wanted in zip(*found, strict=True):
        assert torch.equal(actual, wanted)


def test_padding_is_never_multiplied(select_conv2d):
    x = torch.tensor([[[[5.0]]]], dtype=torch.float64, requires_grad=True)
    weights = torch.full((1, 1, 1, 3, 3), INF, dtype=torch.float64)
    weights[0, 0, 0, 1, 1] = 2.0
    weights.requires_grad_()
    out = select_conv2d(x, weights, torch.zeros(1, 1, 1, dtype=torch.int64), [4])
    assert out.item() == 10
    grad_x, grad_weights = gradients(out, [x, weights])
    assert grad_x.item() == 2
    assert grad_weights.flatten().tolist() == [0, 0, 0, 0, 5, 0, 0, 0, 0]


@pytest.mark.parametrize("channels", [1, 3])
def test_memory_format(select_conv2d, channels):
    """Channels_last for an input that is channels_last and nothing else; a single channel is both."""
    x, weights = double(2, channels, 4, 5), double(2, 6, channels, 3, 3, seed=1)
    choice = random_choice(2, 4, 5, branches=2)
    out = select_conv2d(x, weights, choice, [1, 2])
    assert out.is_contiguous()
    last = select_conv2d(x.contiguous(memory_format=torch.channels_last), weights, choice, [1, 2])
    assert last.is_contiguous(memory_format=torch.channels_last) == (channels > 1)
    assert_near(last, out)


@pytest.mark.parametrize("empty", ["N", "I", "O", "H", "W", "P"])
def test_empty(select_conv2d, empty):
    n, i, o, h, w, p = (0 if name == empty else 2 for name in "NIOHWP")
    x, weights = torch.ones(n, i, h, w, requires_grad=True), torch.ones(p, o, i, 3, 3, requires_grad=True)
    bias = torch.ones(p, o, requires_grad=True)
    choice = torch.full((n, h, w), p - 1)
    out = select_conv2d(x, weights, choice, [1] * p, bias)
    assert out.shape == (n, o, h, w)
    assert torch.equal(out, torch.full_like(out, 1.0 if p else 0.0))
    leaves = [x, weights, bias]
    assert [grad.shape for grad in gradients(out, leaves)] == [leaf.shape for leaf in leaves]


@pytest.mark.parametrize("choice", [2, -2, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_choice_out_of_range(select_conv2d, choice, dtype):
    choices = torch.zeros(1, 4, 4, dtype=dtype)
    choices[0, 3, 2] = choice
    with pytest.raises(ValueError, match="^select_conv2d: expected choice"):
        select_conv2d(torch.zeros(1, 1, 4, 4), torch.zeros(2, 1, 1, 3, 3), choices, [1, 2])


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(1, 2, 4)},
        {"weights": torch.zeros(2, 2, 3, 3, 3)},
        {"weights": torch.zeros(3, 2, 2, 3, 3)},
        {"weights": torch.zeros(2, 2, 2, 2, 2)},
        {"weights": torch.zeros(2, 2, 2, 3, 1)},
        {"weights": torch.zeros(2, 4, 2, 3, 3)},  # the identity needs Co = Ci
        {"choice": torch.zeros(1, 4, 3).long()},
        {"dilations": [0, -1]},
        {"dilations": [0, 1, 2]},
        {"bias": torch.zeros(2)},
        {"bias": torch.zeros(2, 3)},
    ],
    ids=lambda change: "-".join(change),
)
def test_bad_arguments(select_conv2d, change):
    arguments = {
        "x": torch.zeros(1, 2, 4, 4),
        "weights": torch.zeros(2, 2, 2, 3, 3),
        "choice": torch.zeros(1, 4, 4, dtype=torch.int64),
        "dilations": [0, 1],
    }
    with pytest.raises(ValueError, match="^select_conv2d: expected"):
        select_conv2d(**(arguments | change))


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(1, 2, 4, 4).int()},
        {"weights": torch.zeros(2, 2, 2, 3, 3).double()},
        {"choice": torch.zeros(1, 4, 4)},
        {"choice": torch.zeros(1, 4, 4, dtype=torch.int16)},
        {"bias": torch.zeros(2, 2).half()},
    ],
    ids=lambda change: "-".join(change),
)
def test_wrong_dtypes(select_conv2d, change):
    arguments = {
        "x": torch.zeros(1, 2, 4, 4),
        "weights": torch.zeros(2, 2, 2, 3, 3),
        "choice": torch.zeros(1, 4, 4, dtype=torch.int64),
        "dilations": [0, 1],
    }
    with pytest.raises(TypeError, match="^select_conv2d: expected"):
        select_conv2d(**(arguments | change))
