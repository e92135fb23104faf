"""Mean shift on the unit sphere: 4096 points in 64 dimensions around 12 directions, 10 iterations.

"in runs": the points of a group follow each other, as the pixels of an object do; "mixed": in random order;
"uniform": no groups. PyTorch flushes subnormal numbers to 0 meanwhile, which it does not do by default.

The work is that of all pairs, each of which counts once as the kernel is symmetric: 1.5 N^2 D multiply-adds
per iteration, 5 with the gradients (climbing seeds: 2 M N D). effops leaves out pairs whose kernel value is
negligible, so that it may be beyond 100 % of the roofline. `points` are rows times iterations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import memory
import peers_pairwise
import pytest
import torch
import torch.nn.functional as F
from peers_rowconv import checked_calls
from roofline import Work
from torch import Tensor

import effops

_Function = Callable[..., Tensor]
_Call = Callable[[], Any]

_POINTS, _CHANNELS, _GROUPS, _ITERATIONS = 4096, 64, 12, 10
_NOISE = 0.05  # standard deviation of every coordinate
_DIRECTIONS = ["forward", "forward+backward"]
_MULTIPLY_ADDS = {"forward": 1.5, "forward+backward": 5.0}  # per pair and channel
_MEDIUM_TOLERANCE = 0.05  # of bfloat16, mostly in the gradients
_GPU_TARGETS = {"high": 6.0, "medium": 2.0}  # milliseconds for 16384 points on an H100, all pairs


def _points(kind: str, count: int, channels: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(channels)
    noise = torch.randn(count, channels, generator=generator)
    if kind == "uniform":
        return noise.to(device)
    centers = F.normalize(torch.randn(_GROUPS, channels, generator=generator), dim=1)
    numbers = torch.arange(count) * _GROUPS // count
    if kind == "mixed":
        numbers = numbers[torch.randperm(count, generator=generator)]
    return (centers[numbers] + _NOISE * noise).to(device)


def _functions(kappa: float) -> dict[str, _Function]:
    functions: dict[str, _Function] = {
        "effops": effops.mean_shift,
        "attention": peers_pairwise.mean_shift_attention,
        "attention bfloat16": functools.partial(peers_pairwise.mean_shift_attention, dtype=torch.bfloat16),
        "blocks": peers_pairwise.mean_shift_blocks,
        "N x N": peers_pairwise.mean_shift_matrix,
        "compiled N x N": peers_pairwise.mean_shift_compiled,
    }
    settings = {"kappa": kappa, "iterations": _ITERATIONS}
    return {name: functools.partial(function, **settings) for name, function in functions.items()}


def _checked(
    functions: Mapping[str, _Function],
    inputs: Sequence[Tensor],
    direction: str,
    tolerance: float | None = None,
) -> dict[str, _Call]:
    """Calls that agree; those of peers flush subnormal numbers."""
    with peers_pairwise.flush_denormal():
        calls = checked_calls(functions, inputs, direction, tolerance=tolerance)
    return _flushing(calls)


def _flushing(calls: Mapping[str, _Call]) -> dict[str, _Call]:
    """effops does it itself where it matters."""
    flush = peers_pairwise.flush_denormal()
    return {name: call if name == "effops" else flush(call) for name, call in calls.items()}


def _work(pairs: int, channels: int, multiply_adds: float) -> Work:
    return Work(flops=2 * multiply_adds * _ITERATIONS * pairs * channels)


def memory_case(
    device: str, name: str, count: str, direction: str
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """For memory.extra_bytes; gradients count as extra memory."""
    function = _functions(36.0)[name]

    def both(leaf: Tensor) -> Tensor:
        out = function(leaf)
        torch.autograd.grad(out, leaf, torch.ones_like(out))
        return out.detach()

    calls: list[_Call] = []
    for size in (256, int(count)):
        x = _points("in runs", size, _CHANNELS, device)
        if direction == "forward":
            calls.append(functools.partial(function, x))
        else:
            calls.append(functools.partial(both, x.requires_grad_()))
    flush = peers_pairwise.flush_denormal()
    return flush(calls[0]), flush(calls[1])


def _note_memory(benchmark: Any, device: str, names: Sequence[str], count: int, direction: str) -> None:
    case = ("bench_mean_shift", "memory_case", device)
    needed = {name: memory.extra_bytes(*case, name, str(count), direction) for name in names}
    benchmark.extra_info["extra_megabytes"] = {name: round(n / 1e6, 1) for name, n in needed.items()}


def _note(benchmark: Any, op: str, shape: str, direction: str, dtype: str = "float32") -> None:
    benchmark.group = op
    benchmark.extra_info.update(op=op, shape=f"{op} {shape}", dtype=dtype, direction=direction)


def _shape(kind: str, kappa: float, count: int = _POINTS, channels: int = _CHANNELS) -> str:
    return f"N={count}, D={channels}, kappa={kappa:g}, {kind}"


@pytest.mark.parametrize("direction", _DIRECTIONS)
@pytest.mark.parametrize(
    ("kind", "kappa"),
    [("in runs", 36.0), ("in runs", 100.0), ("mixed", 36.0), ("mixed", 100.0), ("uniform", 1.0)],
)
def test_mean_shift(kind, kappa, direction, device, race, benchmark):
    functions = _functions(kappa)
    del functions["attention bfloat16"]
    if direction != "forward":
        del functions["blocks"]  # it writes over what a gradient needs
    if kind == "mixed":  # for which the order makes no difference
        del functions["N x N"], functions["compiled N x N"]
    x = _points(kind, _POINTS, _CHANNELS, device)
    calls = _checked(functions, [x], direction)
    others = {} if direction == "forward" else {"forward": lambda: functions["effops"](x)}
    _note(benchmark, "mean_shift", _shape(kind, kappa), direction)
    times = race(
        calls.pop("effops"),
        calls,
        points=_ITERATIONS * _POINTS,
        work=_work(_POINTS**2, _CHANNELS, _MULTIPLY_ADDS[direction]),
        calls=1 if device == "cpu" else 10,
        others=others,
    )
    if others:
        benchmark.extra_info["times_forward"] = round(times["effops"] / times["forward"], 2)
    if (kind, kappa) == ("in runs", 36.0):
        _note_memory(benchmark, device, ("effops", "attention", "N x N"), _POINTS, direction)


@pytest.mark.parametrize("direction", _DIRECTIONS)
@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize(("kind", "kappa"), [("in runs", 36.0), ("uniform", 1.0)])
def test_many_points(kind, kappa, precision, direction, device, race, benchmark):
    """The roofline is that of float32. No precision but one on the CPU."""
    if device == "cpu" and (kind, precision, direction) != ("in runs", "high", "forward"):
        pytest.skip("for GPUs")
    count, medium = 16384, precision == "medium"
    every = _functions(kappa)
    functions: dict[str, _Function] = {
        "effops": functools.partial(every["effops"], precision=precision),
        "attention": every["attention bfloat16" if medium else "attention"],
    }
    x = _points(kind, count, _CHANNELS, device)
    calls = _checked(functions, [x], direction, _MEDIUM_TOLERANCE if medium else None)
    others = {} if direction == "forward" else {"forward": lambda: functions["effops"](x)}
    dtype = "bfloat16 products" if medium else "float32"
    _note(benchmark, "mean_shift", _shape(kind, kappa, count), direction, dtype)
    if device == "cuda" and direction == "forward":
        benchmark.extra_info["target_milliseconds"] = _GPU_TARGETS[precision]
    times = race(
        calls.pop("effops"),
        calls,
        points=_ITERATIONS * count,
        work=None if medium else _work(count**2, _CHANNELS, _MULTIPLY_ADDS[direction]),
        others=others,
    )
    if others:
        benchmark.extra_info["times_forward"] = round(times["effops"] / times["forward"], 2)
    if kind == "in runs" and not medium:
        _note_memory(benchmark, device, ("effops", "attention"), count, direction)


@pytest.mark.parametrize("channels", [3, 16, 128, 256])
def test_channels(channels, device, race, benchmark):
    functions = {name: f for name, f in _functions(36.0).items() if name in ("effops", "attention", "blocks")}
    calls = _checked(functions, [_points("in runs", _POINTS, channels, device)], "forward")
    _note(benchmark, "mean_shift", _shape("in runs", 36.0, channels=channels), "forward")
    race(
        calls.pop("effops"),
        calls,
        points=_ITERATIONS * _POINTS,
        work=_work(_POINTS**2, channels, _MULTIPLY_ADDS["forward"]),
        calls=1 if device == "cpu" else 10,
    )


@pytest.mark.parametrize("count", [4096, 16384])
def test_seeds(count, device, race, benchmark):
    """As UnseenObjectClustering has them; it chooses points far from each other."""
    kappa, rows = 20.0, 100
    x = _points("in runs", count, _CHANNELS, device)
    settings: dict[str, Any] = {"kappa": kappa, "iterations": _ITERATIONS}
    functions: dict[str, _Function] = {
        "effops": lambda x, seeds: effops.mean_shift(x, seeds=seeds, **settings),
        "attention": functools.partial(peers_pairwise.climb_attention, **settings),
        "M x N": functools.partial(peers_pairwise.climb_matrix, **settings),
    }
    calls = _checked(functions, [x, x[:: count // rows][:rows]], "forward")
    _note(benchmark, "mean_shift", f"{_shape('in runs', kappa, count)}, {rows} seeds", "forward")
    race(
        calls.pop("effops"),
        calls,
        points=_ITERATIONS * rows,
        work=_work(rows * count, _CHANNELS, 2),
        calls=1 if device == "cpu" else 10,
    )


def test_mean_shift_cluster(device, race, benchmark):
    """scikit-learn has a flat kernel, with a radius here that holds a group."""
    kappa, threshold = 36.0, 0.9
    x = _points("in runs", _POINTS, _CHANNELS, device)
    attention = _functions(kappa)["attention"]
    functions: dict[str, _Function] = {
        "effops": lambda x: effops.mean_shift_cluster(x, kappa, _ITERATIONS, threshold),
        "attention + search": lambda x: peers_pairwise.labels_by_search(attention(x), threshold),
    }
    by_sklearn = peers_pairwise.labels_by_sklearn(bandwidth=0.8)
    if device == "cpu" and by_sklearn is not None:
        functions["scikit-learn"] = by_sklearn
    calls = _flushing({name: functools.partial(function, x) for name, function in functions.items()})
    labels = {name: call() for name, call in calls.items()}
    assert len(labels["effops"].unique()) == _GROUPS
    for name, found in labels.items():
        assert torch.equal(found, labels["effops"]), name
    _note(benchmark, "mean_shift_cluster", _shape("in runs", kappa), "forward")
    race(
        calls.pop("effops"),
        calls,
        points=_POINTS,
        work=Work(flops=(_ITERATIONS * 3 + 1) * _POINTS**2 * _CHANNELS),
    )


def test_assign_modes(device, race, benchmark):
    """Of the points themselves."""
    threshold = 0.9
    x = _points("mixed", _POINTS, _CHANNELS, device)
    ours = functools.partial(effops.ops.assign_modes, x, threshold)
    peer = functools.partial(peers_pairwise.labels_by_search, x, threshold)
    assert torch.equal(ours(), peer())
    _note(benchmark, "assign_modes", f"N={_POINTS}, D={_CHANNELS}, mixed", "forward")
    race(ours, {"search": peer}, points=_POINTS, work=Work(flops=_POINTS**2 * _CHANNELS))
