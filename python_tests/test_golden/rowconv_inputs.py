"""Inputs that the golden tests of the convolutions at single cells share."""

import math

import torch

import effops

NAN, INF = math.nan, math.inf
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def double(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_mask(*shape, density=0.4, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < density


def gradients(out, leaves, grad_output=None):
    """Of the sum of the output, or with the given gradient of it; an input without influence gets 0."""
    grad_output = torch.ones_like(out) if grad_output is None else grad_output
    return torch.autograd.grad(out, leaves, grad_output, allow_unused=True, materialize_grads=True)


def assert_near(actual, expected):
    """Float64 numbers that differ by rounding."""
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def toy_sps(dtype=torch.float64, map_dtype=torch.int32):
    """One 3 x 3 map of 4 active and 3 passive rows, ids 5 and 6 twice; the feature of id i is i + 1."""
    features = torch.arange(1, 8, dtype=dtype)[:, None]
    index_map = torch.tensor([[[0, 1, 5], [2, 3, 5], [4, 6, 6]]], dtype=map_dtype)
    xy = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]], dtype=torch.int32)
    return effops.SPS(features[:4], features[4:], index_map, torch.zeros(4, dtype=torch.int32), xy)


def parts(sps):
    """The five tensors, as sps_conv2d takes them."""
    return sps.active, sps.passive, sps.index_map, sps.roi, sps.xy
