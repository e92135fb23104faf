"""Filters, and oracles made of padding and unfolding, that the golden tests of windows share."""

import torch
import torch.nn.functional as F
from rowconv_inputs import assert_near, double


def one_hot(kernel, dy, dx, *, height, width, batch=1):
    """Weights [N, K * K, H, W] of 1 at the tap (dy, dx) steps from the centre."""
    weights = torch.zeros(batch, kernel, kernel, height, width, dtype=torch.float64)
    weights[:, dy + kernel // 2, dx + kernel // 2] = 1
    return weights.flatten(1, 2)


def shifted(image, dy, dx):
    """image[y + dy, x + dx], 0 outside."""
    height, width = image.shape[-2:]
    reach = max(abs(dy), abs(dx))
    padded = F.pad(image, (reach,) * 4)
    return padded[..., reach + dy : reach + dy + height, reach + dx : reach + dx + width]


def unfolded(image, kernel, dilation=1, mode="constant"):
    """What the taps around every pixel of [N, C, H, W] read, [N, C, K * K, H, W]; `mode` is one of F.pad."""
    before, behind = kernel // 2 * dilation, (kernel - 1 - kernel // 2) * dilation
    padded = F.pad(image, (before, behind, before, behind), mode=mode)
    columns = F.unfold(padded, kernel, dilation)
    return columns.view(*image.shape[:2], kernel**2, *image.shape[2:])


def inside(image, kernel, dilation=1):
    """1 where a tap lies in the image, else 0, [1, 1, K * K, H, W]."""
    return unfolded(torch.ones_like(image[:1, :1]), kernel, dilation)


def assert_same_gradients(found, expected, leaves):
    """Of lists of results, with given gradients of them."""
    grads = [double(*out.shape, seed=9 + i) for i, out in enumerate(found)]
    for actual, wanted in zip(
        *(torch.autograd.grad(outputs, leaves, grads, retain_graph=True) for outputs in (found, expected)),
        strict=True,
    ):
        assert_near(actual, wanted)


def assert_same_with_gradients(found, expected, leaves):
    assert_near(found, expected)
    assert_same_gradients([found], [expected], leaves)
