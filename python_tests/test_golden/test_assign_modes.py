"""Golden values of assign_modes and mean_shift_cluster: small graphs, order of labels, known groups."""

import pytest
import torch
from rowconv_inputs import FLOATS, INF, NAN, double


def directions(*degrees, dtype=torch.float64):
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1).to(dtype)


def labelled(letters):
    """One row per letter, each letter on an axis of its own."""
    return torch.eye(26, dtype=torch.float64)[[ord(letter) - ord("A") for letter in letters]]


@pytest.mark.parametrize(
    ("groups", "min_size", "expected"),
    [
        ("A", 1, [0]),
        ("AAAA", 1, [0, 0, 0, 0]),
        ("ABBCCC", 1, [2, 1, 1, 0, 0, 0]),  # by size
        ("CCBBA", 1, [0, 0, 1, 1, 2]),  # of one size: by the first member
        ("BACABC", 1, [0, 1, 2, 1, 0, 2]),
        ("ABBCCCD", 1, [2, 1, 1, 0, 0, 0, 3]),
        ("ABBCCCD", 2, [-1, 1, 1, 0, 0, 0, -1]),
        ("ABBCCCD", 3, [-1, -1, -1, 0, 0, 0, -1]),
        ("ABBCCCD", 4, [-1] * 7),
        ("ABBCCCD", 2**40, [-1] * 7),
    ],
)
def test_order_of_labels(assign_modes, groups, min_size, expected):
    labels = assign_modes(labelled(groups), min_size=min_size)
    assert labels.dtype == torch.int64
    assert labels.tolist() == expected


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (1.0, [0, 1, 2, 3, 4]),  # not even copies
        (0.99, [0, 0, 1, 2, 3]),
        (0.7501, [0, 0, 1, 2, 3]),
        (0.7499, [0, 0, 0, 1, 2]),
        (0.5, [0, 0, 0, 1, 2]),  # orthogonal rows have exactly one half
        (0.4999, [0, 0, 0, 0, 0]),
    ],
)
def test_threshold(assign_modes, threshold, expected):
    """Two copies, a row at 60 degrees, an orthogonal one, an opposite one: (1 + cos) / 2 must be greater."""
    x = torch.tensor([[1, 0, 0], [1, 0, 0], [0.5, 0.75**0.5, 0], [0, 0, 1], [-1, 0, 0]])
    assert assign_modes(x, threshold).tolist() == expected
    assert assign_modes(x.double(), threshold).tolist() == expected


def test_threshold_of_opposite_rows(assign_modes):
    x = torch.tensor([[1.0, 0], [-1, 0]])
    assert assign_modes(x, 0.0).tolist() == [0, 1]
    assert assign_modes(x, -1e-3).tolist() == [0, 0]


def test_chains_are_one_component(assign_modes):
    """1000 rows on a circle, 0.3 degrees apart and in any order: the two ends are opposite."""
    degrees = (0.3 * torch.randperm(1000, generator=torch.Generator().manual_seed(0))).tolist()
    joins = (1 + torch.tensor(0.4).deg2rad().cos().item()) / 2
    breaks = (1 + torch.tensor(0.2).deg2rad().cos().item()) / 2
    x = directions(*degrees)
    assert not assign_modes(x, joins).any()
    assert assign_modes(x, breaks).tolist() == list(range(1000))
    broken = [angle for angle in degrees if angle < 100 or angle > 101]  # 334 and 663 rows
    assert assign_modes(directions(*broken), joins).tolist() == [int(angle < 100) for angle in broken]


def test_lengths_of_rows_do_not_matter(assign_modes):
    x = labelled("ABBCCC")
    factors = torch.tensor([1e30, 1e-6, 3, 1e-11, 1e25, 0.5], dtype=torch.float64)[:, None]
    assert assign_modes(factors * x).tolist() == [2, 1, 1, 0, 0, 0]
    assert assign_modes((factors * x).float()).tolist() == [2, 1, 1, 0, 0, 0]


