"""Options and fixtures of the benchmarks.

The ratio to a peer is what counts, and the machine may be shared: `race` runs effops and its peers in turns
in one process and takes the shortest time of each.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import roofline
import torch

import effops
from effops import collect_env
from effops.demo._timing import interleaved_min


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("effops")
    group.addoption("--device", choices=["auto", "cpu", "cuda"], default="auto")
    group.addoption("--threads", type=int, default=1, help="threads of torch")
    group.addoption("--seconds", type=float, default=3.0, help="time for each race")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    chosen = request.config.getoption("--device")
    if chosen == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(chosen)


@pytest.fixture(scope="session", autouse=True)
def threads(request: pytest.FixtureRequest) -> int:
    torch.set_num_threads(request.config.getoption("--threads"))
    return torch.get_num_threads()


@pytest.fixture
def race(
    request: pytest.FixtureRequest, benchmark: Any, device: str, threads: int
) -> Callable[..., dict[str, float]]:
    """Times effops against its peers and records the numbers in the JSON of pytest-benchmark.

    race(ours, peers, points=..., work=..., calls=1, others={}) takes functions without arguments and returns
    seconds per call; `others` are timed too, but are no peers. It records `ratio` (to the strongest peer),
    `ratios`, `milliseconds` (of all), `points_per_second` and `percent_of_roofline`.
    """

    def run(
        ours: Callable[[], object],
        peers: Mapping[str, Callable[[], object]],
        *,
        points: int | None = None,
        work: roofline.Work | None = None,
        calls: int = 1,
        others: Mapping[str, Callable[[], object]] | None = None,
    ) -> dict[str, float]:
        functions = {"effops": ours, **peers, **(others or {})}
        repeated = {name: _repeat(function, calls) for name, function in functions.items()}
        times = interleaved_min(
            repeated, seconds=request.config.getoption("--seconds"), min_rounds=2, device=device
        )
        times = {name: seconds / calls for name, seconds in times.items()}
        best = times["effops"]
        ratios = {name: round(times[name] / best, 2) for name in peers}
        info = benchmark.extra_info
        info["hardware"] = _hardware(device, threads)
        info["milliseconds"] = {name: round(seconds * 1e3, 4) for name, seconds in times.items()}
        info["ratios"] = ratios
        if ratios:
            info["strongest_peer"] = min(ratios, key=lambda name: ratios[name])
            info["ratio"] = ratios[info["strongest_peer"]]
        if points is not None:
            info["points_per_second"] = round(points / best)
        if work is not None:
            limits = roofline.measure(device, threads)
            info["percent_of_roofline"] = round(100 * limits.seconds(work) / best, 1)
            info["roofline"] = limits.as_dict()
            if work.gathered:
                gather = limits.gather(work.row, work.table)
                info["roofline"]["gather_giga_per_second"] = round(gather / 1e9, 1)
        wait = torch.cuda.synchronize if device == "cuda" else None
        benchmark.pedantic(_then(repeated["effops"], wait), rounds=3, iterations=1, warmup_rounds=0)
        return times

    return run


def _repeat(function: Callable[[], object], calls: int) -> Callable[[], object]:
    if calls == 1:
        return function

    def repeated() -> None:
        for _ in range(calls):
            function()

    return repeated


def _then(function: Callable[[], object], wait: Callable[[], None] | None) -> Callable[[], object]:
    if wait is None:
        return function

    def both() -> None:
        function()
        wait()

    return both


def _hardware(device: str, threads: int) -> str:
    line = collect_env.hardware(device)
    return line if device == "cuda" else f"{line}, {threads} thread{'s' if threads != 1 else ''}"


# The JSON is published: versions and the name of the processor stay, names of machines and folders do not.
@pytest.hookimpl(trylast=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.clear()
    machine_info.update(
        hardware=collect_env.hardware("cuda" if torch.cuda.is_available() else "cpu"),
        processor=f"{collect_env.cpu_name()}, {collect_env.cpu_cores()} cores",
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        effops=effops.__version__,
        build=effops.build_info(),
        cpu_capability=effops.cpu_capability(),
    )


@pytest.hookimpl(trylast=True)
def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    import peers

    output_json["missing_peers"] = dict(peers.MISSING)
    commit = output_json.get("commit_info", {})
    output_json["commit_info"] = {key: commit.get(key) for key in ("id", "time", "dirty")}
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)
