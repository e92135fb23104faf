"""Inputs and the independent oracle that the golden tests of the sampling ops share."""

import math

import torch
import torch.nn.functional as F

NAN, INF = math.nan, math.inf


def double(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def uniform(*shape, low=0.0, high=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(*shape, dtype=torch.float64, generator=generator)


def ramp(height, width):
    """f(y, x) = 2x - 3y + 1, [H, W]."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (2 * x - 3 * y + 1).double()


def sample_with_grid_sample(feature, xy):
    """Oracle: feature [C, H, W] at normalised xy [N, 2] -> [N, C]."""
    grid = 2 * xy[None, None] - 1
    return F.grid_sample(feature[None], grid, padding_mode="zeros", align_corners=False)[0, :, 0].T


def sample_one_map(ms_deform_attn, feature, xy):
    """One head, one level, one point per query, weight 1: feature [H, W, D] at xy [Q, 2] -> [Q, D]."""
    height, width, channels = feature.shape
    value = feature.reshape(1, height * width, 1, channels)
    weights = torch.ones(1, len(xy), 1, 1, 1, dtype=feature.dtype)
    return ms_deform_attn(value, [(height, width)], None, xy.reshape(1, -1, 1, 1, 1, 2), weights)[0]
