"""Golden values of pairwise_embedding_loss: numbers of the specification, closed forms, gradients by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from rowconv_inputs import FLOATS, INF, NAN, assert_near, double

import effops

NORMALIZE = pytest.mark.parametrize("normalize", ["sum_w", "thesis", "none"])
LABELS = torch.tensor([[3, -1, 0, 3, 3, 7, 0, -5, 7, 7, 3], [1, 1, 1, -1, 1, 0, 0, 0, 0, 0, 2]])


def leaves_of(channels=3):
    """Embeddings of rows of any length and positive weights for LABELS."""
    x = double(2, 11, channels) * double(2, 11, 1, seed=1).exp()
    return x.requires_grad_(), double(2, 11, seed=2).sigmoid().requires_grad_()


def by_pairs(x, labels, alpha, weights, normalize):
    """One image, one pair at a time."""
    kept = [i for i, label in enumerate(labels.tolist()) if label >= 0]
    if weights is None:
        weights = [1 / int((labels == label).sum()) for label in labels]
    total = x.sum() * 0
    for i in kept:
        for j in kept:
            similarity = (1 + F.cosine_similarity(x[i], x[j], dim=0)) / 2
            cost = 1 - similarity if labels[i] == labels[j] else (similarity - alpha).clamp(min=0)
            total = total + weights[i] * weights[j] * cost
    divisor = {"sum_w": sum(weights[i] for i in kept) ** 2, "thesis": len(kept), "none": 1}[normalize]
    return total / divisor


def gradients(loss, leaves):
    """Of a loss that may be asked again; 0 of leaves without influence."""
    return torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)


def assert_same_with_gradients(found, expected, leaves):
    assert_near(found, expected)
    for actual, wanted in zip(*(gradients(out, leaves) for out in (found, expected)), strict=True):
        assert_near(actual, wanted)


# ------------------------------------------------------------------------------------ numbers


def scaled(loss, normalize, instances, points):
    """What a loss with weights of 1 / size becomes."""
    return loss / {"none": 1, "sum_w": instances**2, "thesis": points}[normalize]


@NORMALIZE
@pytest.mark.parametrize(("instances", "alpha"), [(3, 0.5), (2, 0.0), (5, 0.8), (1, 0.5)])
def test_total_collapse(pairwise_embedding_loss, normalize, instances, alpha):
    """All in one place: Q (Q - 1) (1 - alpha); 3 for 3 instances and alpha = 0.5."""
    labels = torch.arange(instances).repeat_interleave(torch.arange(1, instances + 1))
    x = torch.tensor([0.6, 0, -0.8], dtype=torch.float64).expand(len(labels), 3)
    loss = pairwise_embedding_loss(x, labels, alpha, normalize=normalize)
    expected = scaled(instances * (instances - 1) * (1 - alpha), normalize, instances, len(labels))
    assert loss.item() == pytest.approx(expected, abs=1e-14)


@NORMALIZE
@pytest.mark.parametrize("antipodal", [False, True])
def test_ideal_embeddings(pairwise_embedding_loss, normalize, antipodal):
    """Instances on orthogonal axes, or on both ends of them: exactly 0, without a gradient."""
    axes = torch.eye(4, dtype=torch.float64)
    x = (torch.cat([axes, -axes]) if antipodal else axes).repeat(3, 1).requires_grad_()
    labels = torch.arange(8 if antipodal else 4).repeat(3)
    loss = pairwise_embedding_loss(x, labels, 0.5, normalize=normalize)
    assert loss.item() == 0
    assert not gradients(loss, (x,))[0].any()


@NORMALIZE
def test_one_instance_in_two_antipodal_halves(pairwise_embedding_loss, normalize):
    x = torch.tensor([[1, 0], [-1, 0]]).double().repeat(3, 1)
    loss = pairwise_embedding_loss(x, torch.full((6,), 4), normalize=normalize)
    assert loss.item() == pytest.approx(scaled(0.5, normalize, 1, 6), abs=1e-15)


@pytest.mark.parametrize(
    ("vertices", "similarity"),
    [
        ([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], 1 / 3),
        ([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]], 0.5),
    ],
    ids=["tetrahedron", "octahedron"],
)
def test_best_places_of_few_instances(pairwise_embedding_loss, vertices, similarity):
    """In three dimensions the bound 1 - 2 pi / (sqrt 3 N) on alpha, 0.093 of four instances, costs all."""
    x, labels = torch.tensor(vertices).double(), torch.arange(len(vertices))
    bound = 1 - 2 * math.pi / (3**0.5 * len(vertices))
    neighbours = {4: 3, 6: 4}[len(vertices)]
    loss = pairwise_embedding_loss(x, labels, bound, normalize="none")
    assert loss.item() == pytest.approx(len(vertices) * neighbours * (similarity - bound), abs=1e-14)
    enough = pairwise_embedding_loss(x, labels, similarity + 1e-9, normalize="none")
    assert enough.item() == pytest.approx(0, abs=1e-14)


@NORMALIZE
def test_copies_of_all_points(pairwise_embedding_loss, normalize):
    """Four of each: weights of 1 / size leave the loss as it is, and the thesis's divisor makes it 1/4."""
    x, _ = leaves_of()
    loss = pairwise_embedding_loss(x, LABELS, normalize=normalize)
    more = pairwise_embedding_loss(x.repeat(1, 4, 1), LABELS.repeat(1, 4), normalize=normalize)
    assert_same_with_gradients(more, loss / (4 if normalize == "thesis" else 1), (x,))


