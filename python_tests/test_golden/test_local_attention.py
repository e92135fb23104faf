"""Golden values of local_attention: numbers of the specification, dense attention, border rules."""

import pytest
import torch
import torch.nn.functional as F
from localfilter_inputs import assert_same_with_gradients, inside, unfolded
from rowconv_inputs import FLOATS, INF, NAN, assert_near, double, gradients

BORDER = pytest.mark.parametrize("border", ["mask", "zero"])


def random_maps(*, channels=3, value_channels=2, height=5, width=6):
    sizes = (channels, channels, value_channels)
    return tuple(double(2, c, height, width, seed=i).requires_grad_() for i, c in enumerate(sizes))


def by_unfolding(q, k, v, window, dilation, scale, border):
    similarity = scale * (q.unsqueeze(2) * unfolded(k, window, dilation)).sum(1)
    if border == "mask":
        similarity = similarity.masked_fill(inside(k, window, dilation)[:, 0] == 0, -INF)
    return (similarity.softmax(1).unsqueeze(1) * unfolded(v, window, dilation)).sum(2)


@pytest.mark.parametrize(
    ("border", "expected"),
    [
        ("zero", [0.256622692679, -0.266836975087, -0.034380724041, -0.237364143805]),
        ("mask", [0.554161373309, -0.589974438387, -0.034380724041, -0.583870549655]),
    ],
)
def test_golden_numbers(local_attention, border, expected):
    i = torch.arange(60, dtype=torch.float64).view(1, 2, 5, 6)
    out = local_attention((0.1 * i).sin(), (0.2 * i).cos(), (0.3 * i + 1).sin(), 3, border=border)
    found = [out[0, 0, 0, 0], out[0, 1, 4, 5], out[0, 0, 2, 3], out.sum()]
    assert [number.item() for number in found] == pytest.approx(expected, abs=2e-12)


@pytest.mark.parametrize("window", [9, 11, 12, 31])
def test_large_windows_are_dense_attention(local_attention, window):
    """A window of 2 max(H, W) - 1 sees the whole map from everywhere."""
    q, k, v = leaves = random_maps(height=4, width=5)
    tokens = (maps.flatten(2).mT for maps in leaves)
    expected = F.scaled_dot_product_attention(*tokens).mT.unflatten(2, (4, 5))
    assert_same_with_gradients(local_attention(q, k, v, window), expected, leaves)


@BORDER
def test_border_rules(local_attention, border):
    """Without similarity and with values of 1: the share of the taps inside, or 1 if others do not count."""
    zeros, ones = torch.zeros(1, 3, 12, 10).double(), torch.ones(1, 1, 12, 10).double()
    out = local_attention(zeros, zeros, ones, 9, border=border)[0, 0]
    if border == "mask":
        assert_near(out, torch.ones_like(out))
        return
    assert_near(
        81 * out[0, [0, 1, 4, 9]], torch.tensor([25, 30, 45, 25]).double()
    )  # 0.308642, .., 0.555556, ..
    assert_near(81 * out[:, 5], torch.tensor([45, 54, 63, 72, *[81] * 4, 72, 63, 54, 45]).double())


@BORDER
@pytest.mark.parametrize(
    ("window", "dilation", "scale"), [(3, 1, 0.7), (4, 1, 2.0), (5, 2, -0.3), (2, 3, 1.0)]
)
def test_agrees_with_unfolding(local_attention, window, dilation, scale, border):
    leaves = random_maps()
    out = local_attention(*leaves, window, dilation, scale, border)
    assert_same_with_gradients(out, by_unfolding(*leaves, window, dilation, scale, border), leaves)


@pytest.mark.parametrize("channels", [0, 1, 4])
def test_default_scale(local_attention, channels):
    """C ** -0.5; without channels all taps weigh the same."""
    leaves = random_maps(channels=channels)
    if channels > 0:
        expected = by_unfolding(*leaves, 3, 1, channels**-0.5, "mask")
    else:
        expected = F.avg_pool2d(leaves[2], 3, 1, 1, count_include_pad=False) + 0 * sum(
            x.sum() for x in leaves
        )
    assert_same_with_gradients(local_attention(*leaves, 3), expected, leaves)


@BORDER
@pytest.mark.parametrize("window", [3, 4])
def test_dilated_windows_are_windows_on_lattices(local_attention, window, border):
    """Every second pixel attends among its like."""
    q, k, v = (maps.detach() for maps in random_maps(height=6, width=7))
    out = local_attention(q, k, v, window, 2, border=border)
    for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
        lattice = (Ellipsis, slice(y, None, 2), slice(x, None, 2))
        expected = local_attention(q[lattice], k[lattice], v[lattice], window, border=border)
        assert_near(out[lattice], expected)


