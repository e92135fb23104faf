"""Bit-identical results for any number of threads and in every run."""

from pathlib import Path

import pytest
import torch
from helpers import assert_bit_equal, results

from effops.testing._check import forward

THREADS = (1, 2, 3, 7)


def large_samples(info, device, dtype):
    for number, sizes in enumerate(info.large):
        yield number, info.build_sample(sizes, device, dtype)


@pytest.mark.devices("cpu")
@pytest.mark.dtypes(torch.float32, torch.float64, torch.bfloat16)
def test_any_number_of_threads(info, device, dtype, threads):
    """Forward and every gradient, on samples that the kernels split."""
    for number, sample in large_samples(info, device, dtype):
        expected = None
        for count in THREADS:
            threads(count)
            assert torch.get_num_threads() == count
            found = results(info, sample)
            expected = expected or found
            for i, (actual, wanted) in enumerate(zip(found, expected, strict=True)):
                assert_bit_equal(actual, wanted, f"sample {number}, result {i}, {count} threads")


@pytest.mark.devices("cpu")
@pytest.mark.dtypes(torch.float32)
def test_any_number_of_threads_on_all_samples(info, sample, threads):
    expected = results(info, sample)
    for count in THREADS[1:]:
        threads(count)
        for actual, wanted in zip(results(info, sample), expected, strict=True):
            assert_bit_equal(actual, wanted, f"{count} threads")


def thread_times():
    """Processor time in nanoseconds of each thread of this process."""
    files = {task.name: task / "schedstat" for task in Path("/proc/self/task").iterdir()}
    if not all(file.exists() for file in files.values()):
        pytest.skip("this kernel has no scheduler statistics")
    return {name: int(file.read_text().split()[0]) for name, file in files.items()}


@pytest.mark.devices("cpu")
def test_threads_share_the_work(info, device, threads):
    """Guards the tests above: the large samples run on more than one thread."""
    threads(3)
    for _, sample in large_samples(info, device, None):
        before = thread_times()
        for _ in range(3):
            forward(info, sample)
        busy = [name for name, used in thread_times().items() if used > before.get(name, 0)]
        assert len(busy) > 1, f"only the threads {busy} worked"


@pytest.mark.dtypes(torch.float32, torch.float16)
def test_repeated_runs(info, device, dtype, threads):
    """On CUDA under torch.use_deterministic_algorithms, on the CPU always."""
    threads(2)
    torch.use_deterministic_algorithms(device == "cuda")
    try:
        for _, sample in large_samples(info, device, dtype):
            expected = results(info, sample)
            for _ in range(3):
                for actual, wanted in zip(results(info, sample), expected, strict=True):
                    assert_bit_equal(actual, wanted)
    finally:
        torch.use_deterministic_algorithms(False)
