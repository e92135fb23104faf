"""Golden values of mean_shift: numbers of the specification, closed forms, attention, backward."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pairwise_inputs import assert_same_with_gradients, leaves_of, two_clusters
from rowconv_inputs import FLOATS, assert_near, double, gradients

NORMS = {1: 1e30, 2: 1e-6, 3: 0.5}  # of some rows, which do not matter


def degrees_of(rows):
    return torch.atan2(rows[..., 1], rows[..., 0]).rad2deg()


def equiangular(count, cosine):
    """The products of unit vectors of which any two have one cosine."""
    return torch.full((count, count), cosine, dtype=torch.float64).fill_diagonal_(1)


# ------------------------------------------------------------------------------------ numbers


def test_golden_five_points(mean_shift):
    i = torch.arange(5, dtype=torch.float64)
    x = torch.stack([i.cos(), i.sin(), (2 * i + 1).cos()], 1)
    out = mean_shift(x, 6.0, iterations=3)
    assert out[:, 0].tolist() == pytest.approx([0.8820, 0.3802, -0.5787, -0.7367, -0.4845], abs=5e-5)


@pytest.mark.parametrize(
    ("kappa", "eta", "expected"),
    [
        (6, 1.0, [20, 12.4294, 3.41838, 0.0729965, 7.109e-7]),
        (6, 1.0, [30, 27.591, 24.1595, 18.9102, 10.8254]),
        (6, 1.0, [45, 44.858]),
        (36, 1.0, [10, 7.98212, 4.81452, 1.19807, 0.0188569]),
        (100, 1.0, [5, 3.20904, 0.974856, 0.0282134]),
        (6, 0.5, [20, 16.287647, 11.878473, 7.482653, 4.137092]),
        (6, 0.0, [20, 20, 20]),
        (0, 1.0, [20, 0, 0]),
    ],
)
def test_two_clusters(mean_shift, kappa, eta, expected):
    """At +- t: tan t' = tan t ((1 - eta) + eta tanh(kappa sin^2 t))."""
    iterates = mean_shift(two_clusters(expected[0]), kappa, eta, len(expected) - 1, return_all=True)
    angles = degrees_of(iterates)
    assert angles[:, 0].tolist() == pytest.approx(expected, rel=5e-5)
    assert_near(angles[:, 1], -angles[:, 0])
    tangents = angles[:, 0].deg2rad().tan()
    sines = angles[:, 0].deg2rad().sin()
    assert_near(tangents[1:], (tangents * (1 - eta + eta * (kappa * sines**2).tanh()))[:-1])


@pytest.mark.parametrize(("count", "cosine"), [(2, 0.0), (3, 0.3), (5, -0.2), (40, 0.5)])
@pytest.mark.parametrize("kappa", [3.0, 6.0, 36.0])
def test_equiangular_clusters(mean_shift, kappa, count, cosine):
    """Each of several points; all clusters stay equiangular, with a cosine that follows a recursion."""
    points = torch.linalg.cholesky(equiangular(count, cosine)).repeat_interleave(3, 0)
    iterates = mean_shift(points, kappa, iterations=5, return_all=True)
    for rows in iterates:
        b, total = math.exp(kappa * (cosine - 1)), 1 + (count - 1) * cosine
        assert_near(rows[::3] @ rows[::3].T, equiangular(count, cosine))
        assert_near(rows[::3], rows[2::3])
        shared = 2 * (1 - b) * b * total + b * b * count * total
        cosine = ((1 - b) ** 2 * cosine + shared) / ((1 - b) ** 2 + shared)


@pytest.mark.parametrize(
    ("count", "iterations", "expected"),
    [(2, 10, 0.058), (10, 10, 0.073), (20, 10, 0.104), (64, 10, 0.972), (20, 16, 0.600)],
)
def test_a_small_kappa_merges_orthogonal_clusters(mean_shift, count, iterations, expected):
    points = torch.eye(count, dtype=torch.float64)
    rows = mean_shift(points, 6.0, iterations=iterations)
    assert (rows[0] @ rows[1]).item() == pytest.approx(expected, abs=5e-4)
    still = mean_shift(points, 36.0, iterations=iterations)
    torch.testing.assert_close(still, points, rtol=0, atol=1e-12)


