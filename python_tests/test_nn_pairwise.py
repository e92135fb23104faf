"""MeanShiftGrouping and PairwiseEmbeddingLoss: settings, layouts of maps and points, training."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional

import effops
from effops import reference
from effops.losses import PairwiseEmbeddingLoss
from effops.nn import MeanShiftGrouping
from effops.testing import assert_close


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def stripes(batch=2, height=4, width=6, count=3):
    """Labels [B, H, W] of so many vertical stripes."""
    return (torch.arange(width) * count // width).expand(batch, height, width)


def as_points(maps):
    return maps.flatten(2).mT


# ------------------------------------------------------------------------------------ MeanShiftGrouping

SHIFT_SETTINGS = [
    {},
    {"kappa": 9, "eta": 0.5, "iterations": 3},
    {"kappa": 20.0, "iterations": 6, "tol": 0.05, "return_all": True},
]


@pytest.mark.parametrize("settings", SHIFT_SETTINGS, ids=lambda settings: "-".join(settings) or "default")
def test_grouping_passes_its_settings(settings):
    x, weights = normal(2, 15, 4), normal(2, 15, seed=1).abs()
    for given in (None, weights):
        found = MeanShiftGrouping(**settings)(x, given)
        assert torch.equal(found, effops.mean_shift(x, weights=given, **settings))


@pytest.mark.parametrize("return_all", [False, True])
def test_grouping_of_maps_is_that_of_their_pixels(return_all):
    maps, weights = normal(2, 4, 3, 5), normal(2, 3, 5, seed=1).abs()
    module = MeanShiftGrouping(8.0, iterations=2, return_all=return_all)
    found = module(maps, weights)
    expected = module(as_points(maps), weights.flatten(1))
    assert found.shape == ((3, 2, 4, 3, 5) if return_all else (2, 4, 3, 5))
    assert torch.equal(found.flatten(-2).mT, expected)
    assert_close(found.norm(dim=-3), torch.ones_like(found[..., 0, :, :]), 1e-6)
    last = module(maps.contiguous(memory_format=torch.channels_last), weights)
    assert torch.equal(last, found)


def test_grouping_moves_pixels_of_a_region_together():
    labels = stripes()
    centers = functional.normalize(normal(3, 8), dim=1)
    noisy = centers[labels].movedim(-1, 1) + 0.1 * normal(2, 8, 4, 6, seed=1)
    module = MeanShiftGrouping(20.0)
    moved = as_points(module(noisy))
    same = labels.flatten(1)[:, :, None] == labels.flatten(1)[:, None, :]
    assert (moved @ moved.mT)[same].min() > 0.999
    assert torch.equal(
        module.labels(noisy), labels
    )  # stripes of one size, in the order of their first pixels
    assert torch.equal(module.labels(as_points(noisy)), labels.flatten(1))
    assert bool((module.labels(noisy, min_size=9) == -1).all())


def test_labels_are_those_of_the_ops():
    x, weights = normal(2, 20, 3), normal(2, 20, seed=1).abs()
    module = MeanShiftGrouping(30.0, iterations=4)
    expected = effops.assign_modes(effops.mean_shift(x, 30.0, iterations=4, weights=weights), 0.8, 2)
    assert torch.equal(module.labels(x, 0.8, 2, weights), expected)
    assert torch.equal(module.labels(x), effops.mean_shift_cluster(x, 30.0, 4))
    half = x.bfloat16()
    assert torch.equal(module.labels(half), effops.mean_shift_cluster(half, 30.0, 4))
    everything = MeanShiftGrouping(30.0, iterations=4, return_all=True)
    assert torch.equal(everything.labels(x), module.labels(x))


def test_labels_have_no_graph():
    module, x = MeanShiftGrouping(learn_kappa=True), normal(1, 9, 3).requires_grad_()
    assert not module.labels(x).requires_grad


def test_kappa_is_learned():
    """More concentrated where the modes are to stay apart."""
    module = MeanShiftGrouping(4.0, iterations=2, learn_kappa=True)
    assert [name for name, _ in module.named_parameters()] == ["log_kappa"]
    assert_close(module.kappa.detach(), torch.tensor(4.0), 1e-6)
    assert not list(MeanShiftGrouping(4.0).parameters())
    x = torch.tensor([[[1.0, 0.2], [1.0, -0.2], [0.2, 1.0], [-0.2, 1.0]]])
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    start = (module(x)[0, 0] * module(x)[0, 2]).sum().item()
    for _ in range(20):
        moved = module(x)[0]
        loss = (moved[0] * moved[2]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert module.kappa > 8
    assert loss < start - 0.1


def test_grouping_gradients_agree_with_the_definition():
    module = MeanShiftGrouping(7.0, 0.8, 2, learn_kappa=True, return_all=True, dtype=torch.float64)
    x = normal(2, 3, 2, 5, dtype=torch.float64).requires_grad_()
    weights = normal(2, 2, 5, seed=1, dtype=torch.float64).abs().requires_grad_()
    found = module(x, weights)
    points = reference.mean_shift(as_points(x), module.kappa, 0.8, 2, weights.flatten(1), True)
    expected = points.mT.unflatten(-1, (2, 5))
    assert_close(found.detach(), expected.detach(), 1e-12)
    inputs, incoming = [x, weights, module.log_kappa], normal(*found.shape, seed=2, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, inputs, incoming)
    for actual, gradient in zip(torch.autograd.grad(found, inputs, incoming), wanted, strict=True):
        assert_close(actual, gradient, 1e-11)


def test_grouping_shows_its_settings():
    assert repr(MeanShiftGrouping()) == "MeanShiftGrouping(kappa=36, eta=1.0, iterations=10)"
    module = MeanShiftGrouping(6.5, 0.5, 3, learn_kappa=True, return_all=True, tol=0.0)
    assert repr(module) == (
        "MeanShiftGrouping(kappa=6.5, eta=0.5, iterations=3, learn_kappa=True, return_all=True, tol=0.0)"
    )


def test_grouping_is_copied_and_stored():
    module, x = MeanShiftGrouping(5.0, iterations=2, learn_kappa=True), normal(1, 9, 3)
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = MeanShiftGrouping(9.0, iterations=2, learn_kappa=True)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), module(x))
    other.reset_parameters()
    assert_close(other.kappa.detach(), torch.tensor(9.0), 1e-6)


@pytest.mark.parametrize(
    ("settings", "error", "blamed"),
    [
        ({"kappa": -1.0}, ValueError, "finite kappa"),
        ({"kappa": float("nan")}, ValueError, "finite kappa"),
        ({"kappa": 0.0, "learn_kappa": True}, ValueError, "kappa above 0"),
        ({"eta": 1.5}, ValueError, "eta"),
        ({"eta": -0.5}, ValueError, "finite eta"),
        ({"iterations": -1}, ValueError, "iterations"),
        ({"tol": -1.0}, ValueError, "finite tol"),
        ({"kappa": torch.tensor(3.0)}, TypeError, "kappa"),
        ({"iterations": 1.5}, TypeError, "iterations"),
        ({"learn_kappa": 1}, TypeError, "learn_kappa"),
        ({"return_all": None}, TypeError, "return_all"),
    ],
    ids=str,
)
def test_grouping_refuses_settings(settings, error, blamed):
    with pytest.raises(error, match=rf"^MeanShiftGrouping: expected {blamed}"):
        MeanShiftGrouping(**settings)


def test_grouping_refuses_inputs():
    module, maps = MeanShiftGrouping(), normal(2, 4, 3, 5)
    for wrong in (maps[0, 0], maps[None]):
        with pytest.raises(ValueError, match=r"^MeanShiftGrouping: expected embedding of shape"):
            module(wrong)
    with pytest.raises(TypeError, match=r"^MeanShiftGrouping: expected embedding of type Tensor"):
        module([1.0])
    for weights in (maps[:, 0].flatten(1), maps[:1, 0], maps[:, 0].mT):
        with pytest.raises(ValueError, match=r"^MeanShiftGrouping: expected weights of shape"):
            module(maps, weights)
    with pytest.raises(ValueError, match=r"^mean_shift: expected weights of shape"):
        module(as_points(maps), maps[:, 0])


# ------------------------------------------------------------------------------------ PairwiseEmbeddingLoss


@pytest.mark.parametrize(
    "settings", [{}, {"alpha": 0.2}, {"normalize": "thesis"}, {"normalize": "none"}], ids=str
)
def test_loss_passes_its_settings(settings):
    x, labels = normal(2, 15, 4), torch.arange(30).view(2, 15) % 4 - 1
    weights = normal(2, 15, seed=1).abs()
    for given in (None, weights):
        found = PairwiseEmbeddingLoss(**settings)(x, labels, given)
        assert torch.equal(found, effops.pairwise_embedding_loss(x, labels, weights=given, **settings))


def test_loss_of_maps_is_that_of_their_pixels():
    maps, labels, weights = normal(2, 4, 4, 6), stripes(), normal(2, 4, 6, seed=1).abs()
    loss = PairwiseEmbeddingLoss()
    expected = loss(as_points(maps), labels.flatten(1), weights.flatten(1))
    assert torch.equal(loss(maps, labels, weights), expected)


@pytest.mark.parametrize("max_points", [None, 10])
def test_loss_of_iterates_is_the_sum(max_points):
    maps, labels, weights = normal(3, 2, 4, 4, 6), stripes(), normal(2, 4, 6, seed=1).abs()
    loss = PairwiseEmbeddingLoss(max_points=max_points)

    def seeded():  # one sample for all iterates
        return torch.Generator().manual_seed(3)

    expected = sum(loss(iterate, labels, weights, generator=seeded()) for iterate in maps)
    assert_close(loss(maps, labels, weights, generator=seeded()), expected, 1e-6)
    points = maps.flatten(3).mT
    assert_close(loss(points, labels.flatten(1), weights.flatten(1), generator=seeded()), expected, 1e-6)


def test_loss_of_a_sample():
    """The sampled pixels are those of the drawn numbers, and on average tell what all pixels tell."""
    maps, labels = normal(1, 4, 16, 16), stripes(1, 16, 16, 4)
    exact = PairwiseEmbeddingLoss(normalize="sum_w")(maps, labels)
    loss = PairwiseEmbeddingLoss(normalize="sum_w", max_points=64)
    found = torch.stack([loss(maps, labels, generator=torch.Generator().manual_seed(i)) for i in range(50)])
    assert found.std() > 0
    assert (found.mean() - exact).abs() < 0.1 * exact
    chosen = torch.rand(1, 256, generator=torch.Generator().manual_seed(0)).topk(64).indices.sort().values[0]
    by_hand = effops.pairwise_embedding_loss(as_points(maps)[:, chosen], labels.flatten(1)[:, chosen])
    assert torch.equal(found[0], by_hand)
    enough = PairwiseEmbeddingLoss(normalize="sum_w", max_points=256)
    assert torch.equal(enough(maps, labels), exact)


@pytest.mark.parametrize("max_points", [None, 30])
def test_training_with_both_modules(max_points):
    """An embedding of free parameters, by the loss of all iterates: what becomes of it are the instances."""
    labels = stripes(1, 6, 8, 4)
    embedding = nn.Parameter(normal(1, 8, 6, 8))
    grouping = MeanShiftGrouping(10.0, iterations=3, return_all=True)
    loss = PairwiseEmbeddingLoss(max_points=max_points)
    optimizer = torch.optim.Adam([embedding], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        value = loss(grouping(embedding), labels, generator=generator)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert value < 0.02
    assert torch.equal(grouping.labels(embedding), labels)


def test_loss_shows_its_settings():
    assert repr(PairwiseEmbeddingLoss()) == "PairwiseEmbeddingLoss(alpha=0.5, normalize='sum_w')"
    module = PairwiseEmbeddingLoss(0.2, "thesis", max_points=4000)
    assert repr(module) == "PairwiseEmbeddingLoss(alpha=0.2, normalize='thesis', max_points=4000)"
    assert not module.state_dict()


@pytest.mark.parametrize(
    ("settings", "error", "blamed"),
    [
        ({"alpha": float("inf")}, ValueError, "finite alpha"),
        ({"alpha": "0.5"}, TypeError, "alpha"),
        ({"normalize": "mean"}, ValueError, "normalize"),
        ({"normalize": None}, ValueError, "normalize"),
        ({"max_points": 0}, ValueError, "max_points"),
        ({"max_points": 0.1}, TypeError, "max_points"),
    ],
    ids=str,
)
def test_loss_refuses_settings(settings, error, blamed):
    with pytest.raises(error, match=rf"^PairwiseEmbeddingLoss: expected {blamed}"):
        PairwiseEmbeddingLoss(**settings)


def test_loss_refuses_inputs():
    loss, maps, labels = PairwiseEmbeddingLoss(), normal(2, 4, 4, 6), stripes()
    wrong = [
        (maps, labels.flatten(1)),  # read as iterates of points
        (maps[0], labels),
        (maps, labels[:1]),
        (maps, labels[:, 1:]),
        (maps.mT, labels),
        (maps[None, None], labels),
        (as_points(maps), labels),
        (as_points(maps), labels.flatten(1)[:, 1:]),
        (as_points(maps)[0], labels.flatten(1)),
    ]
    for embedding, given in wrong:
        with pytest.raises(ValueError, match=r"^PairwiseEmbeddingLoss: expected embedding of shape"):
            loss(embedding, given)
    for given in (labels[0, 0], labels[None]):
        with pytest.raises(ValueError, match=r"^PairwiseEmbeddingLoss: expected labels of shape"):
            loss(maps, given)
    with pytest.raises(TypeError, match=r"^PairwiseEmbeddingLoss: expected labels of type Tensor"):
        loss(maps, None)
    with pytest.raises(ValueError, match=r"^PairwiseEmbeddingLoss: expected weights of shape"):
        loss(maps, labels, maps[:, 0].mT)
    with pytest.raises(TypeError, match=r"^pairwise_embedding_loss: expected labels of dtype int64"):
        loss(maps, labels.int())


# ------------------------------------------------------------------------------------ both


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype):
    """Both are computed in float32, whatever comes in."""
    labels, maps = stripes(), normal(2, 8, 4, 6).requires_grad_()
    conv = nn.Conv2d(8, 8, 1)
    grouping = MeanShiftGrouping(10.0, iterations=2, learn_kappa=True)
    with torch.autocast("cpu", dtype):
        embedding = conv(maps)
        assert embedding.dtype == dtype
        moved = grouping(embedding)
        value = PairwiseEmbeddingLoss()(moved, labels)
    assert moved.dtype == value.dtype == torch.float32
    assert torch.equal(moved, grouping(embedding.float()))
    value.backward()
    assert all(p.grad is not None for p in (maps, grouping.log_kappa, *conv.parameters()))


@pytest.mark.compile
@pytest.mark.parametrize("max_points", [None, 12])
def test_compiles(max_points):
    """One graph of both, for maps of several sizes."""
    grouping = MeanShiftGrouping(10.0, iterations=2, learn_kappa=True, return_all=True)
    loss = PairwiseEmbeddingLoss(max_points=max_points)

    def step(maps, labels):
        return loss(grouping(maps), labels)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for height, width in ((4, 6), (5, 9)):
        maps, labels = normal(2, 8, height, width).requires_grad_(), stripes(2, height, width)
        torch.manual_seed(0)
        expected = torch.autograd.grad(step(maps, labels), [maps, grouping.log_kappa])
        torch.manual_seed(0)
        found = torch.autograd.grad(compiled(maps, labels), [maps, grouping.log_kappa])
        for actual, wanted in zip(found, expected, strict=True):
            assert_close(actual, wanted, 1e-5)


@pytest.mark.compile
def test_exports():
    module, maps = MeanShiftGrouping(10.0, iterations=2), normal(2, 4, 3, 5)
    program = torch.export.export(module, (maps,))
    assert torch.equal(program.module()(maps), module(maps))
    assert any(node.target is torch.ops.effops.mean_shift.default for node in program.graph.nodes)
