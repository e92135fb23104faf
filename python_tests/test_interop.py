"""effops.interop: descriptors and matches of OpenCV."""

import sys

import numpy as np
import pytest
import torch

import effops
from effops.interop import to_dmatches


@pytest.fixture
def cv2():
    return pytest.importorskip("cv2")


def textured_image(cv2):
    noise = np.random.default_rng(0).integers(0, 256, (320, 400), dtype=np.uint8)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 3), None, 0, 255, cv2.NORM_MINMAX)


def test_orb_descriptors_from_end_to_end(cv2):
    """An image and itself, moved: the matches agree with OpenCV's own and with the movement."""
    image = textured_image(cv2)
    moved = np.roll(image, (16, 8), axis=(0, 1))
    orb = cv2.ORB_create(200)
    (keypoints, query), (moved_keypoints, train) = (orb.detectAndCompute(i, None) for i in (image, moved))
    pairs = to_dmatches(*effops.hamming_match(torch.from_numpy(query), torch.from_numpy(train)))
    expected = cv2.BFMatcher(cv2.NORM_HAMMING, crossCheck=True).match(query, train)
    as_tuples = [[(m.queryIdx, m.trainIdx, m.distance) for m in matches] for matches in (pairs, expected)]
    assert as_tuples[0] == sorted(as_tuples[1])
    steps = [
        np.subtract(moved_keypoints[m.trainIdx].pt, keypoints[m.queryIdx].pt).tolist()
        for m in pairs
        if m.distance == 0
    ]
    assert len(steps) > 20
    assert sum(step == [8.0, 16.0] for step in steps) > 0.8 * len(steps)
    drawn = cv2.drawMatches(image, keypoints, moved, moved_keypoints, pairs, None)
    assert drawn.shape[1] == 2 * image.shape[1]


def test_bytes_are_not_copied():
    rows = np.zeros((3, 32), dtype=np.uint8)
    assert torch.from_numpy(rows).data_ptr() == rows.ctypes.data


def test_to_dmatches(cv2):
    matches = to_dmatches(torch.tensor([[0, 5], [7, 2]]), torch.tensor([3, 2**20], dtype=torch.int32))
    assert all(isinstance(match, cv2.DMatch) for match in matches)
    found = [(match.queryIdx, match.trainIdx, match.distance) for match in matches]
    assert found == [(0, 5, 3.0), (7, 2, 2.0**20)]
    assert to_dmatches(torch.empty(0, 2, dtype=torch.int64), torch.empty(0)) == []


@pytest.mark.parametrize(
    ("matches", "distances", "error", "blamed"),
    [
        (torch.zeros(3, 3, dtype=torch.int64), torch.zeros(3), ValueError, "matches"),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(2), ValueError, "matches"),
        (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(2), ValueError, "distances"),
        (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 1), ValueError, "distances"),
        (torch.zeros(3, 2), torch.zeros(3), TypeError, "matches"),
        ([[0, 1]], torch.zeros(1), TypeError, "matches"),
        (torch.zeros(1, 2, dtype=torch.int64), [0], TypeError, "distances"),
    ],
)
def test_bad_arguments(matches, distances, error, blamed):
    with pytest.raises(error, match=f"^to_dmatches: expected {blamed} "):
        to_dmatches(matches, distances)


def test_without_opencv(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match="^to_dmatches: OpenCV is needed .*pip install opencv-python"):
        to_dmatches(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1))
