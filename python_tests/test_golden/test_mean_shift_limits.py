"""Golden tests of mean_shift: rows, weights and kernel values at their limits, dtypes, refusals."""

import pytest
import torch
import torch.nn.functional as F
from pairwise_inputs import assert_same_with_gradients, leaves_of
from rowconv_inputs import FLOATS, INF, NAN, assert_near, double, gradients

# ------------------------------------------------------------------------------------ rare values


def test_points_without_any_weight_stay(mean_shift):
    """Their gradient passes through; the weights get none from them."""
    x, _ = leaves_of()
    w = torch.zeros(2, 9, dtype=torch.float64, requires_grad=True)
    found = mean_shift(x, 6.0, 0.5, 3, w)
    assert_same_with_gradients(found, F.normalize(x, dim=2) + 0 * w[..., None], (x, w))
    seeds = double(2, 4, 3, seed=2).requires_grad_()
    found = mean_shift(x, 6.0, 0.5, 3, w, seeds=seeds)
    assert_same_with_gradients(found, F.normalize(seeds, dim=2) + 0 * (x.sum() + w.sum()), (x, w, seeds))


@pytest.mark.parametrize(
    ("dtype", "kappa", "moves"),
    [
        (torch.float32, 85.0, True),
        (torch.float32, 90.0, False),
        (torch.float64, 90.0, True),
        (torch.float64, 700.0, True),
        (torch.float64, 715.0, False),
    ],
)
def test_subnormal_kernel_values_are_zeros(mean_shift, dtype, kappa, moves):
    """A point of weight 0, orthogonal to the others: exp(-kappa) of it is all there is."""
    x, w = torch.eye(3, dtype=dtype)[[0, 1, 1]], torch.tensor([0, 1, 1], dtype=dtype)
    out = mean_shift(x, kappa, iterations=1, weights=w)
    torch.testing.assert_close(out[0], x[1] if moves else x[0])


def test_zero_rows(mean_shift):
    """They have no direction: all points are equally far away, and the mean of those is where they go."""
    x = torch.tensor([[0, 0], [0.6, 0.8], [0.6, -0.8]], dtype=torch.float64)
    iterates = mean_shift(x, 50.0, iterations=1, return_all=True)
    assert_near(iterates[0, 0], torch.zeros(2).double())
    assert_near(iterates[1, 0], torch.tensor([1, 0]).double())
    alone = mean_shift(torch.zeros(4, 2, dtype=torch.float64), 50.0)
    assert torch.equal(alone, torch.zeros_like(alone))


@pytest.mark.parametrize("where", ["x", "weights"])
@pytest.mark.parametrize("number", [NAN, INF, -INF])
def test_nan_reaches_the_whole_image(mean_shift, where, number):
    """In the first iteration, and all gradients."""
    x, w = leaves_of()
    with torch.no_grad():
        (x[1, 3] if where == "x" else w[1])[2] = number
    for seeds in (None, double(2, 4, 3)):
        out = mean_shift(x, 6.0, iterations=2, weights=w, return_all=True, seeds=seeds)
        assert bool(out[:, 0].isfinite().all())
        assert bool(out[1:, 1].isnan().all())
        for gradient in gradients(out, (x, w)):
            assert bool(gradient[0].isfinite().all())
            assert bool(gradient[1].isnan().all())


def test_weights_that_overflow(mean_shift):
    x = torch.ones(2, 3, 2)
    w = torch.tensor([[1e38, 1e38, 1e38], [2e38, 2e38, 1.0]])
    out = mean_shift(x, 6.0, weights=w)
    assert bool(out[0].isfinite().all())
    assert bool(out[1].isnan().all())


