"""Golden values of the Hamming ops: hand-computed distances, OpenCV, faiss and NumPy as oracles."""

import math
import warnings

import numpy as np
import pytest
import torch

import effops
from effops.reference import pack_bits, topk_pack

MISSING = 2**31 - 1
BOTH_WORDS = pytest.mark.parametrize("words", [torch.int64, torch.uint8], ids=["int64", "uint8"])


@pytest.fixture(scope="module")
def cv2():
    return pytest.importorskip("cv2")


@pytest.fixture(scope="module")
def faiss():
    with warnings.catch_warnings():  # of Python 3.12, about SWIG
        warnings.filterwarnings("ignore", "builtin type .* has no __module__ attribute", DeprecationWarning)
        return pytest.importorskip("faiss")


def as_words(bits, words=torch.int64):
    """Bits [..., M] packed; M is a multiple of 64."""
    return pack_bits(bits).view(words)


def random_sets(rows_a, rows_b, bits=256, kinds=None, seed=0):
    """Bytes, [N, bits / 8]; of few different rows, so that many distances tie, if `kinds` is given."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows_a + rows_b if kinds is None else kinds, bits // 8)
    rows = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    if kinds is not None:
        rows = rows[torch.randint(kinds, (rows_a + rows_b,), generator=generator)]
    return rows[:rows_a], rows[rows_a:]


def in_words(sets, words):
    return tuple(rows.view(words) for rows in sets)


def numpy_distances(a, b):
    return np.bitwise_count(a.numpy()[:, None] ^ b.numpy()[None]).sum(-1).astype(np.int32)


def missing(*shape):
    """Distances and indices of neighbours that do not exist."""
    return torch.full(shape, MISSING, dtype=torch.int32), torch.full(shape, -1)


def assert_neighbours(found, distances, indices):
    assert found[0].dtype == torch.int32
    assert found[1].dtype == torch.int64
    assert found[0].tolist() == distances
    assert found[1].tolist() == indices


# ------------------------------------------------------------------------------------ hamming_distance


def test_distances_by_hand(hamming_distance):
    a = torch.tensor([[0], [1], [0b1011], [-1]])
    b = torch.tensor([[0], [0b0110], [-(2**63)]])
    expected = [[0, 2, 1], [1, 3, 2], [3, 3, 4], [64, 62, 63]]
    assert hamming_distance(a, b).tolist() == expected
    assert hamming_distance(a.view(torch.uint8), b.view(torch.uint8)).tolist() == expected


@BOTH_WORDS
@pytest.mark.parametrize("bits", [64, 128, 192, 256, 320, 512, 4096])
def test_ones_against_zeros(hamming_distance, hamming_knn, bits, words):
    ones = as_words(torch.ones(3, bits, dtype=torch.bool), words)
    zeros = torch.zeros_like(ones)
    assert hamming_distance(ones, zeros).tolist() == [[bits] * 3] * 3
    assert_neighbours(hamming_knn(ones, zeros, 2), [[bits] * 2] * 3, [[0, 1]] * 3)


@BOTH_WORDS
@pytest.mark.parametrize("bits", [64, 192, 256, 384, 512, 1024])
def test_distances_agree_with_numpy(hamming_distance, bits, words):
    sets = random_sets(23, 71, bits)
    found = hamming_distance(*in_words(sets, words))
    assert np.array_equal(found.numpy(), numpy_distances(*sets))


def test_distances_of_constant_weight(hamming_distance):
    """d = 2 k - 2 popcount(a & b): even, from 0 to 2 min(k, M - k)."""
    x = torch.randn(2, 40, 256, generator=torch.Generator().manual_seed(0))
    a, b = topk_pack(x, 64)
    both = np.bitwise_count((a[:, None] & b[None]).numpy().view(np.uint64)).sum(-1)
    distances = hamming_distance(a, b).numpy()
    assert np.array_equal(distances, 128 - 2 * both.astype(np.int32))
    assert not (distances % 2).any()
    assert distances.max() <= 128


def test_random_pairs_of_constant_weight(hamming_distance):
    """Mean 2 k (1 - k / M) = 96 and standard deviation 6.01 for 64 of 256."""
    x = torch.randn(2, 400, 256, generator=torch.Generator().manual_seed(0))
    distances = hamming_distance(*topk_pack(x, 64)).double()
    assert distances.mean().item() == pytest.approx(96, abs=0.1)
    assert distances.std().item() == pytest.approx(6.01, abs=0.1)


def test_batches_are_separate(hamming_distance):
    sets = [random_sets(5, 7, seed=seed) for seed in range(3)]
    a, b = (torch.stack(rows) for rows in zip(*sets, strict=True))
    found = hamming_distance(a, b)
    for k, pair in enumerate(sets):
        assert np.array_equal(found[k].numpy(), numpy_distances(*pair))


# ------------------------------------------------------------------------------------ hamming_knn


@BOTH_WORDS
@pytest.mark.parametrize("kinds", [None, 12], ids=["random", "ties"])
@pytest.mark.parametrize("k", [1, 2, 3, 10])
def test_neighbours_agree_with_opencv(cv2, hamming_knn, k, kinds, words):
    a, b = random_sets(60, 90, 256, kinds)
    distances, indices = hamming_knn(*in_words((a, b), words), k)
    matches = cv2.BFMatcher(cv2.NORM_HAMMING).knnMatch(a.numpy(), b.numpy(), k)
    assert [[m.trainIdx for m in row] for row in matches] == indices.tolist()
    assert [[int(m.distance) for m in row] for row in matches] == distances.tolist()


@pytest.mark.parametrize("kinds", [None, 12], ids=["random", "ties"])
@pytest.mark.parametrize("bits", [64, 128, 256, 512])
@pytest.mark.parametrize("k", [1, 5, 100])
def test_neighbours_agree_with_faiss(faiss, hamming_knn, k, bits, kinds):
    """Beyond the 90 rows faiss, too, gives index -1 and distance 2^31 - 1."""
    a, b = random_sets(60, 90, bits, kinds)
    expected_distances, expected = faiss.knn_hamming(a.numpy(), b.numpy(), k)
    distances, indices = hamming_knn(a, b, k)
    assert np.array_equal(distances.numpy(), expected_distances)
    assert np.array_equal(indices.numpy(), expected)


@pytest.mark.parametrize("kinds", [None, 3, 20])
@pytest.mark.parametrize("k", [1, 4, 33, 60])
def test_neighbours_are_a_stable_sort(hamming_knn, k, kinds):
    sets = random_sets(20, 60, 128, kinds)
    all_distances = numpy_distances(*sets)
    order = np.argsort(all_distances, axis=1, kind="stable")[:, :k]
    distances, indices = hamming_knn(*sets, k)
    assert np.array_equal(indices.numpy(), order)
    assert np.array_equal(distances.numpy(), np.take_along_axis(all_distances, order, 1))


def test_missing_neighbours(hamming_knn):
    a, b = torch.tensor([[0], [7]]), torch.tensor([[1], [0]])
    expected = [[0, 1, MISSING, MISSING], [2, 3, MISSING, MISSING]]
    assert_neighbours(hamming_knn(a, b, 4), expected, [[1, 0, -1, -1], [0, 1, -1, -1]])
    for found, wanted in zip(hamming_knn(a, b[:0], 3), missing(2, 3), strict=True):
        assert torch.equal(found, wanted)
    assert hamming_knn(a, b, 0)[1].shape == (2, 0)


def test_lengths(hamming_knn):
    """Rows beyond the lengths look for nothing and are not found."""
    a, b = (torch.stack([rows, rows]) for rows in random_sets(4, 6))
    lengths_a, lengths_b = torch.tensor([2, 4]), torch.tensor([5, 0])
    distances, indices = hamming_knn(a, b, 3, lengths_a=lengths_a, lengths_b=lengths_b)
    alone = hamming_knn(a[0, :2], b[0, :5], 3)
    assert torch.equal(distances[0, :2], alone[0])
    assert torch.equal(indices[0, :2], alone[1])
    for found, wanted in zip((distances, indices), missing(2, 4, 3), strict=True):
        assert torch.equal(found[0, 2:], wanted[0, 2:])
        assert torch.equal(found[1], wanted[1])


def test_mask(hamming_knn):
    a, b = torch.tensor([[0], [0]]), torch.tensor([[0], [1], [3]])
    mask = torch.tensor([[False, True, True], [False, False, False]])
    expected = [[1, 2], [MISSING, MISSING]], [[1, 2], [-1, -1]]
    assert_neighbours(hamming_knn(a, b, 2, mask=mask), *expected)
    for batched in (mask, mask[None].expand(2, 2, 3)):  # one for all sets, one for each
        found = hamming_knn(a.expand(2, 2, 1), b.expand(2, 3, 1), 2, mask=batched)
        assert_neighbours(found, *([part] * 2 for part in expected))


@pytest.mark.parametrize("kinds", [None, 12], ids=["random", "ties"])
@pytest.mark.parametrize("sizes", [(60, 90), (90, 60), (1, 40), (40, 1)], ids=str)
def test_mutual_is_cross_check(cv2, hamming_knn, hamming_match, sizes, kinds):
    a, b = random_sets(*sizes, 256, kinds)
    expected = cv2.BFMatcher(cv2.NORM_HAMMING, crossCheck=True).match(a.numpy(), b.numpy())
    expected = sorted((m.queryIdx, m.trainIdx, int(m.distance)) for m in expected)
    matches, distances = hamming_match(a, b)
    assert [(*pair, d) for pair, d in zip(matches.tolist(), distances.tolist(), strict=True)] == expected
    distances, indices = hamming_knn(a, b, 1, mutual=True)
    rows = (indices[:, 0] >= 0).nonzero()[:, 0].tolist()
    assert [(row, indices[row, 0].item(), distances[row, 0].item()) for row in rows] == expected


def test_mutual_by_hand(hamming_knn):
    """Rows 0 and 1 of a have the nearest row 0 of b, whose nearest is row 0; row 2 has no rival."""
    a, b = torch.tensor([[0], [0], [-1]]), torch.tensor([[1], [-2], [-4]])
    found = hamming_knn(a, b, 2, mutual=True)
    gone = [MISSING, MISSING]
    assert_neighbours(found, [[1, 62], gone, [1, 2]], [[0, 2], [-1, -1], [1, 2]])


def test_mutual_counts_only_pairs_that_exist(hamming_knn):
    """Row 1 of a becomes the nearest of b's row once row 0 is masked, or beyond the length of a."""
    a, b = torch.tensor([[0], [1]]), torch.tensor([[0]])
    assert hamming_knn(a, b, mutual=True)[1].tolist() == [[0], [-1]]
    mask = torch.tensor([[False], [True]])
    assert hamming_knn(a, b, mask=mask, mutual=True)[1].tolist() == [[-1], [0]]
    rows = torch.tensor(1)
    assert hamming_knn(a.flip(0), b, lengths_a=rows, mutual=True)[1].tolist() == [[0], [-1]]


