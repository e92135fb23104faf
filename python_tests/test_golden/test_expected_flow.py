"""Golden values of expected_flow: offsets, means and filter_flow."""

import pytest
import torch
from localfilter_inputs import one_hot
from rowconv_inputs import FLOATS, assert_near, double, gradients


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 11])
@pytest.mark.parametrize("normalize", ["softmax", "sum"])
@pytest.mark.parametrize("dilation", [1, 3])
def test_uniform_filters(expected_flow, kernel, normalize, dilation):
    """Odd windows do not move; even ones by half a tap, as they reach one tap farther to the front."""
    out = expected_flow(torch.ones(2, kernel**2, 3, 4).double(), normalize, dilation=dilation)
    assert_near(out, torch.full((2, 2, 3, 4), 0.0 if kernel % 2 == 1 else -0.5 * dilation).double())


@pytest.mark.parametrize("kernel", [5, 4])
def test_one_hot_filters(expected_flow, kernel):
    """(dx, dy) of every tap, dx running fast; a pixel per tap."""
    filters = torch.eye(kernel**2).double().view(1, kernel**2, kernel, kernel)
    steps = torch.arange(kernel).double() - kernel // 2
    expected = torch.stack([steps.expand(kernel, kernel), steps[:, None].expand(kernel, kernel)])[None]
    for normalize, weights in (("none", filters), ("sum", -2 * filters), ("softmax", filters.log())):
        assert_near(expected_flow(weights, normalize), expected)
        assert_near(expected_flow(weights, normalize, dilation=3), 3 * expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes_by_hand(expected_flow, dtype):
    """Weights 0.5 at (dx, dy) = (1, -1), -2 at (0, 0) and 1 at (0, 1), of which the sum is -0.5."""
    filters = torch.tensor([0, 0, 0.5, 0, -2, 0, 0, 1, 0]).view(1, 9, 1, 1).to(dtype)
    flow = expected_flow(filters, "none")
    assert flow.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert flow.flatten().tolist() == [0.5, 0.5]
    assert expected_flow(filters, "sum").flatten().tolist() == [-1, -1]


@pytest.mark.parametrize("normalize", ["softmax", "none", "sum"])
@pytest.mark.parametrize(("kernel", "dilation", "groups"), [(3, 1, 1), (4, 2, 3), (9, 1, 2)], ids=str)
def test_agrees_with_filter_flow(expected_flow, filter_flow, normalize, kernel, dilation, groups):
    """On windows that all reach beyond the image, too."""
    filters = double(2, groups * kernel**2, 4, 5).exp().requires_grad_()
    image = torch.zeros(2, 0, 4, 5).double()
    settings = {"dilation": dilation, "groups": groups}
    out = expected_flow(filters, normalize, **settings)
    _, flow = filter_flow(image, filters, normalize, return_flow=True, **settings)
    assert_near(out, flow)
    grad_output = double(*out.shape, seed=1)
    assert_near(*(gradients(results, (filters,), grad_output)[0] for results in (out, flow)))


def test_gradients_by_hand(expected_flow):
    """Of the logits of uniform filters: a ninth of their offset."""
    filters = torch.zeros(1, 9, 1, 1).double().requires_grad_()
    out = expected_flow(filters)
    (gradient,) = gradients(out, (filters,), torch.tensor([1.0, 10]).double().view(out.shape))
    assert_near(9 * gradient.flatten(), torch.tensor([-11, -10, -9, -1, 0, 1, 9, 10, 11]).double())


def test_softmax_of_large_logits(expected_flow):
    filters = double(1, 9, 5, 6)
    assert_near(expected_flow(filters - 2000), expected_flow(filters))


def test_memory_format(expected_flow):
    filters = double(2, 9, 4, 5)
    out = expected_flow(filters)
    assert out.is_contiguous()
    last = expected_flow(filters.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert_near(last, out)
    assert expected_flow(one_hot(1, 0, 0, height=4, width=5)).is_contiguous()  # a single channel is both


@pytest.mark.parametrize("normalize", ["softmax", "none", "sum"])
@pytest.mark.parametrize("empty", ["N", "H", "W"])
def test_empty(expected_flow, empty, normalize):
    n, h, w = (0 if name == empty else 2 for name in "NHW")
    filters = torch.ones(n, 18, h, w, requires_grad=True)
    out = expected_flow(filters, normalize, groups=2)
    assert out.shape == (n, 4, h, w)
    assert gradients(out, (filters,))[0].shape == filters.shape


@pytest.mark.parametrize(
    "change",
    [
        {"filters": torch.zeros(18, 6, 6)},
        {"filters": torch.zeros(2, 16, 6, 6)},
        {"filters": torch.zeros(2, 0, 6, 6)},
        {"groups": 0},
        {"groups": 4},
        {"dilation": 0},
        {"normalize": "mean"},
    ],
    ids=lambda change: "-".join(change),
)
def test_bad_arguments(expected_flow, change):
    with pytest.raises(ValueError, match="^expected_flow: expected"):
        expected_flow(**({"filters": torch.zeros(2, 18, 6, 6), "groups": 2} | change))


def test_wrong_dtype(expected_flow):
    with pytest.raises(TypeError, match="^expected_flow: expected filters of"):
        expected_flow(torch.zeros(2, 9, 6, 6).int())
