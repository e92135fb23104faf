"""Runs CUDA kernels in the host simulator of ``python_tests/native`` (see simulate.h there).

    y = simulator.run_schedules("scale", {"x": x, "factor": 2.0})["y"]

runs the kernel registered by ``EFFOPS_SIMULATE("scale", ...)`` under ASan, UBSan and the race detector, in
several orders of the threads. Drivers are built when first needed, into ``.build/simulator``, which is kept.
"""

from __future__ import annotations

import fcntl
import functools
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Argument = Tensor | bool | int | float | Sequence[int]
Results = dict[str, Tensor]
Check = Literal["memory", "races"]

SCHEDULES = ("forward", "reverse", "random:1")

_NATIVE = Path(__file__).resolve().parent / "native"
_BUILD = _NATIVE.parents[1] / ".build" / "simulator"
_MAGIC = b"EFFOPSTA"
# In the order of simulator::DType in tensor_archive.h.
_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)


class SimulatorError(RuntimeError):
    """The driver has ended in an error; the text is what it, or a sanitizer, has written."""


# ------------------------------------------------------------------------------------------------ archive


def _as_tensor(value: Argument) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, bool):
        return torch.tensor(value)
    if isinstance(value, int):
        return torch.tensor(value, dtype=torch.int64)
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float64)
    return torch.tensor(list(value), dtype=torch.int64)


def _pack_tensor(name: str, tensor: Tensor) -> bytes:
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name}: the simulator has no {tensor.dtype}")
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    span = last + 1 if tensor.numel() else 0
    flat = tensor.as_strided((span,), (1,)) if span else tensor.new_empty(0)
    data = flat.view(torch.uint8).numpy().tobytes()
    encoded = name.encode()
    # The kernel sees the alignment that the tensor has here, as far as vector accesses care.
    offset = tensor.data_ptr() % 16 if span else 0
    head = struct.pack("<BBI", _DTYPES.index(tensor.dtype), offset, tensor.dim())
    sizes = struct.pack(f"<{2 * tensor.dim()}q", *tensor.shape, *tensor.stride())
    return struct.pack("<I", len(encoded)) + encoded + head + sizes + struct.pack("<Q", len(data)) + data


def write_archive(path: Path, arguments: Mapping[str, Argument]) -> None:
    """Writes the file that a driver reads; the format is described in tensor_archive.h."""
    tensors = [_pack_tensor(name, _as_tensor(value)) for name, value in arguments.items()]
    path.write_bytes(_MAGIC + struct.pack("<I", len(tensors)) + b"".join(tensors))


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def take(self, count: int) -> bytes:
        self.position += count
        if self.position > len(self.data):
            raise SimulatorError("the driver's answer ends too early")
        return self.data[self.position - count : self.position]

    def unpack(self, layout: str) -> tuple[int, ...]:
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))


def read_archive(path: Path) -> Results:
    """The tensors in a file that a driver has written."""
    reader = _Reader(path.read_bytes())
    if reader.take(len(_MAGIC)) != _MAGIC:
        raise SimulatorError("the driver's answer is no tensor archive")
    results: Results = {}
    for _ in range(reader.unpack("I")[0]):
        name = reader.take(reader.unpack("I")[0]).decode()
        code, _offset, dimensions = reader.unpack("BBI")
        sizes = reader.unpack(f"{dimensions}q")
        reader.unpack(f"{dimensions}q")  # results are contiguous
        data = bytearray(reader.take(reader.unpack("Q")[0]))
        flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        results[name] = flat.view(_DTYPES[code]).view(sizes)
    return results


# -------------------------------------------------------------------------------------------------- build