@pytest.mark.parametrize("lengths", [[-1, 3], [3, 6], [2**32, 0], [0, -(2**63)]], ids=str)
@pytest.mark.parametrize("argument", ["lengths_a", "lengths_b"])
def test_lengths_out_of_range(hamming_knn, argument, lengths):
    a = torch.zeros(2, 5, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"hamming_knn: expected {argument} in"):
        hamming_knn(a, a, **{argument: torch.tensor(lengths)})


# ------------------------------------------------------------------------------------ hamming_match


def test_no_tests_at_all(hamming_match):
    """Every row that has a candidate is matched to its nearest one."""
    a, b = random_sets(9, 7)
    matches, distances = hamming_match(a, b, mutual=False)
    expected = numpy_distances(a, b)
    assert matches.tolist() == [[i, j] for i, j in enumerate(expected.argmin(1).tolist())]
    assert distances.tolist() == expected.min(1).tolist()


@pytest.mark.parametrize(
    ("first", "second", "ratio", "kept"),
    [
        (3, 4, 0.75, False),  # strict
        (3, 4, 0.76, True),
        (3, 4, 1.0, True),
        (4, 4, 1.0, False),
        (4, 4, 1.01, True),
        (0, 4, 1e-300, True),
        (0, 0, 0.8, False),
        (0, 0, 1e300, False),
        (0, 0, math.inf, False),  # 0 times infinity
        (1, 1, math.inf, True),
        (1, 10, 0.1, False),  # 0.1 in float64 times 10 is 1
        (7, 10, 0.7, False),
        (14, 25, 0.56, True),  # 0.56 in float64 times 25 is above 14
    ],
)
def test_ratio(hamming_match, first, second, ratio, kept):
    a = torch.zeros(1, 1, dtype=torch.int64)
    b = torch.tensor([[2**second - 1], [2**first - 1]])
    assert (first < ratio * second) == kept
    matches, _ = hamming_match(a, b, ratio, mutual=False)
    assert len(matches) == kept


