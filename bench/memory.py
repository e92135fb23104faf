"""Memory that a call needs at its peak, beyond what was there before and what it returns.

It is measured in a process of its own: on the CPU the scratch of kernels does not come from torch's
allocator, so that only the operating system sees it, and memory that was freed before would hide it. The
system counts pages in batches, which makes it exact to half a megabyte.

python bench/memory.py MODULE FUNCTION DEVICE [ARGUMENT]...
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

_HERE = Path(__file__).resolve().parent


def extra_bytes(module: str, function: str, device: str, *arguments: str) -> int:
    """What a call needs. module.function(device, *arguments) returns two calls without arguments that return
    a tensor: one of the same kind with small inputs, which loads what is loaded at the first call, and the
    call that counts."""
    # glibc gives blocks from this size on back to the system when they are freed
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, str(_HERE / "memory.py"), module, function, device, *arguments]
    run = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return int(run.stdout)


def _measure(module: str, function: str, device: str, *arguments: str) -> int:
    torch.set_num_threads(1)
    small, call = getattr(importlib.import_module(module), function)(device, *arguments)
    small()
    _forget_peak(device)
    before = _peak(device)
    result = call()
    return _peak(device) - before - result.numel() * result.element_size()


def _forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: str) -> int:
    """Bytes. (getrusage's ru_maxrss has no reset, and a process inherits it from the one that started it.)"""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


if __name__ == "__main__":
    print(_measure(*sys.argv[1:]))
