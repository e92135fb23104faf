"""Golden values of neighborhood_dot and neighborhood_mix: unfolding, their adjointness, hand-made numbers."""

import pytest
import torch
from localfilter_inputs import assert_same_with_gradients, inside, one_hot, shifted, unfolded
from rowconv_inputs import FLOATS, INF, NAN, assert_near, double, gradients

WINDOWS = pytest.mark.parametrize(("window", "dilation"), [(1, 1), (3, 1), (4, 1), (5, 2), (2, 3), (15, 1)])


@WINDOWS
def test_dot_agrees_with_unfolding(neighborhood_dot, window, dilation):
    q, k = leaves = double(2, 3, 5, 6).requires_grad_(), double(2, 3, 5, 6, seed=1).requires_grad_()
    expected = (q.unsqueeze(2) * unfolded(k, window, dilation)).sum(1)
    assert_same_with_gradients(neighborhood_dot(q, k, window, dilation), expected, leaves)


@WINDOWS
def test_mix_agrees_with_unfolding(neighborhood_mix, window, dilation):
    weights, v = leaves = (
        double(2, window**2, 5, 6).requires_grad_(),
        double(2, 3, 5, 6, seed=1).requires_grad_(),
    )
    expected = (weights.unsqueeze(1) * unfolded(v, window, dilation)).sum(2)
    assert_same_with_gradients(neighborhood_mix(weights, v, dilation), expected, leaves)


@WINDOWS
def test_adjoint(neighborhood_dot, neighborhood_mix, window, dilation):
    """<dot(q, k), w> = <q, mix(w, k)>, and so the gradients of one are the other."""
    q, k = double(2, 3, 5, 6).requires_grad_(), double(2, 3, 5, 6, seed=1)
    weights = double(2, window**2, 5, 6, seed=2).requires_grad_()
    dot, mix = neighborhood_dot(q, k, window, dilation), neighborhood_mix(weights, k, dilation)
    assert_near((dot * weights).sum(), (q * mix).sum())
    assert_near(*gradients(dot, (q,), weights), mix)
    assert_near(*gradients(mix, (weights,), q), dot)


@WINDOWS
def test_mix_is_filter_flow(neighborhood_mix, filter_flow, window, dilation):
    weights, v = double(2, window**2, 5, 6), double(2, 3, 5, 6, seed=1)
    expected = filter_flow(v, weights, "none", dilation=dilation)
    assert_near(neighborhood_mix(weights, v, dilation), expected)


