"""Matches of binary descriptors between two views, and binnorm: pictures, correctness, times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from effops import binnorm, hamming_match, reference
from effops.demo._extras import MissingExtraError, require
from effops.demo._section import Figure, Result, Row, Section, Settings, Step
from effops.demo._timing import interleaved_min
from effops.demo.sections._hamming_match_pictures import (
    RATIO,
    Views,
    make_views,
    picture_binnorm,
    picture_matches,
    picture_times,
)

if TYPE_CHECKING:
    import cv2

_ROWS, _BITS, _ONES = 1024, 256, 64  # binnorm
_CHECKED = 300  # keypoints of each view, and rows: the reference is slow and needs much memory
_TOLERANCE = 1e-5


def plain_hamming_match(a: Tensor, b: Tensor, ratio: float | None) -> Tensor:
    """The op in plain PyTorch for bytes [N, W]: mutual matches, or those of a ratio test.

    The product of descriptors of +1 and -1 is the number of bits minus twice the distance, exactly.
    """
    distances = (8 * a.shape[1] - _signs(a) @ _signs(b).t()) / 2
    if ratio is None:
        return _mutual_pairs(distances.argmin(1), distances.argmin(0))
    (first, second), index = (tensor.unbind(1) for tensor in distances.topk(2, dim=1, largest=False))
    return _chosen_pairs(first < ratio * second, index[0])


def plain_binnorm(x: Tensor, k: int) -> Tensor:
    """The op in plain PyTorch for rows [N, M] of finite logits, 0 < k < M: the root by bisection."""
    with torch.no_grad():
        middle = torch.logit(torch.full_like(x[:, :1], k / x.shape[1]))
        low, high = middle - x.amax(1, keepdim=True), middle - x.amin(1, keepdim=True)
        for _ in range(30):
            nu = (low + high) / 2
            is_above = torch.sigmoid(x + nu).sum(1, keepdim=True) > k
            low, high = torch.where(is_above, low, nu), torch.where(is_above, nu, high)
        y = torch.sigmoid(x + nu)
        slope = (y * (1 - y)).sum(1, keepdim=True)
    total = torch.sigmoid(x + nu).sum(1, keepdim=True)
    return torch.sigmoid(x + nu + (total.detach() - total) / slope)  # adds 0, with the root's derivative


def _signs(packed: Tensor) -> Tensor:
    """Bytes [N, W] as +1 and -1, [N, 8 W]."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (2.0 * (packed[:, :, None] >> places & 1) - 1).flatten(1)


def _mutual_pairs(of_a: Tensor, of_b: Tensor) -> Tensor:
    """From the nearest row of each row, those that are each other's."""
    rows = torch.arange(len(of_a), device=of_a.device)
    return _chosen_pairs(of_b[of_a] == rows, of_a)


def _chosen_pairs(chosen: Tensor, of_a: Tensor) -> Tensor:
    return torch.stack([chosen.nonzero()[:, 0], of_a[chosen]], 1)


# ------------------------------------------------------------------------------------------ peers


def _opencv(a: Tensor, b: Tensor, ratio: float | None) -> Sequence[cv2.DMatch]:
    """BFMatcher as its users call it: with crossCheck, or with the ratio test in Python."""
    import cv2

    matcher = cv2.BFMatcher(cv2.NORM_HAMMING, crossCheck=ratio is None)
    if ratio is None:
        return matcher.match(a.numpy(), b.numpy())
    nearest = matcher.knnMatch(a.numpy(), b.numpy(), k=2)
    return [first for first, second in nearest if first.distance < ratio * second.distance]


