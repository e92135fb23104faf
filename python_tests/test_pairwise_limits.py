"""Mean shift and the embedding loss at their limits: pairs that may be skipped, memory, extreme numbers."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from helpers import REPOSITORY

import effops
from effops import reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
ROUNDING = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def mixed(count, seed=0):
    return torch.randperm(count, generator=generator(seed))


# ------------------------------------------------------------------------------------ skipped pairs
#
# A pair of tiles may be left out where the kernel weights of all that a point loses sum up to no more than
# eps = 2^-24 (2^-53) of those that it keeps, which moves it by no more than 2 eps in one iteration.


def pole_and_arc(polar, azimuths, pole):
    """`pole` points on the axis z, behind points at the angle `polar` from it."""
    arc = torch.stack(
        [polar.sin() * azimuths.cos(), polar.sin() * azimuths.sin(), polar.cos() + 0 * azimuths], 1
    )
    return torch.cat([arc, torch.tensor([[0.0, 0, 1]], dtype=torch.float64).expand(pole, 3)])


@DTYPES
@pytest.mark.parametrize("kappa", [36.0, 100.0, 1000.0])
@pytest.mark.parametrize("kernel", [0.04, 0.9, 3.0, 100.0, 1e4])
def test_many_negligible_tiles_together_count(dtype, kappa, kernel):
    """Points on one side of the pole, each of `kernel` eps: no tile of them moves it much, all of them do.

    Exactly: sum over the arc of w K x / (pole + sum of w K).
    """
    eps = ROUNDING[dtype]
    cosine = 1 + math.log(kernel * eps) / kappa
    if cosine < -0.9:
        pytest.skip("no two points are so far apart")
    azimuths = torch.linspace(-1, 1, 1216, dtype=torch.float64)
    points = pole_and_arc(torch.tensor(cosine, dtype=torch.float64).acos(), azimuths, 64)
    order = mixed(1280)
    x = points[order].to(dtype)
    exact = x.double()
    weights = (kappa * (exact @ exact[order == 1279].T - 1)).exp()
    wanted = F.normalize((weights * exact).sum(0), dim=0)
    found = effops.mean_shift(x, kappa, iterations=1)[order >= 1216]
    assert wanted[0] > 5 * kernel * eps * (1 - cosine**2) ** 0.5
    # Numbers near 0 are rounded to digits of their own, but the kernel's exponents have errors of kappa eps.
    error = (found.double() - wanted)[:, :2].norm(dim=1).max()
    assert error <= 2 * eps + 4 * (kappa + 100) * eps * wanted[0]


@DTYPES
@pytest.mark.parametrize("kappa", [36.0, 100.0, 1000.0])
@pytest.mark.parametrize("ratio", [1e-3, 1.0, 1e3])
def test_heavy_points_far_away(dtype, kappa, ratio):
    """Their kernel value is eps^2, but their weights make up for it: x + ratio y for points x and those y."""
    eps = ROUNDING[dtype]
    angle = math.acos(max(1 + 2 * math.log(eps) / kappa, -0.5))
    kernel = math.exp(kappa * (math.cos(angle) - 1))
    is_heavy = torch.arange(640) < 320
    both = torch.tensor([[1.0, 0], [math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    x, w = both[is_heavy.long()], 1 + (ratio / kernel - 1) * is_heavy.double()
    order = mixed(640)
    found = effops.mean_shift(x[order].to(dtype), kappa, iterations=1, weights=w[order].to(dtype))
    wanted = torch.where(is_heavy[order, None], both[1], F.normalize(both[0] + ratio * both[1], dim=0))
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=10 * (kappa + 100) * eps)


@DTYPES
@pytest.mark.parametrize("kappa", [36.0, 80.0])
def test_tiles_without_weight_go_to_the_others(dtype, kappa):
    """However far those are."""
    points = torch.eye(3, dtype=dtype)[torch.arange(1000) % 2]
    weights = points[:, 1] * torch.rand(1000, generator=generator(1)).to(dtype)
    found = effops.mean_shift(points, kappa, iterations=1, weights=weights)
    torch.testing.assert_close(found, torch.eye(3, dtype=dtype)[1].expand_as(found))
    order = points[:, 0].argsort(stable=True)  # whole tiles without weight
    found = effops.mean_shift(points[order], kappa, iterations=1, weights=weights[order])
    torch.testing.assert_close(found, torch.eye(3, dtype=dtype)[1].expand_as(found))


def on_a_circle(count):
    """Evenly spread over half of it: every distance."""
    angle = math.pi * torch.arange(count, dtype=torch.float64) / count
    return torch.stack([angle.cos(), angle.sin()], 1)


def groups(count, channels, noise):
    """Around 12 directions, and now and then one anywhere."""
    centres = F.normalize(normal(12, channels, seed=3), dim=1)
    points = centres[torch.arange(count) * 12 // count] + noise * normal(count, channels, seed=4)
    points[::97] = normal(len(points[::97]), channels, seed=5)
    return points


def sizes(kind, count):
    if kind == "one":
        return torch.ones(count, dtype=torch.float64)
    weights = torch.rand(count, generator=generator(6), dtype=torch.float64)
    if kind == "zeros":
        return weights * (weights > 0.5) * (torch.arange(count) // 128 % 3 > 0)
    return 10 ** (16 * weights - 8)


POINTS = {
    "circle": lambda: on_a_circle(1300),
    "groups3": lambda: groups(1200, 3, 0.05),
    "groups16": lambda: groups(800, 16, 0.05),
    "groups64": lambda: groups(700, 64, 0.03),
}


@DTYPES
@pytest.mark.parametrize("weights", ["one", "zeros", "huge"])
@pytest.mark.parametrize("kappa", [36.0, 100.0, 1000.0, 1e5])
@pytest.mark.parametrize("points", POINTS)
def test_agrees_with_all_pairs(dtype, kappa, points, weights):
    """One iteration of points as their own seeds is the same, and leaves no pair out."""
    x = POINTS[points]()
    order = mixed(len(x), 7)
    x, w = x[order].to(dtype), sizes(weights, len(x))[order].to(dtype)
    grad = normal(*x.shape, seed=8).to(dtype)
    expected = one_iteration(x, w, grad, kappa, seeded=True)
    found = one_iteration(x, w, grad, kappa, seeded=False)
    allowed = {"rows": 50, "x": 500, "weights": 500, "kappa": 100 * (kappa + 100)}
    for name, wanted in expected.items():
        error = (found[name] - wanted).abs().max() / wanted.abs().max().clamp(min=1)
        assert error <= allowed[name] * ROUNDING[dtype], name


def one_iteration(x, w, grad, kappa, *, seeded):
    """Rows, and gradients of the points and of the logarithms of weights and kappa."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    k = torch.tensor(kappa, dtype=x.dtype, requires_grad=True)
    rows = effops.mean_shift(x, k, iterations=1, weights=w, seeds=x if seeded else None)
    of_x, of_w, of_k = torch.autograd.grad(rows, (x, w, k), grad)
    return {"rows": rows.detach(), "x": of_x, "weights": (of_w * w).detach(), "kappa": kappa * of_k}