def test_positive_term(pairwise_embedding_loss):
    """1/2 sum over instances of (1 - |mean|^2)."""
    x, _ = leaves_of()
    loss = pairwise_embedding_loss(x, LABELS, 1.0, normalize="none")
    rows = F.normalize(x, dim=2)
    expected = 0
    for image in range(2):
        for label in LABELS[image].unique():
            if label >= 0:
                mean = rows[image, LABELS[image] == label].mean(0)
                expected = expected + (1 - mean @ mean) / 2
    assert_same_with_gradients(loss, expected / 2, (x,))


# ------------------------------------------------------------------------------------ definition


@NORMALIZE
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("alpha", [-0.4, 0.0, 0.5, 0.8, 1.1])
def test_agrees_with_single_pairs(pairwise_embedding_loss, alpha, weighted, normalize):
    x, w = leaves_of()
    found = pairwise_embedding_loss(x, LABELS, alpha, w if weighted else None, normalize)
    assert found.shape == ()
    images = [by_pairs(x[b], LABELS[b], alpha, w[b] if weighted else None, normalize) for b in range(2)]
    assert_same_with_gradients(found, sum(images) / 2, (x, w))
    for b in range(2):
        one = pairwise_embedding_loss(x[b], LABELS[b], alpha, w[b] if weighted else None, normalize)
        assert_near(one, images[b])


def test_gradient_by_hand(pairwise_embedding_loss):
    """The derivative by s_ij is - w_i w_j, or w_i w_j where s_ij > alpha; s has a half of the cosine."""
    (x, w), labels = leaves_of(), LABELS[1]
    x, w = x[1].detach().requires_grad_(), w[1].detach()
    rows, kept = F.normalize(x.detach(), dim=1), (labels >= 0).double()
    is_same = labels[:, None] == labels
    is_near = (1 + rows @ rows.T) / 2 > 0.4
    slope = torch.where(is_same, -1.0, is_near.double()) * (w * kept)[:, None] * (w * kept)
    by_row = 0.5 * (slope + slope.T) @ rows
    expected = (by_row - rows * (rows * by_row).sum(1, keepdim=True)) / x.detach().norm(dim=1, keepdim=True)
    (found,) = gradients(pairwise_embedding_loss(x, labels, 0.4, w, "none"), (x,))
    assert_near(found, expected)
    assert found.norm() > 0.1


