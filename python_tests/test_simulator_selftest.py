"""The CUDA host simulator itself: right kernels give right results in every schedule, wrong ones are caught.

The kernels are in native/simulate_selftest.cpp and native/simulate_selftest_faults.cpp.
"""

from __future__ import annotations

import math
import re

import pytest
import simulator
import torch
from simulator import SimulatorError
from torch import Tensor

SCHEDULES = ("forward", "reverse", "random:1", "random:2")
PROGRAMS = ("simulate_selftest", "simulate_selftest_faults")
NUMBERS = (torch.float32, torch.float64, torch.int32, torch.int64)


@pytest.fixture(scope="module", autouse=True)
def _drivers() -> None:
    """All at once, so that the compiler has work for every core."""
    simulator.build(*PROGRAMS, *(f"{program}_races" for program in PROGRAMS))


def random_numbers(*shape: int, dtype: torch.dtype = torch.int32, low: int = 0, high: int = 100) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


# ------------------------------------------------------------------------------------------ right kernels


@pytest.mark.parametrize("dtype", NUMBERS)
def test_block_sum(dtype):
    x = random_numbers(3, 256, dtype=dtype)
    sums = simulator.run_schedules("selftest.block_sum", {"x": x, "barrier": True})["sums"]
    torch.testing.assert_close(sums, x.sum(1, dtype=dtype))


def test_block_of_1024_threads():
    x = random_numbers(2, 1024, dtype=torch.int64)
    sums = simulator.run_schedules("selftest.block_sum", {"x": x, "barrier": True})["sums"]
    assert sums.tolist() == x.sum(1).tolist()


def shuffled(x: Tensor, argument: int, width: int) -> Tensor:
    """What the four shuffles give, by the rules of the CUDA programming guide."""
    rows = []
    for thread in range(len(x)):
        lane, warp = thread % 32, thread - thread % 32
        first = lane - lane % width
        up = lane - argument if lane - argument >= first else lane
        down = lane + argument if lane + argument < first + width else lane
        across = lane ^ argument if lane ^ argument < first + width else lane
        rows.append([x[warp + source] for source in (first + argument % width, up, down, across)])
    return torch.tensor(rows, dtype=x.dtype)


WIDTHS = [(1, 32), (16, 32), (31, 32), (3, 8), (1, 2), (8, 16), (9, 4), (0, 1)]


@pytest.mark.parametrize(("argument", "width"), WIDTHS)
def test_shuffles_with_width(argument, width):
    x = random_numbers(64, low=-1000, high=1000)
    y = simulator.run_schedules("selftest.shuffle", {"x": x, "argument": argument, "width": width})["y"]
    assert y.tolist() == shuffled(x, argument, width).tolist()


@pytest.mark.parametrize("dtype", NUMBERS)
def test_shuffles_of_every_type(dtype):
    x = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (x * 2**40).long() if dtype == torch.int64 else (x * 1000).to(dtype)
    y = simulator.run_schedules("selftest.shuffle", {"x": x, "argument": 5, "width": 16})["y"]
    assert torch.equal(y, shuffled(x, 5, 16))


def test_shuffles_of_types_that_torch_lacks():
    assert simulator.run_schedules("selftest.shuffle_types", {})["y"].tolist() == [5] * 32


def bits(flags: Tensor) -> int:
    return sum(1 << i for i, flag in enumerate(flags.tolist()) if flag)


@pytest.mark.parametrize("high", [100, 60])
def test_votes(high):
    x = random_numbers(64, high=high)
    x[5] = 3 if high == 100 else 4
    x[x == 3] += 0 if high == 100 else 1
    x[40] = -1 if high == 60 else 1
    votes = simulator.run_schedules("selftest.vote", {"x": x})["y"].tolist()
    for thread, row in enumerate(votes):
        warp = x[thread // 32 * 32 :][:32]
        group = thread % 32 // 8
        remainder = torch.fmod(warp, 3)
        ballot = bits(warp % 2 == 1)
        expected = [
            ballot,
            bool((warp > 90).any()),
            bool((warp >= 0).all()),
            bits(remainder == remainder[thread % 32]),
            (group + 1) * (ballot & 0xFF << 8 * group),
            int((x % 2 == 1).sum()),
            bool((x == 3).any()),
            bool((x >= 0).all()),
        ]
        assert [vote % 2**32 for vote in row] == [int(vote) % 2**32 for vote in expected]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_active_mask(schedule):
    x = random_numbers(96)
    assert simulator.run("selftest.count_odd", {"x": x}, schedule=schedule)["count"] == (x % 2 == 1).sum()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("dtype", "unsigned"), [*((dtype, False) for dtype in NUMBERS), (torch.int32, True)])
