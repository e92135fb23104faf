"""Python threads, worker processes, memory."""

import concurrent.futures
import os
from pathlib import Path

import pytest
import torch
from helpers import assert_bit_equal, results

from effops.testing import OP_DB
from effops.testing._check import forward

THREADS, CALLS = 8, 50


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.dtypes(torch.float32, torch.bfloat16)
def test_calls_from_several_threads(info, device, dtype):
    """Each with inputs of its own, forward and backward."""
    samples = [info.build_sample(info.typical, device, dtype, seed) for seed in range(THREADS)]
    expected = [results(info, sample) for sample in samples]

    def work(number):
        for _ in range(CALLS):
            for actual, wanted in zip(results(info, samples[number]), expected[number], strict=True):
                assert_bit_equal(actual, wanted, f"thread {number}")
        return number

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(work, range(THREADS))) == list(range(THREADS))


def test_threads_share_an_input(info, device):
    """The same large tensors, read by all at once."""
    sample = info.build_sample(info.large[0], device)
    expected = forward(info, sample)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: forward(info, sample), range(8)):
            for actual, wanted in zip(found, expected, strict=True):
                assert_bit_equal(actual, wanted)


@pytest.mark.devices("cpu")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer keeps freed memory")
def test_memory_does_not_grow(info, device):
    """2,000 calls, forward and backward, and 500 that raise."""
    sample = info.build_sample({**info.typical}, device)
    errors = list(info.error_inputs(device))[:50]

    def calls(count):
        for _ in range(count):
            results(info, sample)
        for _ in range(count // 200):
            for error in errors:
                with pytest.raises((ValueError, TypeError, RuntimeError)):
                    info.torch_op(*error.args, **error.kwargs)

    calls(200)  # caches fill
    before = resident_bytes()
    calls(2000)
    assert resident_bytes() - before < 4 * 2**20


class Results(torch.utils.data.Dataset):
    """Computes the op in the worker that reads an item."""

    def __init__(self, number):
        self.number = number

    def __len__(self):
        return 6

    def __getitem__(self, seed):
        info = OP_DB[self.number]
        return torch.cat(
            [t.flatten().double() for t in forward(info, info.build_sample(info.typical, seed=seed))]
        )


@pytest.mark.devices("cpu")
def test_forked_data_loader_workers(info, device, threads):
    """Workers forked after threads have run here."""
    threads(2)
    forward(info, info.build_sample(info.large[0]))
    dataset = Results(OP_DB.index(info))
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for seed, found in enumerate(loader):
        assert_bit_equal(found, dataset[seed])
