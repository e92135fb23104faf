"""What this machine can do at most, measured in the same run as the benchmarks.

Matrix products in float32, reading and copying of memory, counting ones (numpy.bitwise_count: one 64-bit
word at a time, where registers of words can do more) and reading random rows of a table: the bound of the
sampling ops. Rows are read by `embedding_bag`, which sums them in registers (on x86 code that FBGEMM
generates for the processor), from tables of several sizes, because the size decides which cache they are in.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy
import torch
import torch.nn.functional as F

from effops.demo._timing import interleaved_min

_CPU_TABLES = (1 << 19, 1 << 21, 1 << 22, 1 << 23, 1 << 25)
_CUDA_TABLES = (1 << 22, 1 << 24, 1 << 25, 1 << 30)


@dataclass(frozen=True)
class Work:
    """What an op must do at the least.

    Attributes:
        flops: floating-point operations.
        gathered: bytes of randomly addressed rows, read or written.
        row: bytes of such a row.
        table: bytes that the rows lie in, at a time.
        streamed: bytes of inputs and outputs, each read or written once.
        counted: 64-bit words whose ones are counted.
    """

    flops: float = 0
    gathered: float = 0
    row: int = 0
    table: float = 0
    streamed: float = 0
    counted: float = 0


@dataclass(frozen=True)
class Roofline:
    """Rates of a device with the current number of threads, per second.

    Attributes:
        sgemm: float32 operations of a matrix product; on the CPU of a 3 x 3 convolution if that is quicker
            (MKL does without AVX-512 on AMD processors, oneDNN does not).
        read: bytes of a sum over a large tensor.
        copy: bytes read and written by a copy of a large tensor.
        count: 64-bit words whose ones are counted, by one thread times the number of threads; infinite on
            CUDA, where torch cannot count.
    """

    device: str
    sgemm: float
    read: float
    copy: float
    count: float

    def gather(self, row: int, table: float) -> float:
        """Bytes per second of random rows of `row` bytes from a table of `table` bytes."""
        tables = _CPU_TABLES if self.device == "cpu" else _CUDA_TABLES
        fitting = [size for size in tables if size >= table] or [tables[-1]]
        return _gather_rate(self.device, torch.get_num_threads(), row, fitting[0])

    def seconds(self, work: Work) -> float:
        """The time that the slowest part of the work takes at the measured rates."""
        gathered = work.gathered / self.gather(work.row, work.table) if work.gathered else 0.0
        return max(work.flops / self.sgemm, gathered, work.streamed / self.read, work.counted / self.count)

    def as_dict(self) -> dict[str, float]:
        rates = {
            name: rate for name, rate in asdict(self).items() if name != "device" and math.isfinite(rate)
        }
        return {f"{name}_giga_per_second": round(rate / 1e9, 1) for name, rate in rates.items()}


@functools.cache
def measure(device: str, threads: int) -> Roofline:
    """Rates with `threads` threads, which must be torch's current number (part of the cache's key)."""
    assert threads == torch.get_num_threads()
    side = 1024 if device == "cpu" else 8192
    a, b = torch.randn(side, side, device=device), torch.randn(side, side, device=device)
    source = torch.ones(1 << (26 if device == "cpu" else 29), device=device)
    target = torch.empty_like(source)
    size = source.numel() * source.element_size()
    return Roofline(
        device,
        sgemm=max(2 * side**3 / _best(device, lambda: a @ b), _convolution_rate(device)),
        read=size / _best(device, source.sum),
        copy=2 * size / _best(device, lambda: target.copy_(source)),
        count=_count_rate(device, threads),
    )


def _convolution_rate(device: str) -> float:
    if device == "cuda":
        return 0.0  # cuDNN may round to TF32
    channels, side = 256, 64
    x, weight = torch.randn(1, channels, side, side), torch.randn(channels, channels, 3, 3)
    return 2 * 9 * (channels * side) ** 2 / _best(device, lambda: F.conv2d(x, weight, padding=1))


def _count_rate(device: str, threads: int) -> float:
    if device == "cuda":
        return math.inf
    words = numpy.arange(1 << 11, dtype=numpy.uint64)  # 16 KiB: in the first-level cache
    counts = numpy.empty(words.shape, dtype=numpy.uint8)
    return threads * len(words) / _best(device, lambda: numpy.bitwise_count(words, out=counts))


@functools.cache
def _gather_rate(device: str, threads: int, row: int, table: int) -> float:
    columns, count, bag = max(row // 4, 1), 1 << (18 if device == "cpu" else 23), 64
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.ones(max(table // (4 * columns), 1), columns, device=device)
    ids = torch.randint(len(rows), (count,), generator=generator, device=device)
    starts = torch.arange(0, count, bag, device=device)
    return 4 * columns * count / _best(device, lambda: F.embedding_bag(ids, rows, starts, mode="sum"))


def _best(device: str, function: Callable[[], object]) -> float:
    return interleaved_min({"": function}, seconds=0.3, min_rounds=5, device=device)[""]


if __name__ == "__main__":
    chosen = "cuda" if torch.cuda.is_available() else "cpu"
    found = measure(chosen, torch.get_num_threads())
    for key, value in found.as_dict().items():
        print(f"{key:>28} {value:8.1f}")
    for size in _CPU_TABLES if chosen == "cpu" else _CUDA_TABLES:
        print(f"rows of 128 bytes in {size / 2**20:6.1f} MiB {found.gather(128, size) / 1e9:8.1f} GB/s")