def test_ratio_with_one_candidate(hamming_match):
    a, b = torch.tensor([[7]]), torch.tensor([[0], [5]])
    assert hamming_match(a, b[:1], 1e-9)[0].tolist() == [[0, 0]]
    mask = torch.tensor([[True, False]])
    assert hamming_match(a, b, 1e-9, mask=mask)[0].tolist() == [[0, 0]]
    assert hamming_match(a, b, 1e-9)[0].tolist() == []


def test_ratio_agrees_with_opencvs_loop(cv2, hamming_match):
    a, b = random_sets(200, 300, 64)
    pairs = cv2.BFMatcher(cv2.NORM_HAMMING).knnMatch(a.numpy(), b.numpy(), 2)
    expected = [[m.queryIdx, m.trainIdx] for m, n in pairs if m.distance < 0.8 * n.distance]
    assert 0 < len(expected) < 200
    assert hamming_match(a, b, 0.8, mutual=False)[0].tolist() == expected


def test_largest_distance_is_inclusive(hamming_match):
    a, b = torch.tensor([[0], [0]]), torch.tensor([[7]])
    for most, count in ((0, 0), (2, 0), (3, 2), (64, 2), (2**31, 2), (2**62, 2)):
        assert len(hamming_match(a, b, None, most, mutual=False)[0]) == count