@pytest.mark.parametrize("kernel", [5, 4])
def test_mix_of_one_hot_weights_shifts(neighborhood_mix, kernel):
    v = double(1, 2, 6, 7)
    before, behind = -(kernel // 2), kernel - 1 - kernel // 2
    for dy, dx in ((before, behind), (behind, before), (0, 0), (before, 0)):
        weights = one_hot(kernel, dy, dx, height=6, width=7)
        assert torch.equal(neighborhood_mix(weights, v, 2), shifted(v, 2 * dy, 2 * dx))


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes_by_hand(neighborhood_dot, neighborhood_mix, dtype):
    """The taps of a row of three pixels are the middle three of nine."""
    q = torch.tensor([[1.0, 2, 3], [1, 0, -1]], dtype=dtype).view(1, 2, 1, 3)
    k = torch.tensor([[1.0, 10, 100], [4, 5, 6]], dtype=dtype).view(1, 2, 1, 3)
    dot = neighborhood_dot(q, k, 3)
    assert dot.dtype == dtype
    expected = torch.zeros(9, 3)
    expected[3:6] = torch.tensor([[0, 2, 25], [5, 20, 294], [15, 200, 0]])
    assert torch.equal(dot[0, :, 0].float(), expected)

    weights = torch.zeros(1, 9, 1, 3, dtype=dtype)
    weights[0, 3:6, 0] = torch.tensor([[1.0, 2, 4], [0.5, -1, 8], [-2, 0, 1]])
    mix = neighborhood_mix(weights, k)
    assert mix.dtype == dtype
    assert mix[0, :, 0].tolist() == [[0.5 - 20, 2 - 10, 40 + 800], [2 - 10, 8 - 5, 20 + 48]]


@pytest.mark.parametrize("number", [NAN, INF])
def test_what_lies_outside_is_not_multiplied(neighborhood_dot, neighborhood_mix, number):
    """A NaN of q makes the taps that read nothing 0 all the same; weights there reach nothing."""
    v = double(1, 2, 4, 5).requires_grad_()
    is_outside = inside(v, 5)[:, 0] == 0
    dot = neighborhood_dot(torch.full((1, 2, 4, 5), number).double(), torch.ones_like(v), 5)
    assert torch.equal(dot == 0, is_outside)

    clean = double(1, 25, 4, 5, seed=1)
    found = []
    for weights in (torch.where(is_outside, 0.0, clean), torch.where(is_outside, number, clean)):
        weights.requires_grad_()
        out = neighborhood_mix(weights, v)
        found.append((out, *gradients(out, (weights, v))))
    for actual, wanted in zip(*found, strict=True):
        assert_near(actual, wanted)


def test_half_results_are_rounded_once(neighborhood_dot, neighborhood_mix):
    """2048 + 1 + 1, which a sum in float16 would leave at 2048."""
    numbers = torch.tensor([2048.0, 1, 1]).half()
    channels = numbers.view(1, 3, 1, 1)
    assert neighborhood_dot(channels, torch.ones_like(channels), 1).item() == 2050
    out = neighborhood_mix(torch.ones(1, 9, 1, 3).half(), numbers[[1, 0, 2]].view(1, 1, 1, 3))
    assert out[0, 0, 0, 1].item() == 2050


def test_memory_format(neighborhood_dot, neighborhood_mix):
    """That of q, and that of v."""
    q, k, weights = double(2, 3, 4, 5), double(2, 3, 4, 5, seed=1), double(2, 9, 4, 5, seed=2)
    last = [maps.contiguous(memory_format=torch.channels_last) for maps in (q, k, weights)]
    for contiguous, other in (
        (neighborhood_dot(q, last[1], 3), neighborhood_dot(last[0], k, 3)),
        (neighborhood_mix(last[2], k), neighborhood_mix(weights, last[1])),
    ):
        assert contiguous.is_contiguous()
        assert other.is_contiguous(memory_format=torch.channels_last)
        assert_near(other, contiguous)


@pytest.mark.parametrize("empty", ["N", "C", "H", "W"])
def test_empty(neighborhood_dot, neighborhood_mix, empty):
    n, c, h, w = (0 if name == empty else 2 for name in "NCHW")
    q, k = (torch.ones(n, c, h, w, requires_grad=True) for _ in range(2))
    weights = torch.ones(n, 9, h, w, requires_grad=True)
    dot, mix = neighborhood_dot(q, k, 3), neighborhood_mix(weights, k)
    assert dot.shape == weights.shape
    assert mix.shape == k.shape
    assert [grad.shape for grad in gradients(dot, (q, k))] == [q.shape, k.shape]
    grads = gradients(mix, (weights, k))
    assert [grad.shape for grad in grads] == [weights.shape, k.shape]
    if c == 0:
        assert not dot.any()
        assert not grads[0].any()


@pytest.mark.parametrize(
    "change",
    [
        {"q": torch.zeros(3, 5, 6)},
        {"k": torch.zeros(2, 4, 5, 6)},
        {"k": torch.zeros(2, 3, 5, 5)},
        {"window": 0},
        {"dilation": 0},
    ],
    ids=lambda change: "-".join(change),
)
def test_bad_arguments_of_dot(neighborhood_dot, change):
    arguments = {"q": torch.zeros(2, 3, 5, 6), "k": torch.zeros(2, 3, 5, 6), "window": 3}
    with pytest.raises(ValueError, match="^neighborhood_dot: expected"):
        neighborhood_dot(**(arguments | change))


@pytest.mark.parametrize(
    "change",
    [
        {"v": torch.zeros(3, 5, 6)},
        {"weights": torch.zeros(2, 8, 5, 6)},
        {"weights": torch.zeros(2, 0, 5, 6)},
        {"weights": torch.zeros(2, 9, 5, 5)},
        {"weights": torch.zeros(1, 9, 5, 6)},
        {"dilation": 0},
    ],
    ids=lambda change: "-".join(change),
)
def test_bad_arguments_of_mix(neighborhood_mix, change):
    arguments = {"weights": torch.zeros(2, 9, 5, 6), "v": torch.zeros(2, 3, 5, 6)}
    with pytest.raises(ValueError, match="^neighborhood_mix: expected"):
        neighborhood_mix(**(arguments | change))


def test_wrong_dtypes(neighborhood_dot, neighborhood_mix):
    maps, weights = torch.zeros(2, 3, 5, 6), torch.zeros(2, 9, 5, 6)
    for q, k in ((maps, maps.half()), (maps.int(), maps.int())):
        with pytest.raises(TypeError, match="^neighborhood_dot: expected"):
            neighborhood_dot(q, k, 3)
    for w, v in ((weights.half(), maps), (weights.int(), maps.int())):
        with pytest.raises(TypeError, match="^neighborhood_mix: expected"):
            neighborhood_mix(w, v)
