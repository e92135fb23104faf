"""Inputs and comparisons that the golden tests of mean_shift share."""

import torch
from rowconv_inputs import assert_near, double, gradients


def two_clusters(degrees):
    """Unit vectors at +- degrees."""
    angle = torch.tensor([degrees, -degrees], dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1)


def leaves_of(points=9, channels=3, batch=2):
    """Points and positive weights."""
    x = double(batch, points, channels)
    w = double(batch, points, seed=1).sigmoid()
    return x.requires_grad_(), w.requires_grad_()


def assert_same_with_gradients(found, expected, leaves):
    assert_near(found, expected)
    grad = double(*found.shape, seed=9)
    for actual, wanted in zip(gradients(found, leaves, grad), gradients(expected, leaves, grad), strict=True):
        assert_near(actual, wanted)