def test_atomics(dtype, unsigned, schedule):
    low = 0 if unsigned or dtype == torch.int64 else -50
    x = random_numbers(3, 64, dtype=dtype, low=low)
    arguments = {"x": x, "unsigned": unsigned}
    y = simulator.run("selftest.atomics", arguments, schedule=schedule)["y"].tolist()
    values = x.flatten().tolist()
    assert y[0] == sum(values)
    if dtype.is_floating_point:
        return
    everything = 0
    for value in values:
        everything ^= value
    all_and, all_or = -1, 0
    for value in values:
        all_and, all_or = all_and & value, all_or | value
    assert y == [sum(values), max(0, *values), min(values), all_and, all_or, everything, 1, 1, sum(values)]


def test_atomics_do_not_race():
    x = random_numbers(3, 64)
    simulator.run("selftest.atomics", {"x": x, "unsigned": False}, check="races")


GRIDS = [((3, 2, 4), (5, 3, 2)), ((1, 1, 1), (64, 1, 16)), ((7, 1, 1), (1, 1, 1))]


@pytest.mark.parametrize(("grid", "block"), GRIDS)
def test_indices(grid, block):
    y = simulator.run_schedules("selftest.indices", {"grid": grid, "block": block})["y"]
    x, row, plane = (torch.arange(g * b) for g, b in zip(grid, block, strict=True))
    assert torch.equal(y.long(), x + 100 * row[:, None] + 10000 * plane[:, None, None])


def test_shared_arrays_belong_to_a_block():
    x = random_numbers(3, 32, 4, dtype=torch.float32)
    result = simulator.run_schedules("selftest.shared_arrays", {"x": x}, races=False)
    y = x.flip(1)
    expected = torch.stack([y[..., 0], y[..., 1], y[..., 2], y[..., 3]], dim=-1)
    assert torch.equal(result["y"], expected)
    assert result["seen"].tolist() == [[-1, -1]] * 3  # garbage in every block


def test_functions():
    y = simulator.run("selftest.functions", {"x": torch.tensor([0.25, 0.5, math.nan])})["y"]
    expected = [
        8 + 64 + 31 + 63 + 0 + 4 + 41,
        1 + 3,
        0.25 + 4 + 2 + 7,
        1.5 + 2,
        0.5 + 0.25,
        math.e + math.log(2) + math.sin(0.5) + math.cos(0.5) + 8 + 0.125,
        2 - 10 + 100 - 1000,
        0 + 1,
        0.25 + 0.5 + 1,
    ]
    torch.testing.assert_close(y, torch.tensor(expected))


# --------------------------------------------------------------------------------------------- the archive

LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t(),
    "sliced": lambda x: x[1:, ::2],
    "expanded": lambda x: x[:, :1].expand(4, 6),
    "empty": lambda x: x[:, :0],
    "scalar": lambda x: x[1, 2],
}


SMALL = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", [*SMALL, *NUMBERS])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_archive_keeps_tensors(layout, dtype):
    x = LAYOUTS[layout](random_numbers(4, 6, dtype=dtype))
    result = simulator.run("selftest.archive", {"x": x, "integer": -(2**40), "real": 0.1, "flag": True})
    assert result["y"].dtype == dtype
    assert torch.equal(result["y"], x)
    assert result["integer"] == -(2**40) + 1
    assert result["real"] == 0.1 + -(2**40)
    if x.numel():
        assert result["offset"] == x.data_ptr() % 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"integer": None}, "argument integer is missing"),
        ({"integer": 1.5}, "integer is float64, used as int64"),
        ({"flag": 1}, "flag is int64, used as bool"),
        ({"real": torch.ones(1)}, "argument real is a tensor"),
    ],
)
def test_archive_refuses_wrong_arguments(changes, message):
    arguments = {"x": torch.ones(2), "integer": 1, "real": 0.1, "flag": True, **changes}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    with pytest.raises(SimulatorError, match=message):
        simulator.run("selftest.archive", arguments)


def test_unknown_type_kernel_and_schedule():
    with pytest.raises(SimulatorError, match="isn't compiled for int8"):
        simulator.run("selftest.shuffle", {"x": torch.ones(32, dtype=torch.int8)})
    with pytest.raises(SimulatorError, match="no simulate_.*unheard_of"):
        simulator.run("unheard_of", {})
    with pytest.raises(SimulatorError, match="usage:"):
        simulator.run("selftest.functions", {"x": torch.ones(3)}, schedule="random:x")


# ------------------------------------------------------------------------------------------------- faults

