"""Golden values of binnorm: numbers of M. Kanakis' thesis, closed forms, consequences of its equations."""

import math

import pytest
import torch

NAN, INF = math.nan, math.inf


def double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def normal(*shape, scale=1.0, seed=0):
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def value_and_gradient(binnorm, x, k, dy):
    x = x.clone().requires_grad_()
    y = binnorm(x, k)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def test_symmetric_logits(binnorm):
    """The shift is 0."""
    y = binnorm(double(1.0, 1.0, -1.0, -1.0), 2)
    high = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(y, double(high, high, 1 - high, 1 - high), rtol=1e-15, atol=0)
    assert [round(value, 4) for value in y.tolist()] == [0.7311, 0.7311, 0.2689, 0.2689]


@pytest.mark.parametrize("value", [0.0, -3.5, 1e4, -1e30])
@pytest.mark.parametrize(("width", "k"), [(1, 0), (1, 1), (4, 1), (256, 64), (1000, 999)])
def test_constant_logits(binnorm, width, k, value):
    y = binnorm(torch.full((2, width), value, dtype=torch.float64), k)
    torch.testing.assert_close(y, torch.full_like(y, k / width), rtol=1e-13, atol=0)


@pytest.mark.parametrize(("steepness", "high"), [(1, 0.403), (5, 0.870), (10, 0.988), (20, 0.99992)])
def test_two_levels_become_hard(binnorm, steepness, high):
    """64 of 256 logits are larger by 1 times the steepness."""
    x = torch.zeros(256, dtype=torch.float64)
    x[:64] = steepness
    y = binnorm(x, 64)
    digits = 5 if steepness == 20 else 3
    assert round(y[0].item(), digits) == high
    torch.testing.assert_close(y[64:], (64 * (1 - y[0]) / 192).expand(192), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("width", "k"), [(2, 1), (7, 3), (64, 1), (64, 63), (256, 64), (3000, 1500)])
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
def test_rows_sum_to_k(binnorm, width, k, scale):
    x = normal(5, width, scale=scale)
    y = binnorm(x, k)
    assert bool(((y >= 0) & (y <= 1)).all())
    torch.testing.assert_close(y.sum(1), torch.full((5,), float(k), dtype=torch.float64), rtol=1e-13, atol=0)
    nu = torch.logit(y) - x  # one shift for all elements of a row
    inner = (y > 1e-6) & (y < 1 - 1e-6)
    first = torch.stack([row[mask][0] for row, mask in zip(nu, inner, strict=True)])
    assert bool(((nu - first[:, None]).abs()[inner] < 1e-8).all())


def test_a_shift_of_the_logits_changes_nothing(binnorm):
    x = normal(4, 50)
    torch.testing.assert_close(binnorm(x + 1000, 20), binnorm(x, 20), rtol=1e-11, atol=1e-12)


def test_order_is_kept(binnorm, topk_pack):
    x = normal(6, 100)
    assert torch.equal(topk_pack(binnorm(x, 30), 30), topk_pack(x, 30))


def test_steep_logits_give_the_hard_choice(binnorm, topk_pack, unpack_bits):
    x = torch.randperm(256, generator=torch.Generator().manual_seed(0)).double() * 100
    hard = unpack_bits(topk_pack(x, 64), 256).double()
    torch.testing.assert_close(binnorm(x, 64), hard, rtol=0, atol=1e-15)


# ------------------------------------------------------------------------------------ range


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [0, 6])
def test_none_and_all(binnorm, k, dtype):
    x = normal(3, 6).to(dtype)
    y, dx = value_and_gradient(binnorm, x, k, torch.full((3, 6), INF, dtype=dtype))
    assert torch.equal(y, torch.full_like(x, k / 6))
    assert torch.equal(dx, torch.zeros_like(x))