def test_a_large_background_turns_small_objects(mean_shift):
    """By 44.8 degrees in one iteration, 20000 pixels to 50 and orthogonal; not with a larger kappa."""
    points, weights = torch.eye(2, dtype=torch.float64), torch.tensor([20000, 50]).double()
    turned = mean_shift(points, 6.0, iterations=1, weights=weights)[1]
    assert 90 - degrees_of(turned).item() == pytest.approx(44.8, abs=0.05)
    still = mean_shift(points, 36.0, iterations=1, weights=weights)[1]
    assert degrees_of(still).item() == pytest.approx(90, abs=1e-10)


def test_a_large_kappa_freezes_wide_clusters(mean_shift):
    """kappa = 100: +- 10 degrees become +- 9.95."""
    out = mean_shift(two_clusters(10.0), 100.0, iterations=1)
    assert degrees_of(out)[0].item() == pytest.approx(9.95, abs=0.005)


def test_gaussian_clusters_shrink_cubically(mean_shift):
    """s' = s^3 / (s^2 + h^2) with h = kappa^-1/2, up to the bend of the circle. Weights: a quadrature."""
    nodes, shares = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(20))
    angle = 0.04914 * nodes
    points = torch.stack([angle.cos(), angle.sin()], 1)
    iterates = mean_shift(points, 25.0, iterations=2, weights=shares / shares.sum(), return_all=True)
    angles = torch.atan2(iterates[..., 1], iterates[..., 0])
    spread = (shares / shares.sum() * angles**2).sum(1).sqrt()
    assert spread.tolist() == pytest.approx([0.04914, 0.00280, 5.47e-7], rel=1e-2)


# ------------------------------------------------------------------------------------ definitions


@pytest.mark.parametrize("kappa", [0.0, 6.0, 36.0, 100.0])
def test_one_iteration_is_softmax_attention(mean_shift, kappa):
    x, _ = leaves_of(points=20)
    rows = F.normalize(x, dim=2)
    for _ in range(2):
        rows = F.normalize(F.scaled_dot_product_attention(rows, rows, rows, scale=kappa), dim=2)
    assert_same_with_gradients(mean_shift(x, kappa, iterations=2), rows, (x,))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_seeds_attend_to_points_that_stay(mean_shift, eta):
    """The weights are a mask that is added to the logits: exp(log w)."""
    x, w = leaves_of(points=20)
    seeds = double(2, 7, 3, seed=2).requires_grad_()
    points, rows = F.normalize(x, dim=2), F.normalize(seeds, dim=2)
    mask = w.log()[:, None, :].expand(-1, 7, -1)
    for _ in range(3):
        mean = F.scaled_dot_product_attention(rows, points, points, mask, scale=6.0)
        rows = F.normalize((1 - eta) * rows + eta * mean, dim=2)
    found = mean_shift(x, 6.0, eta, 3, w, seeds=seeds)
    assert_same_with_gradients(found, rows, (x, w, seeds))


def test_points_as_seeds(mean_shift):
    """One iteration is that of the points themselves; further ones are not, as the points stay."""
    x, w = (leaf.detach() for leaf in leaves_of())
    one = mean_shift(x, 6.0, 0.7, 1, w)
    assert_near(mean_shift(x, 6.0, 0.7, 1, w, seeds=x), one)
    two = mean_shift(x, 6.0, 0.7, 2, w, seeds=x)
    assert_near(two, mean_shift(x, 6.0, 0.7, 1, w, seeds=one))
    assert (two - mean_shift(x, 6.0, 0.7, 2, w)).abs().max() > 0.01


