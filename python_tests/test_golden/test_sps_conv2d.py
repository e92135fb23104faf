"""Golden values of sps_conv2d: the toy of the thesis, and dense convolutions."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from rowconv_inputs import FLOATS, INF, NAN, assert_near, double, gradients, parts, random_mask, toy_sps

ONES = torch.ones(1, 1, 3, 3, dtype=torch.float64)
COUNTING = torch.arange(1.0, 10.0, dtype=torch.float64).view(1, 1, 3, 3)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("map_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("weight", "dilation", "expected"),
    [
        (ONES, 1, [10, 22, 22, 41]),
        (ONES, 2, [19, 9, 9, 4]),
        (ONES, 3, [1, 2, 3, 4]),
        (COUNTING, 1, [77, 157, 150, 245]),
        (COUNTING, 2, [144, 66, 51, 20]),
        (COUNTING, 3, [5, 10, 15, 20]),
    ],
    ids=["ones-1", "ones-2", "ones-3", "counting-1", "counting-2", "counting-3"],
)
def test_toy(sps_conv2d, weight, dilation, expected, map_dtype, dtype):
    out = sps_conv2d(*parts(toy_sps(dtype, map_dtype)), weight.to(dtype), dilation=dilation)
    assert out.dtype == dtype
    assert out.tolist() == [[number] for number in expected]


def test_toy_gradients(sps_conv2d):
    """Ids 0 to 6 are read 4, 4, 4, 4, 2, 4 and 3 times; a tap sums what it reads."""
    sps = toy_sps()
    leaves = [sps.active.requires_grad_(), sps.passive.requires_grad_(), ONES.clone().requires_grad_()]
    out = sps_conv2d(*parts(sps), leaves[2])
    active, passive, weight = gradients(out, leaves)
    assert active.flatten().tolist() == [4, 4, 4, 4]
    assert passive.flatten().tolist() == [2, 4, 3]
    assert weight[0, 0].tolist() == [[1, 3, 8], [4, 10, 18], [8, 19, 24]]


@pytest.mark.parametrize(
    ("activation", "expected"), [(None, [0, 3, 4, 19]), ("relu", [11, 3, 4, 23])], ids=["none", "relu"]
)
def test_toy_of_three_dilations(sps_conv2d, activation, expected):
    """The activation comes before the sum."""
    biases = [torch.tensor([bias], dtype=torch.float64) for bias in (-20.0, -8.0, -2.0)]
    out = sps_conv2d(*parts(toy_sps()), [ONES] * 3, biases, [1, 2, 3], activation)
    assert out.flatten().tolist() == expected


def test_relu_at_zero_and_nan(sps_conv2d):
    """As torch.relu: no gradient at 0, and NaN stays."""
    sps = toy_sps()
    bias = torch.tensor([-22.0], dtype=torch.float64, requires_grad=True)
    out = sps_conv2d(*parts(sps), ONES, bias, activation="relu")
    assert out.flatten().tolist() == [0, 0, 0, 19]
    assert gradients(out, [bias])[0].item() == 1
    poisoned = replace(sps, passive=torch.tensor([[NAN], [6.0], [7.0]], dtype=torch.float64))
    out = sps_conv2d(*parts(poisoned), ONES, activation="relu")
    assert out.isnan().flatten().tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("side", "dilation", "groups"),
    [(3, 1, 1), (3, 3, 1), (3, 5, 1), (1, 1, 1), (5, 2, 1), (3, 1, 2), (3, 2, 4), (3, 30, 1)],
)
def test_all_active_is_a_dense_convolution(sps_from_dense, sps_conv2d, side, dilation, groups):
    x = double(2, 4, 7, 12).requires_grad_()
    weight = double(8, 4 // groups, side, side, seed=1).requires_grad_()
    bias = double(8, seed=2).requires_grad_()
    mask = torch.ones(2, 7, 12, dtype=torch.bool)
    out = sps_conv2d(*parts(sps_from_dense(x, mask)), weight, bias, dilation, groups=groups)
    padding = dilation * (side // 2)
    dense = F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=groups)
    expected = dense.permute(0, 2, 3, 1)[mask]
    assert_near(out, expected)
    grad_output = double(*out.shape, seed=3)
    leaves = [x, weight, bias]
    for actual, wanted in zip(
        gradients(out, leaves, grad_output), gradients(expected, leaves, grad_output), strict=True
    ):
        assert_near(actual, wanted)


def test_fused_dilations_are_a_sum(sps_from_dense, sps_conv2d):
    """Also of kernels of different sizes."""
    sps = sps_from_dense(double(2, 3, 6, 5), random_mask(2, 6, 5))
    weights = [double(4, 3, side, side, seed=side) for side in (3, 1, 5)]
    biases = [double(4, seed=seed) for seed in range(3)]
    out = sps_conv2d(*parts(sps), weights, biases, [3, 1, 2], "relu")
    branches = zip(weights, biases, [3, 1, 2], strict=True)
    assert_near(out, sum(sps_conv2d(*parts(sps), w, b, d, "relu") for w, b, d in branches))


def test_padding_is_never_multiplied(sps_conv2d):
    """On a map of one cell only the middle tap is read; the others may be anything."""
    cell = torch.zeros(1, 1, 1, dtype=torch.int32)
    weight = torch.full((1, 1, 3, 3), INF, dtype=torch.float64)
    weight[0, 0, 0] = NAN
    weight[0, 0, 1, 1] = 2.0
    active = torch.tensor([[5.0]], dtype=torch.float64, requires_grad=True)
    weight.requires_grad_()
    place = torch.zeros(1, dtype=torch.int32)
    out = sps_conv2d(active, active.detach()[:0], cell, place, torch.zeros(1, 2, dtype=torch.int32), weight)
    assert out.item() == 10
    grad_active, grad_weight = gradients(out, [active, weight])
    assert grad_active.item() == 2
    assert grad_weight.flatten().tolist() == [0, 0, 0, 0, 5, 0, 0, 0, 0]


def test_maps_and_unread_rows_are_isolated(sps_from_dense, sps_conv2d):
    """NaN in another map, and in a row beyond the reach of every active cell."""
    x, mask = double(3, 2, 5, 4), torch.zeros(3, 5, 4, dtype=torch.bool)
    mask[0, 1, 1] = mask[2, 4, 3] = True
    poisoned = x.clone()
    poisoned[1] = poisoned[0, :, 3:] = poisoned[2, :, :, 0] = NAN
    weight = double(2, 2, 3, 3, seed=1).requires_grad_()
    found = []
    for features in (x, poisoned):
        leaf = features.requires_grad_()
        out = sps_conv2d(*parts(sps_from_dense(leaf, mask)), weight)
        found.append([out, *gradients(out, [leaf, weight])])
    for actual, wanted in zip(*found, strict=True):
        assert torch.equal(actual, wanted)


def test_taps_see_the_features_before_the_convolution(sps_conv2d):
    """The inputs are not changed."""
    sps = toy_sps()
    before = [part.clone() for part in parts(sps)]
    sps_conv2d(*parts(sps), ONES)
    assert all(torch.equal(part, old) for part, old in zip(parts(sps), before, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        {"weight": torch.ones(1, 1, 2, 2).double()},
        {"weight": torch.ones(1, 1, 3, 5).double()},
        {"weight": torch.ones(1, 2, 3, 3).double()},
        {"weight": [], "dilation": []},
        {"weight": [ONES, ONES], "dilation": [1]},
        {"weight": [ONES, ONES.expand(2, 1, 3, 3)], "dilation": [1, 2]},
        {"weight": [ONES, ONES], "dilation": [1, 2], "bias": [torch.zeros(1).double()]},
        {"dilation": 0},
        {"bias": torch.zeros(2).double()},
        {"activation": "gelu"},
        {"groups": 0},
        {"groups": 2},
    ],
    ids=lambda change: "-".join(change),
)
def test_bad_arguments(sps_conv2d, change):
    with pytest.raises(ValueError, match="^sps_conv2d: expected"):
        sps_conv2d(*parts(toy_sps()), **({"weight": ONES} | change))


@pytest.mark.parametrize(
    "change",
    [
        {"weight": [ONES]},
        {"dilation": [1]},
        {"bias": [torch.zeros(1).double()]},
        {"weight": [ONES], "dilation": [1], "bias": torch.zeros(1).double()},
    ],
    ids=lambda change: "-".join(change),
)
def test_lists_beside_single_values(sps_conv2d, change):
    with pytest.raises(TypeError, match="^sps_conv2d: expected"):
        sps_conv2d(*parts(toy_sps()), **({"weight": ONES} | change))


def test_wrong_dtypes(sps_conv2d):
    sps = toy_sps()
    with pytest.raises(TypeError, match="^sps_conv2d: expected weight"):
        sps_conv2d(*parts(sps), ONES.float())
    with pytest.raises(TypeError, match="^sps_conv2d: expected roi"):
        sps_conv2d(*parts(replace(sps, roi=sps.roi.long())), ONES)