# Kernel, the number that makes the fault, one that doesn't (if there is one), and what the driver says.
PLACE = r"in block \(\d,\d,\d\) thread \(\d+,0,0\)"
MEMORY_FAULTS = [
    ("read_global", 1, 0, r"heap-buffer-overflow[\s\S]*READ of size 4"),
    ("read_global", -1, 0, r"heap-buffer-overflow[\s\S]*READ of size 4"),
    ("write_global", 1, 0, r"heap-buffer-overflow[\s\S]*WRITE of size 4"),
    ("add_global", 64, 0, r"heap-buffer-overflow[\s\S]*atomicAdd"),
    ("write_dynamic_shared", 1, 0, r"heap-buffer-overflow[\s\S]*WRITE of size 4"),
    ("write_dynamic_shared", -1, 0, r"heap-buffer-overflow[\s\S]*WRITE of size 4"),
    ("write_shared", 1, 0, r"heap-buffer-overflow[\s\S]*WRITE of size 4"),
    ("index_shared", 1, 0, r"runtime error: index 64 out of bounds for type 'float ?\[64\]'"),
    ("write_local", 8, 7, r"stack-buffer-overflow[\s\S]*WRITE of size 4"),
    ("keep_shared", 0, None, r"heap-use-after-free"),
    ("misaligned", 1, 4, r"runtime error: .*misaligned address .* requires 16 byte alignment"),
    ("overflow", 2, 1, r"runtime error: signed integer overflow"),
]
MEETING_FAULTS = [
    ("exit_before_barrier", 40, 64, r"divergent barrier: .*exit.*__syncthreads at .*selftest_faults.cpp:\d+"),
    ("two_barriers", 40, 0, r"divergent barrier: .*waits in __syncthreads.*waits in __syncthreads"),
    ("two_kinds_of_barriers", 40, 0, r"divergent barrier: .*__syncthreads_count"),
    ("shuffle_with_exited", 7, 32, r"mask 0xffffffff, which names (lane 7|it)"),
    ("shuffle_with_missing", 0, None, r"names lane 16, but the block has 16 threads"),
    ("shuffle_without_self", 6, -1, r"__shfl_sync at .*the mask 0x00000006 lacks the calling lane"),
    ("shuffle_width", 3, 4, r"shuffle of width 3"),
    ("different_masks", 4, 32, r"lacks the calling lane"),
    ("different_masks", 16, 32, r"__ballot.* with mask 0xffffffff, which names"),
    ("trap", 3, -1, r"__trap\(\)[\s\S]*in block \(1,0,0\) thread \(3,0,0\)"),
]
RACES = [
    ("race_of_blocks", 5, r"data race in y at byte 20: write by block \(\d,0,0\).*, write by block"),
    ("race_with_atomic", 0, r"data race in y at byte 0: .*atomic (write|update)"),
    ("race_with_read", 0, r"data race in value at byte 0: "),
    ("read_uninitialised_shared", 5, r"read of uninitialised memory in values at byte 20"),
    ("read_uninitialised_output", 0, r"read of uninitialised memory in y at byte \d+"),
]


def run_fault(name: str, number: int, schedule: str, check: simulator.Check = "memory", **more: bool):
    arguments = {"x": torch.arange(64.0), "number": number, **more}
    return simulator.run(f"fault.{name}", arguments, schedule=schedule, check=check)["y"]


@pytest.mark.parametrize(("name", "number", "message"), [(f[0], f[1], f[3]) for f in MEMORY_FAULTS])
def test_memory_fault_is_caught(name, number, message):
    with pytest.raises(SimulatorError, match=message) as caught:
        run_fault(name, number, "random:1")
    assert re.search(PLACE, str(caught.value))


@pytest.mark.parametrize("schedule", SCHEDULES[:3])
@pytest.mark.parametrize(("name", "number", "message"), [(f[0], f[1], f[3]) for f in MEETING_FAULTS])
def test_failed_meeting_is_caught(name, number, message, schedule):
    with pytest.raises(SimulatorError, match=message) as caught:
        run_fault(name, number, schedule)
    assert re.search(PLACE, str(caught.value))


@pytest.mark.parametrize(("x", "number"), [(torch.arange(66.0)[2:], -1), (torch.empty(0), 0)])
def test_guard_before_misaligned_and_in_empty_tensors(x, number):
    with pytest.raises(SimulatorError, match=r"use-after-poison|heap-buffer-overflow"):
        simulator.run("fault.read_global", {"x": x, "number": number})


HARMLESS = sorted({(fault[0], fault[2]) for fault in MEMORY_FAULTS + MEETING_FAULTS if fault[2] is not None})


@pytest.mark.parametrize(("name", "number"), HARMLESS)
def test_kernel_without_its_fault_runs(name, number):
    run_fault(name, number, "random:1")