@DTYPES
@pytest.mark.parametrize("kappa", [36.0, 100.0])
@pytest.mark.parametrize("points", POINTS)
def test_agrees_with_the_definition(dtype, kappa, points):
    """Several iterations, in float64: up to what rounding of the points does to it."""
    x = POINTS[points]()[mixed(len(POINTS[points]()), 7)].to(dtype)
    expected = reference.mean_shift(x.double(), kappa, iterations=3)
    changed = x.double() * (1 + ROUNDING[dtype] * normal(*x.shape, seed=9))
    noise = (reference.mean_shift(changed, kappa, iterations=3) - expected).abs().max()
    error = (effops.mean_shift(x, kappa, iterations=3).double() - expected).abs().max()
    assert error <= 10 * noise + 100 * ROUNDING[dtype]


@DTYPES
def test_the_order_of_points_does_not_matter(dtype):
    x, order = groups(900, 16, 0.1).to(dtype), mixed(900)
    rows = effops.mean_shift(x, 36.0, iterations=3)
    found = effops.mean_shift(x[order], 36.0, iterations=3)
    torch.testing.assert_close(found, rows[order], rtol=0, atol=300 * ROUNDING[dtype])
    labels = torch.arange(900) * 12 // 900
    loss = effops.pairwise_embedding_loss(x, labels)
    other = effops.pairwise_embedding_loss(x[order], labels[order])
    torch.testing.assert_close(other, loss, rtol=100 * ROUNDING[dtype], atol=0)
    first = effops.mean_shift_cluster(x)
    assert torch.equal(renamed(effops.mean_shift_cluster(x[order])), renamed(first[order]))