def test_tests_are_independent(hamming_match):
    """A match must pass all of them: the intersection of what each keeps."""
    sets = random_sets(80, 90, 64, seed=3)
    settings = ({"ratio": 0.9}, {"max_distance": 20}, {"mutual": True})
    kept = []
    for setting in settings:
        matches, _ = hamming_match(*sets, **{"mutual": False, **setting})
        kept.append({tuple(pair) for pair in matches.tolist()})
    everything, distances = hamming_match(*sets, 0.9, 20, True)
    assert sorted(set.intersection(*kept)) == [tuple(pair) for pair in everything.tolist()]
    assert 0 < len(everything) < min(map(len, kept))
    table = numpy_distances(*sets)
    assert [table[i, j] for i, j in everything.tolist()] == distances.tolist()


def test_mutual_matches_are_one_to_one(hamming_match):
    matches, _ = hamming_match(*random_sets(150, 130, 128, kinds=20))
    for column in matches.T:
        assert len(column.unique()) == len(column)
    assert torch.equal(matches[:, 0], matches[:, 0].sort().values)


def test_a_set_of_different_rows_matches_itself(hamming_match):
    a, _ = random_sets(100, 0)
    matches, distances = hamming_match(a, a)
    assert torch.equal(matches, torch.arange(100)[:, None].expand(100, 2))
    assert not distances.any()