@pytest.mark.parametrize("number", [NAN, INF, -INF])
@pytest.mark.parametrize("tol", [None, 0.2])
def test_nan_in_a_seed_stays_there(mean_shift, number, tol):
    """For tol it is as if it were not there."""
    x, w = (leaf.detach() for leaf in leaves_of())
    seeds = double(2, 100, 3, seed=2)
    bad = [5, 99]
    good = [i for i in range(100) if i not in bad]
    settings = {"iterations": 9, "weights": w, "return_all": True, "tol": tol}
    seeds[1, bad, 0] = number
    found = mean_shift(x, 6.0, seeds=seeds, **settings)
    assert_near(found[:, :, good], mean_shift(x, 6.0, seeds=seeds[:, good], **settings))
    assert_near(found[:, 0], mean_shift(x[0], 6.0, seeds=seeds[0], **(settings | {"weights": w[0]})))
    assert bool(found[1:, 1, bad].isnan().all())


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(mean_shift, dtype):
    """Half precision is rounded once: the iterates keep more."""
    x, w = (leaf.detach().to(dtype) for leaf in leaves_of(points=30))
    out = mean_shift(x, 6.0, 0.9, 4, w)
    assert out.dtype == dtype
    exact = mean_shift(x.double(), 6.0, 0.9, 4, w.double())
    rounding = {torch.float64: 1e-13, torch.float32: 3e-6}.get(dtype, 0.51 * torch.finfo(dtype).eps)
    assert (out.double() - exact).abs().max() <= rounding


@pytest.mark.parametrize("empty", ["B", "N", "M"])
@pytest.mark.parametrize("seeded", [False, True])
def test_empty(mean_shift, empty, seeded):
    b, n, m = (0 if name == empty else 2 for name in "BNM")
    x, w = torch.ones(b, n, 3, requires_grad=True), torch.ones(b, n, requires_grad=True)
    seeds = torch.ones(b, m, 3, requires_grad=True) if seeded else x
    out = mean_shift(x, weights=w, seeds=seeds if seeded else None, iterations=2)
    assert out.shape == seeds.shape
    torch.testing.assert_close(out, torch.full_like(out, 3**-0.5))
    for leaf, gradient in zip((x, w, seeds), gradients(out, (x, w, seeds)), strict=True):
        assert gradient.shape == leaf.shape
        assert gradient.abs().sum() < 1e-6


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(5)},
        {"x": torch.zeros(2, 5, 0)},
        {"x": torch.zeros(2, 5, 513)},
        {"weights": torch.zeros(2, 4)},
        {"weights": torch.zeros(5)},
        {"seeds": torch.zeros(2, 4, 2)},
        {"seeds": torch.zeros(1, 4, 3)},
        {"seeds": torch.zeros(4, 3)},
        {"kappa": -1.0},
        {"kappa": INF},
        {"kappa": NAN},
        {"kappa": torch.ones(2)},
        {"kappa": torch.ones(1, 1)},
        {"eta": -0.1},
        {"eta": 1.1},
        {"eta": NAN},
        {"iterations": -1},
        {"tol": -1e-3},
        {"tol": NAN},
        {"precision": "low"},
    ],
    ids=lambda change: "-".join(change),
)
def test_bad_arguments(mean_shift, change):
    with pytest.raises(ValueError, match="^mean_shift: expected"):
        mean_shift(**({"x": torch.zeros(2, 5, 3)} | change))


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(2, 5, 3, dtype=torch.int64)},
        {"weights": torch.zeros(2, 5).half()},
        {"seeds": torch.zeros(2, 4, 3).double()},
        {"kappa": torch.tensor(6)},
    ],
    ids=lambda change: "-".join(change),
)
def test_wrong_dtypes(mean_shift, change):
    with pytest.raises(TypeError, match="^mean_shift: expected"):
        mean_shift(**({"x": torch.zeros(2, 5, 3)} | change))


def test_a_zero_row_spoils_only_its_own_gradient(mean_shift):
    """It stays, and its gradient is multiplied by 1e12 an iteration until it is infinite."""
    x = double(1, 70, 8).float()
    x[0, 5] = 0
    x.requires_grad_()
    (gradient,) = gradients((mean_shift(x, 100.0) * double(1, 70, 8, seed=1).float()).sum(), (x,))
    assert (~gradient.isfinite()).any(-1).nonzero().tolist() == [[0, 5]]


def test_norms_beyond_float32(mean_shift):
    """Finite rows of an infinite norm are no Inf."""
    torch.testing.assert_close(mean_shift(torch.full((1, 3, 16), 2e38)), torch.full((1, 3, 16), 0.25))


def test_nothing_depends_on_weights_at_eta_0(mean_shift):
    x, w = leaves_of()
    found = mean_shift(x, 36.0, 0.0, 3, w)
    assert_same_with_gradients(found, F.normalize(x, dim=2) + 0 * w[..., None], (x, w))