def test_weights_count_points(mean_shift):
    """A whole weight is so many copies of a point; the gradient of one is shared by them."""
    x, _ = leaves_of()
    copies = torch.tensor([1, 3, 1, 2, 0, 4, 1, 0, 2])
    grad = double(2, 9, 3, seed=3) * (copies > 0)[:, None]
    found = mean_shift(x, 6.0, 0.8, 3, copies.double().expand(2, -1))
    many = x.repeat_interleave(copies, 1)
    out = mean_shift(many, 6.0, 0.8, 3)
    assert_near(out, found.repeat_interleave(copies, 1))
    shares = (grad / copies.clamp(min=1)[:, None]).repeat_interleave(copies, 1)
    assert_near(gradients(out, (x,), shares)[0], gradients(found, (x,), grad)[0])


def test_only_ratios_of_weights_matter(mean_shift):
    x, w = leaves_of()
    found = mean_shift(x, 6.0, 0.8, 3, 1e5 * w)
    assert_same_with_gradients(found, mean_shift(x, 6.0, 0.8, 3, w), (x, w))
    assert_near(mean_shift(x, 6.0, weights=torch.full_like(w, 0.1)), mean_shift(x, 6.0))


def test_lengths_of_rows_do_not_matter(mean_shift):
    x, _ = (leaf.detach() for leaf in leaves_of())
    scaled = x.clone()
    for row, norm in NORMS.items():
        scaled[:, row] *= norm
    assert_near(mean_shift(scaled, 6.0), mean_shift(x, 6.0))
    assert_near(mean_shift(x, 6.0, iterations=0), F.normalize(x, dim=2))


def test_images_do_not_see_each_other(mean_shift):
    x, w = (leaf.detach() for leaf in leaves_of())
    together = mean_shift(x, 6.0, weights=w, return_all=True)
    for image in range(2):
        assert_near(together[:, image], mean_shift(x[image], 6.0, weights=w[image], return_all=True))
    seeded = mean_shift(x, 6.0, seeds=x[:, :4])
    assert_near(seeded[1], mean_shift(x[1], 6.0, seeds=x[1, :4]))


@pytest.mark.parametrize("seeded", [False, True])
def test_iterates(mean_shift, seeded):
    """The normalised rows, then one per iteration; gradients of all of them add up."""
    x, w = leaves_of()
    seeds = double(2, 4, 3, seed=2) if seeded else None
    iterates = mean_shift(x, 6.0, 0.9, 3, w, True, seeds=seeds)
    assert iterates.shape == (4, 2, 4 if seeded else 9, 3)
    one_by_one = torch.stack([mean_shift(x, 6.0, 0.9, t, w, seeds=seeds) for t in range(4)])
    assert_same_with_gradients(iterates, one_by_one, (x, w))


def test_kappa_as_a_tensor(mean_shift):
    x, w = leaves_of()
    for shape in ((), (1,)):
        for dtype in FLOATS:
            kappa = torch.full(shape, 6.5, dtype=dtype, requires_grad=True)
            out = mean_shift(x, kappa, 0.9, 3, w)
            assert_near(out, mean_shift(x, 6.5, 0.9, 3, w))
            (gradient,) = gradients(out, (kappa,), double(*out.shape, seed=3))
            assert (gradient.dtype, gradient.shape) == (dtype, shape)
    exact = torch.tensor(6.5, dtype=torch.float64, requires_grad=True)
    (gradient,) = gradients(mean_shift(x, exact, 0.9, 3, w), (exact,), double(2, 9, 3, seed=3))
    above, below = (mean_shift(x, 6.5 + step, 0.9, 3, w) for step in (1e-5, -1e-5))
    difference = (double(2, 9, 3, seed=3) * (above - below)).sum().item() / 2e-5
    assert gradient.item() == pytest.approx(difference, rel=1e-7)


# ------------------------------------------------------------------------------------ backward


def backward_of_one_iteration(grad, points, kappa, eta, symmetric=True):
    """The matrices of the thesis, corrected: columns are points, P = (1 - eta) I + eta K D^-1, Y = X P.

    Returns:
        The gradients of X and of kappa.
    """
    x, identity = points.T, torch.eye(len(points), dtype=torch.float64)
    similarity = x.T @ x
    kernel = (kappa * (similarity - 1)).exp()
    q = 1 / kernel.sum(0)
    p = (1 - eta) * identity + eta * kernel * q
    y = x @ p
    norm = y.norm(dim=0)
    grad_y = (grad.T - y / norm * (y / norm * grad.T).sum(0)) / norm
    grad_p = x.T @ grad_y
    grad_x = grad_y @ p.T
    grad_q = eta * (grad_p * kernel).sum(0)
    grad_kernel = eta * grad_p * q - grad_q * q**2
    grad_similarity = kappa * kernel * grad_kernel
    transposed = grad_similarity.T if symmetric else grad_similarity
    grad_x = grad_x + x @ (grad_similarity + transposed)
    return grad_x.T, (similarity * kernel * grad_kernel).sum()