@BOTH_WORDS
@pytest.mark.parametrize("flipped", [0, 3, 12])
def test_planted_matches_are_found(hamming_match, flipped, words):
    """Descriptors of 64 ones in 256 bits, shuffled among impostors, `flipped` ones moved: distance 2 flipped.

    Impostors are 96 away, give or take 6, so that the planted ones pass any sensible test.
    """
    generator = torch.Generator().manual_seed(flipped)
    logits = torch.randn(300, 256, generator=generator)
    bits = effops.reference.unpack_bits(topk_pack(logits, 64), 256)
    moved = bits[:200].clone()
    for row in moved:
        ones, zeros = row.nonzero()[:, 0], (~row).nonzero()[:, 0]
        row[ones[torch.randperm(64, generator=generator)[:flipped]]] = False
        row[zeros[torch.randperm(192, generator=generator)[:flipped]]] = True
    impostors = effops.reference.unpack_bits(topk_pack(torch.randn(150, 256, generator=generator), 64), 256)
    order = torch.randperm(350, generator=generator)
    a, b = as_words(bits, words), as_words(torch.cat([moved, impostors])[order], words)
    matches, distances = hamming_match(a, b, ratio=0.8, max_distance=40)
    place = torch.empty(350, dtype=torch.int64)
    place[order] = torch.arange(350)
    assert torch.equal(matches, torch.stack([torch.arange(200), place[:200]], dim=1))
    assert (distances == 2 * flipped).all()


def test_empty_sets(hamming_match):
    a, b = random_sets(3, 4)
    for pair in ((a[:0], b), (a, b[:0]), (a[:0], b[:0])):
        matches, distances = hamming_match(*pair, 0.9, 10)
        assert (matches.shape, matches.dtype) == ((0, 2), torch.int64)
        assert (distances.shape, distances.dtype) == ((0,), torch.int32)


@pytest.mark.parametrize("through", ["public", "torch_op"])
def test_vmap_of_matches_is_refused(through):
    a, b = (torch.stack([rows, rows]) for rows in random_sets(3, 4))
    op = effops.hamming_match
    if through == "torch_op":
        op = lambda x, y: torch.ops.effops.hamming_match(x, y, None, None, True, None)  # noqa: E731
    message = "^hamming_match: vmap is not supported: the number of matches depends on the data"
    with pytest.raises(ValueError, match=message):
        torch.vmap(op)(a, b)


def test_vmap_over_nothing():
    a, b = (rows.expand(0, *rows.shape) for rows in random_sets(3, 4))
    assert torch.vmap(effops.hamming_distance)(a, b).shape == (0, 3, 4)
    assert torch.vmap(effops.hamming_knn)(a, b)[1].shape == (0, 3, 1)


@pytest.mark.parametrize("ranks", [(2, 3), (3, 2), (1, 1)], ids=str)
def test_vmap_of_members_of_wrong_rank(ranks):
    """Folded they would fit."""
    a, b = (torch.zeros(2, *(1,) * rank, dtype=torch.int64) for rank in ranks)
    with pytest.raises(ValueError, match="^hamming_distance: expected [ab] of shape"):
        torch.vmap(effops.hamming_distance)(a, b)


@pytest.mark.parametrize("batched", ["both", "a", "mask"])
def test_vmap_of_batched_sets(batched):
    """A batch dimension within, and one mask for its sets in each member."""
    a, b = (torch.stack([rows] * 6).unflatten(0, (3, 2)) for rows in random_sets(4, 5))
    a = a + torch.arange(6, dtype=torch.uint8).view(3, 2, 1, 1)
    mask = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)) < 0.6
    in_dims = {"both": (0, 0, None), "a": (0, None, None), "mask": (None, None, 0)}[batched]
    values = [v if dim == 0 else v[0] for v, dim in zip((a, b, mask), in_dims, strict=True)]

    def knn(x, y, m):
        return effops.hamming_knn(x, y, 2, mask=m, mutual=True)

    found = torch.vmap(knn, in_dims=in_dims)(*values)
    for i in range(3):
        member = [v[i] if dim == 0 else v for v, dim in zip(values, in_dims, strict=True)]
        for actual, wanted in zip(found, knn(*member), strict=True):
            assert torch.equal(actual[i], wanted)
