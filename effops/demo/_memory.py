"""Memory that a call needs at its peak."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import torch

_FORGET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def extra_bytes(call: Callable[[], object], device: str = "cpu") -> int | None:
    """Peak of a call beyond what was there before, its result included; None where the system doesn't tell.

    On the CPU that is what the operating system sees, as the scratch of kernels does not come from torch's
    allocator. Pages are counted in batches, which makes it exact to half a megabyte. The call should have run
    before: the first one loads libraries.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        _give_back()
        _FORGET.write_text("5")
        before = _peak()
        call()
        return _peak() - before
    except (OSError, AttributeError, TypeError):  # not Linux with glibc, or not allowed
        return None


def _give_back() -> None:
    """Returns freed memory to the system, so that using it again counts."""
    ctypes.CDLL(None).malloc_trim(0)


def _peak() -> int:
    found = re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text())
    if found is None:
        raise OSError("no VmHWM")
    return 1024 * int(found[1])