def _tool(name: str) -> str:
    """A program on the path, or of the Python environment (``pip install cmake ninja``)."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise SimulatorError(f"building the simulator needs {name}")
    return found


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SimulatorError(f"{' '.join(command)} failed:\n{done.stdout[-6000:]}{done.stderr[-6000:]}")


@functools.cache
def build(*programs: str) -> Path:
    """Builds the drivers, incrementally, and returns their folder."""
    _BUILD.mkdir(parents=True, exist_ok=True)
    with (_BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several pytest processes may come here at one time
        if not (_BUILD / "build.ninja").exists():
            ninja = f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}"
            _call(_tool("cmake"), "-G", "Ninja", "-S", str(_NATIVE), "-B", str(_BUILD), ninja)
        _call(_tool("ninja"), "-C", str(_BUILD), *programs)
    return _BUILD


@functools.cache
def _source_of(name: str) -> Path:
    registration = re.compile(r'EFFOPS_SIMULATE\(\s*"' + re.escape(name) + '"')
    for source in sorted(_NATIVE.glob("simulate_*.cpp")):
        if registration.search(source.read_text()):
            return source
    raise SimulatorError(f'no simulate_*.cpp says EFFOPS_SIMULATE("{name}", ...)')


# ---------------------------------------------------------------------------------------------------- run


def _environment() -> dict[str, str]:
    """Without what a sanitizer run of Python itself has set: the drivers bring their own."""
    ours = {"LD_PRELOAD", "ASAN_OPTIONS", "UBSAN_OPTIONS", "LSAN_OPTIONS"}
    return {key: value for key, value in os.environ.items() if key not in ours}


def run(
    name: str,
    arguments: Mapping[str, Argument],
    *,
    schedule: str = "forward",
    check: Check = "memory",
    timeout: float = 120.0,
) -> Results:
    """Runs one kernel once.

    Args:
        name: what ``EFFOPS_SIMULATE`` calls it.
        arguments: for ``Call::tensor``, ``integer``, ``real``, ``flag`` and ``integers``. Tensors keep their
            strides and their alignment.
        schedule: who runs first, ``forward``, ``reverse`` or ``random:SEED``.
        check: ``memory`` for ASan and UBSan, ``races`` for races and reads of uninitialised memory.
        timeout: in seconds.

    Returns:
        What ``Call::output`` has made, by name.

    Raises:
        SimulatorError: with the message of the simulator or sanitizer.
    """
    program = _source_of(name).stem + ("_races" if check == "races" else "")
    binary = build(program) / program
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in.bin"), Path(folder, "out.bin")
        write_archive(source, arguments)
        command = [str(binary), name, "--schedule", schedule, str(source), str(target)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=timeout, env=_environment()
            )
        except subprocess.TimeoutExpired as error:
            raise SimulatorError(f"{name} under {schedule} has not ended after {timeout} s") from error
        if done.returncode != 0:
            raise SimulatorError(f"{name} under {schedule} ({check}):\n{done.stdout}{done.stderr}")
        return read_archive(target)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def run_all(
    name: str, arguments: Mapping[str, Argument], *, races: bool = True, timeout: float = 120.0
) -> list[Results]:
    """Runs a kernel under each of ``SCHEDULES`` and, unless told not to, once under the race detector."""
    results = [run(name, arguments, schedule=schedule, timeout=timeout) for schedule in SCHEDULES]
    if races:
        results.append(run(name, arguments, schedule=SCHEDULES[-1], check="races", timeout=timeout))
    return results


def run_schedules(
    name: str, arguments: Mapping[str, Argument], *, races: bool = True, timeout: float = 120.0
) -> Results:
    """:func:`run_all` for kernels whose result doesn't depend on the order of threads, to the last bit.

    Kernels that add floats atomically go through :func:`run_all`, and each result to the comparison.
    """
    first, *others = run_all(name, arguments, races=races, timeout=timeout)
    schedules = (*SCHEDULES[1:], f"{SCHEDULES[-1]} with race detection")
    for schedule, other in zip(schedules, others, strict=False):
        if first.keys() != other.keys():
            raise SimulatorError(f"{name}: other outputs under {schedule} than under {SCHEDULES[0]}")
        for key, tensor in first.items():
            if not _same_bits(tensor, other[key]):
                raise SimulatorError(f"{name}: {key} differs between {SCHEDULES[0]} and {schedule}")
    return first