def renamed(labels):
    """Labels in the order of their first members."""
    found, inverse = labels.unique(return_inverse=True)
    firsts = torch.stack([(labels == label).nonzero()[0, 0] for label in found])
    return firsts.argsort().argsort()[inverse]


# ------------------------------------------------------------------------------------ extreme numbers


@DTYPES
@pytest.mark.parametrize("count", [5, 300])
def test_lengths_of_rows(dtype, count):
    """1e30, 1e-11 and 1e-30, which is no direction any more, and zeros; with gradients."""
    factors = torch.tensor([1, 1e30, 1e-11, 1e-30, 0], dtype=torch.float64).repeat(count // 5)
    x = (factors[:, None] * F.normalize(normal(count, 4), dim=1)).to(dtype)
    grad = normal(count, 4, seed=1)
    for kappa in (0.0, 10.0, 60.0):
        leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
        found = effops.mean_shift(leaf, kappa, iterations=2)
        expected = reference.mean_shift(exact, kappa, iterations=2)
        tolerance = 100 * (kappa + 10) * ROUNDING[dtype]
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
        (gradient,) = torch.autograd.grad(found, leaf, grad.to(dtype))
        (wanted,) = torch.autograd.grad(expected, exact, grad)
        scale = 1 / factors.clamp(min=1e-12)[:, None]
        torch.testing.assert_close(gradient.double() / scale, wanted / scale, rtol=0, atol=30 * tolerance)


@DTYPES
def test_no_kernel(dtype):
    """kappa = 0: all go to the mean; opposite points have none and end as zeros."""
    x, w = normal(200, 3).to(dtype), torch.rand(200, generator=generator(1)).to(dtype)
    mean = F.normalize((w[:, None] * F.normalize(x, dim=1)).sum(0), dim=0)
    found = effops.mean_shift(x, 0.0, iterations=2, weights=w)
    torch.testing.assert_close(found, mean.expand_as(found), rtol=0, atol=1000 * ROUNDING[dtype])
    axes = torch.cat([torch.eye(3, dtype=dtype), -torch.eye(3, dtype=dtype)]).repeat(30, 1)
    assert not effops.mean_shift(axes, 0.0).any()


@DTYPES
@pytest.mark.parametrize("kappa", [1e3, 1e6, 1e30])
def test_enormous_kappa(dtype, kappa):
    """Nothing but copies of a point counts, and those stay."""
    x = F.normalize(normal(50, 8), dim=1).repeat(8, 1)[mixed(400)].to(dtype)
    found = effops.mean_shift(x, kappa, iterations=3)
    torch.testing.assert_close(found, F.normalize(x, dim=1), rtol=0, atol=20 * ROUNDING[dtype])


@DTYPES
@pytest.mark.parametrize("kappa", [1.0, 36.0, 1e6])
def test_opposite_points(dtype, kappa):
    """Both ends of an axis, one heavier, stay; with a small kappa those of the lighter end step over."""
    x = torch.tensor([[0.6, 0.8, 0], [-0.6, -0.8, 0]], dtype=dtype).repeat(150, 1)
    w = torch.tensor([1.0, 1e-3], dtype=dtype).repeat(150)
    found = effops.mean_shift(x, kappa, iterations=2, weights=w)
    light = -1 if math.exp(-2 * kappa) < 1e-3 else 1
    expected = x * torch.tensor([1.0, -light], dtype=dtype).repeat(150)[:, None]
    torch.testing.assert_close(found, expected, rtol=0, atol=200 * ROUNDING[dtype])


@DTYPES
@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_enormous_weights(dtype, factor):
    """Only their ratios matter, also for gradients."""
    x, w = normal(300, 5).to(dtype).requires_grad_(), torch.rand(300, generator=generator(1)).to(dtype)
    grad = normal(300, 5, seed=2).to(dtype)
    results = []
    for scale in (1.0, factor):
        weights = (scale * w).requires_grad_()
        rows = effops.mean_shift(x, 36.0, iterations=2, weights=weights)
        of_x, of_w = torch.autograd.grad(rows, (x, weights), grad)
        loss = effops.pairwise_embedding_loss(x, torch.arange(300) % 7, 0.5, weights)
        loss_x, loss_w = torch.autograd.grad(loss, (x, weights))
        results.append([rows.detach(), of_x, of_w * scale, loss.detach(), loss_x, loss_w * scale])
    for found, expected in zip(*results, strict=True):
        tolerance = 1e3 * ROUNDING[dtype] * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------ loss


@DTYPES
@pytest.mark.parametrize("normalize", ["sum_w", "thesis", "none"])
@pytest.mark.parametrize(("count", "channels"), [(700, 64), (130, 3), (64, 16), (65, 2)])
def test_loss_of_many_points(dtype, normalize, count, channels):
    """Instances of 1 to some hundred points in any order, a third ignored."""
    labels = (normal(2, count, seed=1).abs() * 9).long().remainder(13)
    labels = torch.where(normal(2, count, seed=2) > 0.4, -1, labels)
    x = F.normalize(normal(13, channels), dim=1)[labels] + 0.2 * normal(2, count, channels, seed=3)
    w = torch.rand(2, count, generator=generator(4), dtype=torch.float64)
    results = []
    for op, precision in ((effops.pairwise_embedding_loss, dtype), (reference.pairwise_embedding_loss, None)):
        leaves = [t.to(dtype).to(precision or torch.float64).requires_grad_() for t in (x, w)]
        for weights in (None, leaves[1]):
            loss = op(leaves[0], labels, 0.6, weights, normalize)
            used = leaves[: 1 if weights is None else 2]
            results.append([loss, *torch.autograd.grad(loss, used)])
    for found, expected in zip(results[:2], results[2:], strict=True):
        for actual, wanted in zip(found, expected, strict=True):
            tolerance = 200 * ROUNDING[dtype] * wanted.abs().max().item()
            torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=tolerance)


