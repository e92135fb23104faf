"""Per-pixel filters at their limits: windows beyond the image, ends of rows, weights of any size."""

import pytest
import torch

import effops
from effops import reference


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ------------------------------------------------------------------------------------ windows


@pytest.mark.parametrize("border", ["mask", "zero"])
@pytest.mark.parametrize("window", [22, 41])
def test_windows_beyond_the_image(window, border):
    """Taps that no pixel can reach are cut off; with "zero" they still count."""
    q, k, v = (normal(1, 3, 4, 7, seed=seed, dtype=torch.float64).requires_grad_() for seed in range(3))
    found = effops.local_attention(q, k, v, window, border=border)
    expected = reference.local_attention(q, k, v, window, border=border)
    torch.testing.assert_close(found, expected)
    grad = normal(*found.shape, seed=3, dtype=torch.float64)
    for of, wanted in zip(
        torch.autograd.grad(found, (q, k, v), grad),
        torch.autograd.grad(expected, (q, k, v), grad),
        strict=True,
    ):
        torch.testing.assert_close(of, wanted)


def test_enormous_windows():
    """They need no memory of their size."""
    q = normal(1, 4, 3, 2)
    dense = effops.local_attention(q, q, q, 7)
    torch.testing.assert_close(effops.local_attention(q, q, q, 2**30), dense)
    torch.testing.assert_close(effops.local_attention(q, q, q, 5, dilation=2**28), q)
    spread = effops.local_attention(q, q, q, 2**30, border="zero")
    torch.testing.assert_close(spread, torch.zeros_like(q), rtol=0, atol=1e-12)


def test_enormous_strides():
    filters = normal(1, 9, 1, 1)
    image = normal(1, 4, 4, 4)
    found = effops.filter_flow(image, filters, "none", stride=2**31 - 1)
    torch.testing.assert_close(found, reference.filter_flow(image, filters, "none", stride=4))
    one = effops.filter_flow(image, filters[:, :1], "none", stride=2**31 - 1)
    torch.testing.assert_close(one[..., 0, 0], image[..., 0, 0] * filters[:, 0, 0, 0])


# ------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_lowest_logits(dtype, channels):
    """A usual way to mask: where all taps have it, they weigh the same."""
    image = normal(1, channels, 4, 5).to(dtype)
    logits = torch.full((1, 9, 4, 5), torch.finfo(dtype).min, dtype=dtype)
    expected = reference.filter_flow(image, torch.zeros_like(logits), padding_mode="replicate")
    torch.testing.assert_close(effops.filter_flow(image, logits, padding_mode="replicate"), expected)


@pytest.mark.parametrize(("channels", "width"), [(2, 1016), (8, 248), (8, 250)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends_of_rows(dtype, channels, width):
    """Infinite weights of one tile leave nothing behind the shorter rows of the next."""
    image = normal(1, channels, 3, width, dtype=dtype).requires_grad_()
    filters = normal(1, 25, 3, width, seed=1, dtype=dtype)
    at = width // 2
    filters[..., at - 4 : at + 2] = torch.inf
    (gradient,) = torch.autograd.grad(effops.filter_flow(image, filters, "none").sum(), image)
    assert bool(gradient[..., at + 4 :].isfinite().all())
    assert not bool(gradient[..., at - 6 : at + 4].isfinite().any())


@pytest.mark.parametrize("normalize", ["none", "softmax"])
def test_results_may_be_changed_in_place(normalize):
    """Unless backward needs them: torch says so then."""
    image, filters = normal(1, 5, 4, 6).requires_grad_(), normal(1, 9, 4, 6, seed=1).requires_grad_()
    out = effops.filter_flow(image, filters, normalize).relu_()
    if normalize == "softmax":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
        return
    out.sum().backward()
    expected = torch.autograd.grad(reference.filter_flow(image, filters, "none").relu().sum(), filters)
    torch.testing.assert_close(filters.grad, expected[0])
