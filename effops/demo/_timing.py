"""Times of several functions on a machine that other programs use too.

The functions take turns, so that all meet the same disturbances, and the shortest time of each counts.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch


def interleaved_min(
    functions: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 5.0,
    min_rounds: int = 3,
    max_rounds: int = 200,
    device: str = "cpu",
) -> dict[str, float]:
    """Shortest time of each function in seconds.

    After one round that is not counted, rounds follow until the time is up, but at least min_rounds and at
    most max_rounds. On a GPU a call is timed until the device is idle, with its launches.
    """
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else _nothing
    for function in functions.values():
        function()
    wait()
    best = dict.fromkeys(functions, float("inf"))
    stop = time.perf_counter() + seconds
    for done in range(max_rounds):
        if done >= min_rounds and time.perf_counter() > stop:
            break
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            wait()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread: for comparisons, and for work so small that threads would wait for each other."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


def _nothing() -> None:
    pass