def test_zero_rows_are_orthogonal_to_all(assign_modes):
    x = torch.tensor([[0, 0], [1, 0], [0, 0], [-1, 0]]).double()
    assert assign_modes(x, 0.5).tolist() == [0, 1, 2, 3]
    assert assign_modes(x, 0.49).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("number", [NAN, INF, -INF])
def test_nan_joins_nothing(assign_modes, number):
    x = torch.ones(6, 3)
    x[1, 2] = x[4, 0] = number
    for threshold in (0.9, -1.0):
        assert assign_modes(x, threshold).tolist() == [0, 1, 0, 0, 2, 0]
        assert assign_modes(x, threshold, 2).tolist() == [0, -1, 0, 0, -1, 0]


def test_images_do_not_see_each_other(assign_modes):
    x = torch.stack([labelled("ABBCCC"), labelled("CCCCBA"), labelled("ABCDEF")])
    assert assign_modes(x).tolist() == [[2, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(assign_modes, mean_shift_cluster, dtype):
    x = (labelled("ABBCCC") + 0.05 * double(6, 26)).to(dtype)
    assert assign_modes(x).tolist() == [2, 1, 1, 0, 0, 0]
    assert mean_shift_cluster(x).tolist() == [2, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("shape", [(0, 3), (0, 5, 3), (2, 0, 3)])
def test_empty(assign_modes, mean_shift_cluster, shape):
    for labels in (assign_modes(torch.ones(shape)), mean_shift_cluster(torch.ones(shape))):
        assert (labels.dtype, labels.shape) == (torch.int64, shape[:-1])


# ------------------------------------------------------------------------------------ clustering


def noisy_groups(count, noise, channels=16, seed=0):
    """Points around the axes, with their groups."""
    groups = torch.arange(count) % 5
    points = torch.eye(channels, dtype=torch.float64)[groups] + noise * double(count, channels, seed=seed)
    return points, groups


def test_clusters_of_groups(mean_shift_cluster):
    """12 points of each of 5 groups in turn: labels in the order of the groups."""
    x, groups = noisy_groups(60, 0.08)
    labels = mean_shift_cluster(x, kappa=20.0)
    assert torch.equal(labels, groups)
    assert torch.equal(mean_shift_cluster(x[None], kappa=20.0)[0], labels)


def test_clustering_is_both_steps(mean_shift_cluster, mean_shift, assign_modes):
    x, _ = noisy_groups(50, 0.3)
    for arguments in ((36.0, 10, 0.9, 1), (6.0, 3, 0.97, 1), (20.0, 0, 0.8, 3)):
        kappa, iterations, threshold, min_size = arguments
        expected = assign_modes(mean_shift(x, kappa, iterations=iterations), threshold, min_size)
        assert torch.equal(mean_shift_cluster(x, *arguments), expected)
        assert 1 < expected.max() + 1 < 50


def test_no_gradients(mean_shift_cluster, assign_modes):
    x = double(2, 5, 3).requires_grad_()
    assert not mean_shift_cluster(x).requires_grad
    assert not assign_modes(x).requires_grad


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("name", ["assign_modes", "mean_shift_cluster"])
@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(5)},
        {"x": torch.zeros(1, 2, 5, 3)},
        {"x": torch.zeros(5, 0)},
        {"x": torch.zeros(5, 513)},
        {"threshold": NAN},
        {"threshold": INF},
        {"min_size": 0},
    ],
    ids=lambda change: "-".join(change),
)
def test_bad_arguments(implementation, name, change):
    arguments = {"x": torch.zeros(5, 3)} | change
    x = arguments.pop("x")
    with pytest.raises(ValueError, match=rf"^({name}|assign_modes|mean_shift): expected"):
        implementation(name)(x, **arguments)


def test_wrong_dtypes(assign_modes, mean_shift_cluster):
    for op in (assign_modes, mean_shift_cluster):
        with pytest.raises(TypeError, match="expected (x|modes) of "):
            op(torch.zeros(5, 3, dtype=torch.int64))


def test_a_threshold_of_1_joins_nothing(assign_modes):
    """Not even copies, of which the rounded cosine may be above 1."""
    x = double(1, 50, 2).float().repeat(1, 3, 1)
    assert assign_modes(x, 1.0)[0].tolist() == list(range(150))