@pytest.mark.parametrize(
    ("row", "k", "expected"),
    [
        ([-INF, 1.0, 1.0], 1, [0.0, 0.5, 0.5]),
        ([INF, 1.0, 1.0], 2, [1.0, 0.5, 0.5]),
        ([INF, -INF, 2.0, 2.0, 2.0, 2.0], 2, [1.0, 0.0, 0.25, 0.25, 0.25, 0.25]),
        ([INF, 1.0, 2.0], 1, [1.0, 0.0, 0.0]),
        ([-INF, 1.0, 2.0], 2, [0.0, 1.0, 1.0]),
        ([INF, -INF], 1, [1.0, 0.0]),
        ([-INF, -INF], 0, [0.0, 0.0]),
        ([INF, INF], 2, [1.0, 1.0]),
        ([INF, 1.0], 0, [NAN, NAN]),
        ([INF, INF, 1.0], 1, [NAN, NAN, NAN]),
        ([-INF, 1.0, 2.0], 3, [NAN, NAN, NAN]),
        ([NAN, 1.0, 2.0], 1, [NAN, NAN, NAN]),
        ([NAN, 1.0], 0, [NAN, NAN]),
        ([NAN, INF], 2, [NAN, NAN]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinite_logits_and_nan(binnorm, row, k, expected, dtype):
    x = torch.tensor(row, dtype=dtype)
    y, dx = value_and_gradient(binnorm, x, k, torch.linspace(1, 2, len(row), dtype=dtype))
    assert torch.allclose(y, torch.tensor(expected, dtype=dtype), rtol=1e-6, atol=0, equal_nan=True)
    assert bool((dx.isnan() == y.isnan()).all())
    assert bool((dx[~((y > 0) & (y < 1)) & ~y.isnan()] == 0).all())


def test_a_bad_row_does_not_touch_others(binnorm):
    x = normal(3, 9)
    good = binnorm(x, 4)
    x[1, 5] = NAN
    y = binnorm(x, 4)
    assert torch.equal(y[[0, 2]], good[[0, 2]])
    assert y[1].isnan().all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e3, 1e4, 1e30])
@pytest.mark.parametrize("shift", [0.0, -1e4, 1e4])
def test_float32_converges_for_any_finite_row(binnorm, scale, shift):
    for width, k in ((2, 1), (17, 5), (64, 63), (256, 64), (2000, 3)):
        x = (normal(20, width, scale=scale) + shift).float()
        y = binnorm(x, k)
        assert y.isfinite().all()
        assert ((y.double().sum(1) - k).abs() <= 1e-5 * k).all()


@pytest.mark.parametrize("far", [30.0, 90.0, 1e3, 1e4])
def test_elements_far_away_leave_the_others_alone(binnorm, far):
    """Ones and zeros for certain beside normal logits, which share the rest: k - 10 of them."""
    x = normal(4, 40)
    ends = torch.full((4, 10), far, dtype=torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        y = binnorm(torch.cat([ends, x, -ends], dim=1).to(dtype), 23)
        expected = binnorm(x.to(dtype), 13)
        torch.testing.assert_close(y[:, 10:50], expected, rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------ gradient


@pytest.mark.parametrize(("width", "k"), [(2, 1), (7, 3), (33, 32), (33, 1), (60, 20)])
def test_gradcheck(binnorm, width, k):
    x = normal(3, width).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: binnorm(t, k), x)


def test_gradient_is_the_formula(binnorm):
    x, dy = normal(5, 40), normal(5, 40, seed=1)
    y, dx = value_and_gradient(binnorm, x, 15, dy)
    h = y * (1 - y)
    mean = (h * dy).sum(1, keepdim=True) / h.sum(1, keepdim=True)
    torch.testing.assert_close(dx, h * (dy - mean), rtol=1e-11, atol=1e-14)
    assert dx.sum(1).abs().max() < 1e-14


def test_jacobian(binnorm):
    """diag(h) - h h^T / sum(h): symmetric, positive semi-definite, and 0 along (1, ..., 1)."""
    x = normal(12)
    jacobian = torch.autograd.functional.jacobian(lambda t: binnorm(t, 5), x)
    torch.testing.assert_close(jacobian, jacobian.T, rtol=0, atol=1e-15)
    assert torch.linalg.eigvalsh(jacobian).min() > -1e-15
    assert (jacobian @ torch.ones(12, dtype=torch.float64)).abs().max() < 1e-15


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_gradient_of_the_output_that_is_not_finite(binnorm, bad):
    """It spoils its row, as in the formula; a row without any h > 0 has gradient 0 all the same."""
    x = normal(3, 6)
    x[2] = torch.tensor([INF, INF, -INF, -INF, -INF, INF])
    dy = normal(3, 6, seed=1)
    dy[1:, 3] = bad
    _, dx = value_and_gradient(binnorm, x, 3, dy)
    assert dx[0].isfinite().all()
    assert not dx[1].isfinite().any()
    assert torch.equal(dx[2], torch.zeros(6, dtype=torch.float64))


def test_training_reaches_a_target(binnorm):
    """A few steps of gradient descent turn random logits into a given choice."""
    target = torch.zeros(32)
    target[::4] = 1
    x = normal(32).float().requires_grad_()
    optimizer = torch.optim.SGD([x], lr=2.0)
    for _ in range(100):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(binnorm(x, 8), target, reduction="sum")
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize("k", [-1, 4])
def test_k_out_of_range(binnorm, k):
    with pytest.raises(ValueError, match=rf"binnorm: expected k in \[0, 3\], got {k}"):
        binnorm(torch.zeros(2, 3), k)
