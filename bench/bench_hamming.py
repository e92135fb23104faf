"""Hamming search of binary descriptors, against faiss, OpenCV and a matrix product.

`points` are distances: rows of a times rows of b.
"""

from __future__ import annotations

import peers_hamming
import pytest
import roofline
import torch
from torch import Tensor

import effops

# rows of a, rows of b, bits, k
_SEARCHES = {
    "10k x 10k, 256 bits, 2-NN": (10_000, 10_000, 256, 2),
    "10k x 10k, 512 bits, 2-NN": (10_000, 10_000, 512, 2),
    "2k x 2k, 256 bits, 2-NN": (2_000, 2_000, 256, 2),
    "10k x 10k, 128 bits, 2-NN": (10_000, 10_000, 128, 2),
    "5k x 5k, 1024 bits, 2-NN": (5_000, 5_000, 1024, 2),
    "10k x 10k, 256 bits, 1-NN": (10_000, 10_000, 256, 1),
    "10k x 10k, 256 bits, 10-NN": (10_000, 10_000, 256, 10),
    "1 x 1M, 256 bits, 2-NN": (1, 1_000_000, 256, 2),
}
_LARGE = {"100k x 100k, 256 bits, 2-NN": (100_000, 100_000, 256, 2)}
_TARGETS = {"10k x 10k, 256 bits, 2-NN": 25.0}  # milliseconds: 4 G distances/s with AVX-512
_DISTANCES = {"2k x 2k, 256 bits": (2_000, 2_000, 256), "300 x 20k, 256 bits": (300, 20_000, 256)}


def _descriptors(rows: int, bits: int, seed: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (rows, bits // 8), generator=generator, dtype=torch.uint8).to(device)


def _work(rows_a: int, rows_b: int, bits: int) -> roofline.Work:
    return roofline.Work(counted=rows_a * rows_b * bits / 64, streamed=(rows_a + rows_b) * bits / 8)


@pytest.mark.parametrize("name", [*_SEARCHES, *_LARGE])
def test_hamming_knn(name, device, race, benchmark):
    if name in _LARGE and device == "cpu":
        pytest.skip("takes minutes on a CPU: for GPUs")
    rows_a, rows_b, bits, k = (_SEARCHES | _LARGE)[name]
    a, b = _descriptors(rows_a, bits, 0, device), _descriptors(rows_b, bits, 1, device)
    calls = {} if name in _LARGE else peers_hamming.knn(a, b, k)
    expected = effops.hamming_knn(a, b, k)[0].long().cpu()
    for peer, call in calls.items():
        assert torch.equal(peers_hamming.distances_of(call()), expected), peer
    benchmark.group = "hamming_knn"
    benchmark.extra_info.update(op="hamming_knn", shape=name, dtype="uint8", direction="forward")
    if device == "cpu" and name in _TARGETS:
        benchmark.extra_info["target_milliseconds"] = _TARGETS[name]
    race(lambda: effops.hamming_knn(a, b, k), calls, points=rows_a * rows_b, work=_work(rows_a, rows_b, bits))


@pytest.mark.parametrize("name", ["10k x 10k, 256 bits, 2-NN", "2k x 2k, 256 bits, 2-NN"])
@pytest.mark.parametrize("ratio", [None, 0.9], ids=["mutual", "mutual and ratio"])
def test_hamming_match(ratio, name, device, race, benchmark):
    """The mutual check, beside one search for 2 neighbours of the same sets."""
    rows_a, rows_b, bits, k = _SEARCHES[name]
    a, b = _descriptors(rows_a, bits, 0, device), _descriptors(rows_b, bits, 1, device)
    calls = peers_hamming.match(a, b) if ratio is None else {}
    if "cv2.BFMatcher" in calls:
        pairs = torch.tensor([(match.queryIdx, match.trainIdx) for match in calls["cv2.BFMatcher"]()])
        assert torch.equal(effops.hamming_match(a, b)[0], pairs)
    benchmark.group = "hamming_match"
    shape = f"{name.rsplit(',', 1)[0]}, {'mutual' if ratio is None else 'mutual and ratio'}"
    benchmark.extra_info.update(op="hamming_match", shape=shape, dtype="uint8", direction="forward")
    times = race(
        lambda: effops.hamming_match(a, b, ratio=ratio),
        calls,
        points=rows_a * rows_b,
        work=_work(rows_a, rows_b, bits),
        others={"one 2-NN search": lambda: effops.hamming_knn(a, b, k)},
    )
    benchmark.extra_info["times_one_search"] = round(times["effops"] / times["one 2-NN search"], 2)


@pytest.mark.parametrize("name", _DISTANCES)
def test_hamming_distance(name, device, race, benchmark):
    rows_a, rows_b, bits = _DISTANCES[name]
    a, b = _descriptors(rows_a, bits, 0, device), _descriptors(rows_b, bits, 1, device)
    plain = peers_hamming.plain_distance
    assert torch.equal(effops.hamming_distance(a, b), plain(a, b).int())
    benchmark.group = "hamming_distance"
    benchmark.extra_info.update(op="hamming_distance", shape=name, dtype="uint8", direction="forward")
    race(
        lambda: effops.hamming_distance(a, b),
        {"matmul": lambda: plain(a, b)},
        points=rows_a * rows_b,
        work=_work(rows_a, rows_b, bits),
    )