@pytest.mark.parametrize(("kappa", "eta"), [(6.0, 1.0), (6.0, 0.5), (36.0, 1.0), (36.0, 0.5)])
def test_backward_of_the_thesis_corrected(mean_shift, kappa, eta):
    """Its code has 2 X G_S for X (G_S + G_S^T), which is no rounding error."""
    x = F.normalize(double(40, 3), dim=1).requires_grad_()
    k = torch.tensor(kappa, dtype=torch.float64, requires_grad=True)
    grad = double(40, 3, seed=1)
    iterates = mean_shift(x, k, eta, 3, return_all=True).detach()
    found, found_k = gradients(mean_shift(x, k, eta, 3), (x, k), grad)
    wrong, expected_k = grad, 0
    expected = grad
    for points in reversed(iterates[:3]):
        wrong = backward_of_one_iteration(wrong, points, kappa, eta, symmetric=False)[0]
        expected, of_kappa = backward_of_one_iteration(expected, points, kappa, eta)
        expected_k = expected_k + of_kappa
    tangential = expected - x * (x * expected).sum(1, keepdim=True)
    assert_near(found, tangential.detach())
    assert_near(found_k, expected_k)
    assert (wrong - expected).norm() > 0.1 * expected.norm()


# ------------------------------------------------------------------------------------ stops


@pytest.mark.parametrize("seeded", [False, True])
def test_tol_stops_each_image_for_itself(mean_shift, seeded):
    """At +- 20 degrees: 20 -> 12.4294 -> 3.41838 -> 0.0730; a step is a chord, the largest counts."""
    x = torch.stack([two_clusters(20.0), two_clusters(45.0)])
    seeds = x if seeded else None
    free = mean_shift(x, 6.0, iterations=6, return_all=True, seeds=seeds)
    steps = (free[1:] - free[:-1]).norm(dim=3).amax(2)
    for tol in (0.0, 0.01, 0.1, 0.14, 0.2, 3.0):
        found = mean_shift(x, 6.0, iterations=6, return_all=True, tol=tol, seeds=seeds)
        for image in range(2):
            last = next((t for t in range(6) if steps[t, image] <= tol), 5) + 1
            assert_near(found[: last + 1, image], free[: last + 1, image])
            assert_near(found[last:, image], free[last, image].expand(7 - last, -1, -1))
        assert_near(mean_shift(x, 6.0, iterations=6, tol=tol, seeds=seeds), found[-1])


@pytest.mark.parametrize("seeded", [False, True])
def test_gradients_after_a_stop(mean_shift, seeded):
    """Those of the repeated iterates go to the one that they repeat."""
    x, w = leaves_of()
    with torch.no_grad():
        x[1] = x[1, :1] + 0.01 * x[1]  # which stops early
    k = torch.tensor(6.0, dtype=torch.float64, requires_grad=True)
    seeds = x[:, :4].detach().requires_grad_() if seeded else None
    leaves = (x, w, k, seeds) if seeded else (x, w, k)
    found = mean_shift(x, k, 1.0, 6, w, True, seeds=seeds, tol=1e-3)
    stopped = [mean_shift(x, k, 1.0, t, w, seeds=seeds) for t in range(7)]
    last = [int((found[:, image] != found[-1, image]).any(2).any(1).sum()) for image in range(2)]
    assert last[1] < last[0]
    expected = torch.stack(
        [torch.stack([stopped[min(t, last[image])][image] for image in range(2)]) for t in range(7)]
    )
    assert_same_with_gradients(found, expected, leaves)
