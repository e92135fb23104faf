"""To and from the libraries that binary descriptors are exchanged with.

Descriptors of OpenCV (ORB, BRISK, AKAZE) and faiss are NumPy arrays of bytes, [N, W] uint8. They go into
``effops.hamming_knn`` and its sisters as they are, without a copy::

    matches, distances = effops.hamming_match(torch.from_numpy(query), torch.from_numpy(train))

and the result comes back as OpenCV's ``DMatch`` objects by :func:`to_dmatches`. Rows of packed int64 words go
the other way by ``words.view(torch.uint8).numpy()``: the same bits, in the order of faiss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    import cv2

_NAME = "to_dmatches"


def to_dmatches(
    matches: Tensor,  # [n, 2]
    distances: Tensor,  # [n]
) -> list[cv2.DMatch]:
    """Matches as OpenCV has them: for ``cv2.drawMatches``, or code that reads ``queryIdx`` and ``trainIdx``.

    Args:
        matches: Pairs (index of the query, index of the train descriptor), [n, 2] of an integer dtype, as
            from ``effops.hamming_match``; on any device.
        distances: Of the pairs, [n].

    Returns:
        n ``cv2.DMatch`` objects in the same order.

    Raises:
        ValueError: wrong shapes.
        TypeError: an argument that is no tensor, or pairs that are not integers.
        ImportError: OpenCV is not installed.
    """
    for argument, value in (("matches", matches), ("distances", distances)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{_NAME}: expected {argument} to be a Tensor, got {type(value).__name__}")
    if matches.dim() != 2 or matches.shape[1] != 2:
        raise ValueError(f"{_NAME}: expected matches of shape [n, 2], got {list(matches.shape)}")
    if distances.shape != matches.shape[:1]:
        raise ValueError(
            f"{_NAME}: expected distances of shape [n={len(matches)}], got {list(distances.shape)}"
        )
    if matches.is_floating_point() or matches.is_complex():
        raise TypeError(f"{_NAME}: expected matches of an integer dtype, got {matches.dtype}")
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            f"{_NAME}: OpenCV is needed to make its DMatch objects: pip install opencv-python-headless"
        ) from error
    pairs = zip(matches.tolist(), distances.tolist(), strict=True)
    return [cv2.DMatch(query, train, distance) for (query, train), distance in pairs]