@NORMALIZE
def test_names_of_instances_do_not_matter(pairwise_embedding_loss, normalize):
    """Any int64; an image's are its own. Nor does the order of points."""
    x, w = leaves_of()
    expected = pairwise_embedding_loss(x, LABELS, 0.3, w, normalize)
    names = torch.tensor([2**63 - 1, 5, 2**40, 9, 1, 2, 3, 2**40 + 2**32])
    renamed = torch.where(LABELS >= 0, names[LABELS.clamp(min=0)], -(2**63) - LABELS - 1)
    assert_same_with_gradients(pairwise_embedding_loss(x, renamed, 0.3, w, normalize), expected, (x, w))
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    mixed = pairwise_embedding_loss(x[:, order], LABELS[:, order], 0.3, w[:, order], normalize)
    assert_same_with_gradients(mixed, expected, (x, w))


@NORMALIZE
@pytest.mark.parametrize("weighted", [False, True])
def test_ignored_points_take_no_part(pairwise_embedding_loss, weighted, normalize):
    """Whatever they hold."""
    x, w = (leaf[0].detach() for leaf in leaves_of())
    kept = LABELS[0] >= 0
    x[~kept], w[~kept] = NAN, INF
    x, w = x.requires_grad_(), w.requires_grad_()
    weights = (w, w[kept]) if weighted else (None, None)
    found = pairwise_embedding_loss(x, LABELS[0], 0.3, weights[0], normalize)
    expected = pairwise_embedding_loss(x[kept], LABELS[0][kept], 0.3, weights[1], normalize)
    assert_same_with_gradients(found, expected, (x, w))
    assert not gradients(found, (x,))[0][~kept].any()


@NORMALIZE
def test_images_without_points(pairwise_embedding_loss, normalize):
    """They count in the mean, with 0: no labels, or weights of 0."""
    x, w = leaves_of()
    labels = torch.stack([LABELS[0], torch.full((11,), -1)])
    one = pairwise_embedding_loss(x[0], labels[0], 0.3, w[0], normalize)
    assert_same_with_gradients(pairwise_embedding_loss(x, labels, 0.3, w, normalize), one / 2, (x, w))
    none = pairwise_embedding_loss(x, torch.full_like(labels, -2), normalize=normalize)
    assert none.item() == 0
    found = pairwise_embedding_loss(x, LABELS, 0.3, w * torch.tensor([[1], [0]]), normalize)
    assert_same_with_gradients(found, one / 2, (x, w))


def test_only_ratios_of_weights_matter(pairwise_embedding_loss):
    """In "sum_w", also where their squares would overflow."""
    x, w = leaves_of()
    expected = pairwise_embedding_loss(x, LABELS, 0.3, w)
    for factor in (1e-3, 1e4, 1e200):
        found = pairwise_embedding_loss(x, LABELS, 0.3, factor * w)
        assert_same_with_gradients(found, expected, (x, w))
    huge = pairwise_embedding_loss(x.float(), LABELS, 0.3, (1e30 * w).float())
    assert huge.item() == pytest.approx(expected.item(), rel=1e-5)


@NORMALIZE
def test_lengths_of_rows_do_not_matter(pairwise_embedding_loss, normalize):
    x, w = leaves_of()
    expected = pairwise_embedding_loss(x, LABELS, 0.3, w, normalize)
    factors = torch.tensor([1e30, 1e-6, 1, 2, 1e-8, 1, 3, 1, 1e20, 1, 7], dtype=torch.float64)
    found = pairwise_embedding_loss(factors[:, None] * x, LABELS, 0.3, w, normalize)
    assert_near(found, expected)
    (gradient,) = gradients(expected, (x,))
    assert_near((x * gradient).sum(2), torch.zeros(2, 11).double())


def test_zero_rows_are_orthogonal_to_all(pairwise_embedding_loss):
    """Even to themselves: (1 + 0) / 2."""
    x = torch.tensor([[0, 0], [0, 0], [1, 0]]).double()
    labels = torch.tensor([0, 0, 1])
    assert pairwise_embedding_loss(x, labels, 0.2, normalize="none").item() == pytest.approx(0.5 + 2 * 0.3)