def test_zero_border_is_the_unfused_pair(local_attention, neighborhood_dot, neighborhood_mix):
    """Their weights outside are 0 before the softmax, and their values nothing behind it."""
    q, k, v = leaves = random_maps()
    attention = (0.5 * neighborhood_dot(q, k, 5)).softmax(1)
    out = local_attention(q, k, v, 5, scale=0.5, border="zero")
    assert_same_with_gradients(out, neighborhood_mix(attention, v), leaves)


@BORDER
def test_one_pixel_windows_copy(local_attention, border):
    q, k, v = random_maps()
    assert_near(local_attention(q, k, v, 1, border=border), v)


def test_large_similarities(local_attention):
    """The greatest similarity takes all: exp of 1000 would be Inf."""
    q, k, v = (maps.detach() for maps in random_maps(channels=1))
    found = local_attention(torch.ones_like(q), 1e4 * k, v, 3, scale=1.0)
    best = torch.where(inside(k, 3) > 0, unfolded(k, 3), -INF).argmax(2, keepdim=True)
    expected = unfolded(v, 3).gather(2, best.expand(-1, 2, -1, -1, -1)).squeeze(2)
    assert_near(found, expected)


@BORDER
def test_nan_stays_in_its_windows(local_attention, border):
    q, k, v = (maps.detach().clone() for maps in random_maps(height=6))
    k[0, 0, 1, 4] = NAN
    v[1, 1, 5, 0] = NAN
    out = local_attention(q, k, v, 3, border=border)
    expected = torch.zeros(out.shape, dtype=torch.bool)
    expected[0, :, :3, 3:] = True
    expected[1, 1, 4:, :2] = True
    assert torch.equal(out.isnan(), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes_by_hand(local_attention, dtype):
    """Similarities 0 and log 3: weights of a quarter and three quarters."""
    q = torch.ones(1, 1, 1, 2, dtype=dtype)
    k = torch.tensor([0, 3.0]).log1p().mul(torch.tensor([0, 0.5 * 1.5849625])).view(1, 1, 1, 2).to(dtype)
    v = torch.tensor([4.0, -4]).view(1, 1, 1, 2).to(dtype)
    out = local_attention(q, k, v, 3)
    assert out.dtype == dtype
    tolerance = 0.02 if dtype in (torch.float16, torch.bfloat16) else 1e-6
    assert out.flatten().tolist() == pytest.approx([-2, -2], abs=tolerance)


def test_memory_format(local_attention):
    """That of q alone."""
    q, k, v = random_maps()
    last = [maps.contiguous(memory_format=torch.channels_last) for maps in (q, k, v)]
    out = local_attention(q, last[1], last[2], 3)
    assert out.is_contiguous()
    other = local_attention(last[0], k, v, 3)
    assert other.is_contiguous(memory_format=torch.channels_last)
    assert_near(other, out)


@BORDER
@pytest.mark.parametrize("empty", ["N", "C", "V", "H", "W"])
def test_empty(local_attention, empty, border):
    n, c, cv, h, w = (0 if name == empty else 2 for name in "NCVHW")
    q, k = (torch.ones(n, c, h, w, requires_grad=True) for _ in range(2))
    v = torch.ones(n, cv, h, w, requires_grad=True)
    out = local_attention(q, k, v, 3, border=border)
    assert out.shape == v.shape
    grads = gradients(out, (q, k, v))
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]
    if cv == 0:
        assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize(
    "change",
    [
        {"q": torch.zeros(3, 5, 6)},
        {"k": torch.zeros(2, 4, 5, 6)},
        {"k": torch.zeros(2, 3, 5, 5)},
        {"v": torch.zeros(1, 2, 5, 6)},
        {"v": torch.zeros(2, 2, 6, 5)},
        {"window": 0},
        {"dilation": 0},
        {"border": "zeros"},
    ],
    ids=lambda change: "-".join(change),
)
def test_bad_arguments(local_attention, change):
    arguments = {"q": torch.zeros(2, 3, 5, 6), "k": torch.zeros(2, 3, 5, 6), "v": torch.zeros(2, 2, 5, 6)}
    with pytest.raises(ValueError, match="^local_attention: expected"):
        local_attention(**({"window": 3} | arguments | change))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_wrong_dtypes(local_attention, name):
    arguments = dict.fromkeys("qkv", torch.zeros(2, 3, 5, 6)) | {name: torch.zeros(2, 3, 5, 6).half()}
    with pytest.raises(TypeError, match="^local_attention: expected"):
        local_attention(**arguments, window=3)
