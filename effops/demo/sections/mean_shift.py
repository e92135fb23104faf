"""Mean shift of the pixels of a photograph: pictures, correctness, times, memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from effops import mean_shift, mean_shift_cluster, reference
from effops.demo._memory import extra_bytes
from effops.demo._section import Result, Row, Section, Settings, Step
from effops.demo._timing import interleaved_min, one_thread
from effops.demo.sections._mean_shift_pictures import (
    KAPPA,
    make_pixels,
    photo_features,
    picture_costs,
    picture_iterations,
    picture_segments,
    points_of,
    threshold,
)

_ITERATIONS = 10
_CHECKED_SIDE, _CHECKED_ITERATIONS = 24, 2  # later ones amplify the rounding errors of every program
_COMPARED_SIDE = 40
_TIMED_SIDES = (24, 40, 64)
_SKLEARN_SIDES = (12, 24)  # it takes long
_MEASURED_SIDE = 32  # memory
_TOLERANCE = 2e-5


def plain_attention(x: Tensor, kappa: float, iterations: int) -> Tensor:
    """mean_shift in plain PyTorch for points [N, D]: attention of the points to themselves."""
    x = F.normalize(x, dim=1)[None, None]
    for _ in range(iterations):
        x = F.normalize(F.scaled_dot_product_attention(x, x, x, scale=kappa), dim=3)
    return x[0, 0]


def plain_matrix(x: Tensor, kappa: float, iterations: int) -> Tensor:
    """mean_shift in plain PyTorch for points [N, D], as its formula says: N x N kernel values."""
    x = F.normalize(x, dim=1)
    for _ in range(iterations):
        kernel = (kappa * (x @ x.T - 1)).exp()
        x = F.normalize(kernel @ x / kernel.sum(1, keepdim=True), dim=1)
    return x


def has_sklearn() -> bool:
    return find_spec("sklearn") is not None


def _sklearn(features: Tensor) -> Tensor:
    """Labels of scikit-learn's MeanShift, in the features and not on the sphere."""
    from sklearn.cluster import MeanShift

    shift = MeanShift(bandwidth=2.0, bin_seeding=True, n_jobs=1).fit(features.numpy())
    return torch.from_numpy(shift.labels_)


@contextmanager
def _alone() -> Iterator[None]:
    """One thread, and numbers too small for the usual format flushed to 0: torch does so per thread."""
    with one_thread():
        torch.set_flush_denormal(True)
        try:
            yield
        finally:
            torch.set_flush_denormal(False)


# ------------------------------------------------------------------------------------------ comparisons

_Op = Callable[..., Tensor]  # (x, kappa, iterations=...)


def _forward(op: _Op, x: Tensor, iterations: int = _ITERATIONS) -> Tensor:
    with torch.no_grad():
        return op(x, KAPPA, iterations=iterations)


def _gradient(op: _Op, x: Tensor, iterations: int = _ITERATIONS) -> Tensor:
    x = x.detach().requires_grad_()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    return torch.autograd.grad(op(x, KAPPA, iterations=iterations), x, grad)[0]


_DIRECTIONS: dict[str, Callable[..., Tensor]] = {"forward": _forward, "fwd + bwd": _gradient}


def _compare(settings: Settings) -> list[Row]:
    """Rows of the table; plain PyTorch is attention, the faster one of two programs."""
    x, some = (
        points_of(settings, min(settings.photo_side, side)) for side in (_COMPARED_SIDE, _CHECKED_SIDE)
    )
    shape = f"N={len(x):,} D={x.shape[1]}, {_ITERATIONS} iterations, one thread"
    rows = []
    for direction, run in _DIRECTIONS.items():
        exact = run(reference.mean_shift, some.double(), _CHECKED_ITERATIONS)
        error = _error(run(mean_shift, some, _CHECKED_ITERATIONS), exact)
        programs = {"effops": mean_shift, "plain": plain_attention}
        times = _time({name: partial(run, op, x) for name, op in programs.items()}, settings)
        rows.append(Row("mean_shift", direction, shape, times["effops"], times["plain"], error, _TOLERANCE))
    return rows


def _compare_sizes(settings: Settings) -> dict[str, dict[int, float]]:
    """Seconds of each program by the number of points."""
    times: dict[str, dict[int, float]] = {"effops": {}, "PyTorch, attention": {}, "PyTorch, N x N": {}}
    for side in _TIMED_SIDES:
        x = points_of(settings, min(settings.photo_side, side))
        functions: dict[str, Callable[[], object]] = {
            "effops": partial(mean_shift_cluster, x, KAPPA, _ITERATIONS, threshold(KAPPA)),
            "PyTorch, attention": partial(_forward, plain_attention, x),
        }
        if side != max(_TIMED_SIDES):  # it would take too long
            functions["PyTorch, N x N"] = partial(_forward, plain_matrix, x)
        for name, seconds in _time(functions, settings).items():
            times[name][len(x)] = seconds
    return times


def _time_sklearn(settings: Settings) -> dict[int, float]:
    """Seconds by the number of points, of one run each."""
    _sklearn(_features(settings, _SKLEARN_SIDES[0]))  # loads what is loaded at the first call
    times = {}
    with _alone():
        for side in _SKLEARN_SIDES:
            features = _features(settings, side)
            start = time.perf_counter()
            _sklearn(features)
            times[len(features)] = time.perf_counter() - start
    return times


def _memory(settings: Settings) -> tuple[dict[str, int | None], int]:
    """Bytes at the peak of each program, and the number of points."""
    x = points_of(settings, min(settings.photo_side, _MEASURED_SIDE))
    programs = {"effops": mean_shift, "attention": plain_attention, "N x N": plain_matrix}
    calls: dict[str, Callable[[], object]] = {
        f"{name}, {direction}": partial(run, op, x)
        for direction, run in _DIRECTIONS.items()
        for name, op in programs.items()
    }
    if has_sklearn():
        calls["scikit-learn"] = partial(_sklearn, _features(settings, _MEASURED_SIDE))
    with _alone():
        return {name: extra_bytes(call, settings.device) for name, call in calls.items()}, len(x)


def _features(settings: Settings, side: int) -> Tensor:
    return photo_features(min(settings.photo_side, side))


def _error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))


def _time(functions: Mapping[str, Callable[[], object]], settings: Settings) -> dict[str, float]:
    with _alone():
        return interleaved_min(functions, seconds=settings.seconds / 10, min_rounds=1, device=settings.device)


def _run(settings: Settings, step: Step) -> Result:
    step("pixels and their modes")
    pixels = make_pixels(settings)
    figures = [picture_iterations(settings, pixels), picture_segments(settings, pixels)]
    step("check and times")
    rows = _compare(settings)
    step("sizes: times")
    times = _compare_sizes(settings)
    if has_sklearn():
        times["scikit-learn"] = _time_sklearn(settings)
    step("memory")
    figures.append(picture_costs(settings, times, *_memory(settings)))
    text = (
        "mean_shift moves points on the unit sphere to the modes of their own density, all at once; "
        "assign_modes labels the modes, and mean_shift_cluster is both. Here the points are the pixels of a "
        "photograph: lightness, two differences of colours, x and y are each an angle on a circle of its "
        "own, so that a unit vector of ten channels stands for the five. The kernel matrix of all pairs of "
        "pixels is never stored, and parts of it that are too small to matter are never computed. Plain "
        "PyTorch in the table is scaled_dot_product_attention of the points to themselves, which needs much "
        "less memory than the N x N matrix."
    )
    return Result(text, figures, rows)


SECTION = Section("Mean shift: segments of a photograph", steps=4, run=_run)