# ------------------------------------------------------------------------------------ rare values


@NORMALIZE
@pytest.mark.parametrize("where", ["x", "weights"])
@pytest.mark.parametrize("number", [NAN, INF, -INF])
def test_nan_reaches_its_image(pairwise_embedding_loss, where, number, normalize):
    """The loss, and the gradients of all points of that image that are not ignored."""
    x, w = leaves_of()
    with torch.no_grad():
        (x[1, 10] if where == "x" else w[1])[0] = number
    loss = pairwise_embedding_loss(x, LABELS, 0.3, w, normalize)
    assert loss.isnan()
    kept = LABELS[1] >= 0
    for gradient in gradients(loss, (x, w)):
        assert bool(gradient[0].isfinite().all())
        assert not bool(gradient[1, kept].isfinite().any())
        assert not gradient[1, ~kept].any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(pairwise_embedding_loss, dtype):
    """A float32 loss for half precision; gradients in the dtype of the inputs."""
    x, w = (leaf.detach().to(dtype).requires_grad_() for leaf in leaves_of())
    loss = pairwise_embedding_loss(x, LABELS, 0.3, w)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    exact = pairwise_embedding_loss(x.double(), LABELS, 0.3, w.double())
    assert loss.item() == pytest.approx(exact.item(), rel=1e-13 if dtype == torch.float64 else 2e-6)
    for found, wanted in zip(gradients(loss, (x, w)), gradients(exact, (x, w)), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, wanted)


@NORMALIZE
@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 2), (0, 2)])
def test_empty(pairwise_embedding_loss, shape, normalize):
    x = torch.ones(shape, requires_grad=True)
    w = torch.ones(shape[:-1], requires_grad=True)
    for weights in (None, w):
        loss = pairwise_embedding_loss(x, torch.zeros(shape[:-1], dtype=torch.int64), 0.5, weights, normalize)
        assert (loss.shape, loss.item()) == ((), 0)
    assert [gradient.shape for gradient in gradients(loss, (x, w))] == [x.shape, w.shape]


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(5)},
        {"x": torch.zeros(2, 4, 3)},
        {"x": torch.zeros(2, 5, 0)},
        {"x": torch.zeros(2, 5, 513)},
        {"labels": torch.zeros(5, dtype=torch.int64)},
        {"labels": torch.zeros(2, 4, dtype=torch.int64)},
        {"weights": torch.zeros(2, 4)},
        {"weights": torch.zeros(5)},
        {"alpha": NAN},
        {"alpha": INF},
        {"normalize": "mean"},
    ],
    ids=lambda change: "-".join(change),
)
def test_bad_arguments(pairwise_embedding_loss, change):
    arguments = {"x": torch.zeros(2, 5, 3), "labels": torch.zeros(2, 5, dtype=torch.int64)} | change
    with pytest.raises(ValueError, match="^pairwise_embedding_loss: expected"):
        pairwise_embedding_loss(**arguments)


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(2, 5, 3, dtype=torch.int64)},
        {"labels": torch.zeros(2, 5, dtype=torch.int32)},
        {"labels": torch.zeros(2, 5)},
        {"weights": torch.zeros(2, 5).double()},
    ],
    ids=lambda change: "-".join(change),
)
def test_wrong_dtypes(pairwise_embedding_loss, change):
    arguments = {"x": torch.zeros(2, 5, 3), "labels": torch.zeros(2, 5, dtype=torch.int64)} | change
    with pytest.raises(TypeError, match="^pairwise_embedding_loss: expected"):
        pairwise_embedding_loss(**arguments)


def test_weights_of_half_precision_under_autocast():
    x, w = (leaf.detach() for leaf in leaves_of())
    expected = effops.pairwise_embedding_loss(x.float(), LABELS, 0.3, w.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        found = effops.pairwise_embedding_loss(x.float(), LABELS, 0.3, w.bfloat16())
    torch.testing.assert_close(found, expected)