def test_collapsed_instances_cost_nothing():
    """Positive costs of copies cancel to rounding, however many there are."""
    x = F.normalize(normal(1, 64), dim=1).float().expand(4000, 64)
    loss = effops.pairwise_embedding_loss(x, torch.zeros(4000, dtype=torch.int64))
    assert abs(loss.item()) < 3e-7


# ------------------------------------------------------------------------------------ memory

MEMORY_POINTS, MEMORY_CHANNELS = 8192, 16
MEASURES = os.access("/proc/self/clear_refs", os.W_OK) and "asan" not in os.environ.get("LD_PRELOAD", "")


def memory_case(device, name):
    """For extra_bytes of bench/memory.py, in a process of its own."""

    def call(count):
        x = groups(count, MEMORY_CHANNELS, 0.1).float().to(device)
        labels = (torch.arange(count) * 12 // count).to(device)
        if name == "mean_shift_cluster":
            return effops.mean_shift_cluster(x, iterations=2)
        x.requires_grad_()
        is_loss = name == "pairwise_embedding_loss"
        out = effops.pairwise_embedding_loss(x, labels) if is_loss else effops.mean_shift(x, iterations=2)
        return torch.autograd.grad(out.sum(), x)[0]

    return lambda: call(200), lambda: call(MEMORY_POINTS)


@pytest.mark.skipif(not MEASURES, reason="needs Linux, and no sanitizer, to see the peak of a process")
@pytest.mark.parametrize("name", ["mean_shift", "mean_shift_cluster", "pairwise_embedding_loss"])
def test_memory(monkeypatch, name):
    """Forward and backward need some copies of the points, not a matrix of all pairs: that takes 256 MiB."""
    monkeypatch.syspath_prepend(REPOSITORY / "bench")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY / "python_tests"))
    import memory

    needed = memory.extra_bytes("test_pairwise_limits", "memory_case", "cpu", name)
    assert needed < 24 * 4 * MEMORY_POINTS * MEMORY_CHANNELS


# ------------------------------------------------------------------------------------ scikit-learn


@pytest.mark.parametrize(("channels", "noise"), [(3, 0.02), (16, 0.03)])
def test_same_groups_as_scikit_learn(channels, noise):
    """Its kernel is flat, which does not matter where groups are far apart. Labels have other names."""
    from sklearn import cluster

    centres = torch.cat([torch.eye(channels)[:3], -torch.eye(channels)[:3]])
    members = torch.randint(6, (400,), generator=generator(0))
    x = F.normalize(centres[members] + noise * normal(400, channels, dtype=torch.float32), dim=1)
    labels = torch.from_numpy(cluster.MeanShift(bandwidth=0.5).fit(x.numpy()).labels_).long()
    assert torch.equal(renamed(labels), renamed(effops.mean_shift_cluster(x)))
    assert torch.equal(renamed(labels), renamed(members))