@pytest.mark.parametrize("schedule", SCHEDULES[:3])
def test_deadlock_is_reported(schedule):
    """Nobody is at fault alone, so that only a block can be named."""
    message = r"deadlock[\s\S]*__syncthreads at .*\n.*__shfl_sync at .*mask 0xffffffff\n  in block \(0,0,0\)"
    with pytest.raises(SimulatorError, match=message):
        run_fault("barrier_against_shuffle", 20, schedule)
    run_fault("barrier_against_shuffle", 32, schedule)
    run_fault("barrier_against_shuffle", 0, schedule)


@pytest.mark.parametrize("threads", [0, 1025])
def test_invalid_launch(threads):
    with pytest.raises(SimulatorError, match=rf"invalid block \({threads},1,1\)"):
        simulator.run("fault.launch", {"number": threads})


@pytest.mark.parametrize("schedule", SCHEDULES[:3])
@pytest.mark.parametrize(("name", "number", "message"), RACES)
def test_race_is_caught(name, number, message, schedule):
    with pytest.raises(SimulatorError, match=message) as caught:
        run_fault(name, number, schedule, "races", **({"zeros": True} if "atomic" in name else {}))
    assert re.search(PLACE, str(caught.value))
    source = r"access at:\n(.*cuda_on_host.h.*\n)?.*simulate_selftest_faults.cpp:\d+"
    assert re.search(source, str(caught.value))


@pytest.mark.parametrize("schedule", SCHEDULES[:3])
def test_no_false_race(schedule):
    run_fault("race_with_read", 1, schedule, "races")  # a barrier between
    run_fault("read_uninitialised_shared", -1, schedule, "races")
    assert (run_fault("read_uninitialised_output", 0, schedule, "races", zeros=True) == 1).all()


@pytest.mark.parametrize("schedule", SCHEDULES[:3])
def test_uninitialised_shared_memory_shows_as_nan(schedule):
    y = run_fault("read_uninitialised_shared", 5, schedule)
    assert y.isnan().nonzero().tolist() == [[58]]


def test_undefined_shuffle_shows_as_nan():
    y = run_fault("shuffle_from_outside", 3, "forward")
    assert y[:16].tolist() == [3] * 16
    assert y[16:].isnan().all()


def test_trust_in_active_mask_shows():
    """Reconvergence isn't promised: the random schedule splits the lanes that meet."""
    assert (run_fault("trust_active_mask", 20, "forward")[:20] == 2**20 - 1).all()
    assert (run_fault("trust_active_mask", 20, "random:1")[:20] != 2**20 - 1).any()


# ------------------------------------------------------------------------------- barriers left out, races

NONE, BLOCK, WARP, SHUFFLE = range(4)


def test_missing_barrier_changes_the_result():
    x = random_numbers(1, 256)
    arguments = {"x": x, "barrier": False}
    with pytest.raises(SimulatorError, match="sums differs between forward and"):
        simulator.run_schedules("selftest.block_sum", arguments, races=False)
    with pytest.raises(SimulatorError, match=r"data race in partial at byte \d+"):
        simulator.run("selftest.block_sum", arguments, check="races")


@pytest.mark.parametrize(
    ("partner_bit", "barrier", "is_race"),
    [
        (32, NONE, True),
        (32, BLOCK, False),
        (32, WARP, True),
        (1, NONE, True),
        (1, BLOCK, False),
        (1, WARP, False),
        (1, SHUFFLE, True),  # as in CUDA: shuffles don't order memory
        (0, NONE, False),
    ],
)
def test_exchange_through_shared_memory(partner_bit, barrier, is_race):
    x = torch.arange(64.0)
    arguments = {"x": x, "partner_bit": partner_bit, "barrier": barrier}
    if is_race:
        # "uninitialised" where the reader came first.
        with pytest.raises(SimulatorError, match="data race in dynamic|uninitialised memory in dynamic"):
            simulator.run("selftest.exchange", arguments, check="races")
    else:
        y = simulator.run_schedules("selftest.exchange", arguments)["y"]
        assert torch.equal(y, x[torch.arange(64) ^ partner_bit])


def test_exchange_without_barrier_is_wrong_in_two_schedules():
    x = torch.arange(64.0)
    arguments = {"x": x, "partner_bit": 32, "barrier": NONE}
    right = x[torch.arange(64) ^ 32]
    results = [simulator.run("selftest.exchange", arguments, schedule=s)["y"] for s in SCHEDULES]
    assert not any(torch.equal(y, right) for y in results)
    assert not torch.equal(results[0].nan_to_num(-1), results[1].nan_to_num(-1))