def _faiss(a: Tensor, b: Tensor, ratio: float | None) -> Tensor:
    """Exact search; mutual matches take one in each direction."""
    import faiss

    def search(queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        distances, indices = faiss.knn_hamming(queries.numpy(), rows.numpy(), k)
        return torch.from_numpy(distances), torch.from_numpy(indices)

    if ratio is None:
        return _mutual_pairs(search(a, b, 1)[1][:, 0], search(b, a, 1)[1][:, 0])
    distances, indices = search(a, b, 2)
    return _chosen_pairs(distances[:, 0] < ratio * distances[:, 1], indices[:, 0])


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch, and OpenCV and faiss if they are there, on one thread each."""
    settings: list[tuple[Callable[[], int], Callable[[int], None]]]
    settings = [(torch.get_num_threads, torch.set_num_threads)]
    if _has("cv2"):
        import cv2

        settings.append((cv2.getNumThreads, cv2.setNumThreads))
    if _has("faiss"):
        import faiss

        settings.append((faiss.omp_get_max_threads, faiss.omp_set_num_threads))
    before = [get() for get, _ in settings]
    try:
        for _, set_threads in settings:
            set_threads(1)
        yield
    finally:
        for (_, set_threads), count in zip(settings, before, strict=True):
            set_threads(count)


def _has(module: str) -> bool:
    return find_spec(module) is not None


# ------------------------------------------------------------------------------------------ comparisons


def _mismatch(ours: Tensor, theirs: Tensor) -> float:
    """How many pairs [n, 2] only one of both has, divided by the number of theirs."""
    pairs, expected = ({tuple(pair) for pair in matches.tolist()} for matches in (ours, theirs))
    return len(pairs ^ expected) / max(len(expected), 1)


def _matches(op: Callable[..., tuple[Tensor, Tensor]], a: Tensor, b: Tensor, ratio: float | None) -> Tensor:
    return op(a, b, ratio, mutual=ratio is None)[0]


def _compare_matches(views: Views, settings: Settings) -> tuple[list[Row], dict[str, dict[str, float]]]:
    """Rows of the table, and the times of all programs by kind of match.

    The matches of some keypoints are compared with the reference, those of all with OpenCV's.
    """
    a, b = views.descriptors
    device_a, device_b = a.to(settings.device), b.to(settings.device)
    some_a, some_b = (tensor[:: max(len(tensor) // _CHECKED, 1)] for tensor in (device_a, device_b))
    rows: list[Row] = []
    times: dict[str, dict[str, float]] = {}
    for case, ratio in (("mutual", None), (f"ratio {RATIO}", RATIO)):
        ours = partial(_matches, hamming_match, device_a, device_b, ratio)
        opencv = torch.tensor([(match.queryIdx, match.trainIdx) for match in _opencv(a, b, ratio)])
        exact = _matches(reference.hamming_match, some_a, some_b, ratio)
        error = max(
            _mismatch(ours(), opencv), _mismatch(_matches(hamming_match, some_a, some_b, ratio), exact)
        )
        programs: dict[str, Callable[[], object]] = {"effops": ours}
        if _has("faiss"):
            programs["faiss"] = partial(_faiss, a, b, ratio)
        programs["OpenCV"] = partial(_opencv, a, b, ratio)
        programs["plain PyTorch"] = partial(plain_hamming_match, device_a, device_b, ratio)
        best = _time(programs, settings)
        times[case] = best
        shape = f"{len(a):,} x {len(b):,} of {8 * a.shape[1]} bits, one thread"
        rows.append(Row("hamming_match", case, shape, best["effops"], best["plain PyTorch"], error, 0.0))
    return rows, times


def _compare_binnorm(settings: Settings) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(_ROWS, _BITS, generator=generator).to(settings.device) for _ in range(2))
    x.requires_grad_()

    def gradient(op: Callable[[Tensor, int], Tensor]) -> Tensor:
        return torch.autograd.grad(op(x, _ONES), x, grad)[0]

    exact_x = x.detach()[:_CHECKED].double().requires_grad_()
    exact = reference.binnorm(exact_x, _ONES)
    exact_gradient = torch.autograd.grad(exact, exact_x, grad[:_CHECKED].double())[0]
    rows = []
    for direction, error, run in (
        ("forward", _error(binnorm(x, _ONES), exact), lambda op: op(x, _ONES)),
        ("fwd + bwd", _error(gradient(binnorm), exact_gradient), gradient),
    ):
        functions = {"effops": partial(run, binnorm), "plain": partial(run, plain_binnorm)}
        times = _time(functions, settings)
        shape = f"{_ROWS:,} rows of {_BITS}, k={_ONES}, one thread"
        rows.append(Row("binnorm", direction, shape, times["effops"], times["plain"], error, _TOLERANCE))
    return rows


def _time(functions: Mapping[str, Callable[[], object]], settings: Settings) -> dict[str, float]:
    with _one_thread():
        return interleaved_min(functions, seconds=settings.seconds / 4, min_rounds=2, device=settings.device)


def _error(result: Tensor, exact: Tensor) -> float:
    """Of the result's first rows, those that the reference has."""
    result, exact = result.detach()[: len(exact)], exact.detach()
    return float((result.double() - exact).abs().max() / exact.abs().max())


def _run(settings: Settings, step: Step) -> Result:
    figures: list[Figure] = []
    rows: list[Row] = []
    text = (
        "hamming_match pairs binary descriptors of two pictures: here ORB's, of a photograph and of the same "
        "photograph under a known homography, which says what pairs are right. "
    )
    try:
        require("cv2")
    except MissingExtraError as error:
        text += f"ORB is OpenCV's, so there are no matches on this page. {error}. "
    else:
        step("keypoints and matches")
        views = make_views(settings)
        figures.append(picture_matches(settings, views))
        step("matches: check and times")
        rows, times = _compare_matches(views, settings)
        figures.append(picture_times(settings, times))
        same = "the same as" if all(row.is_correct for row in rows) else "NOT the same as"
        text += (
            "It reads OpenCV's bytes without a copy. Mutual matches and those of the ratio test are "
            f"{same} OpenCV's and, for some of the keypoints, those of the reference. "
        )
    text += "binnorm is the layer that learnt binary descriptors are trained with."
    step("binnorm")
    figures.append(picture_binnorm(settings))
    step("binnorm: check and times")
    return Result(text, figures, rows + _compare_binnorm(settings))


SECTION = Section("Binary descriptors", steps=4, run=_run)
