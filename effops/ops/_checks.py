"""Checks that the ops share: the same patterns and words as csrc/common/check.h.

A public function calls its op first and looks for the reason only when the op fails, so that good input
pays nothing. Fake (meta) kernels call the checks directly.
"""

from collections.abc import Callable, Mapping
from typing import NoReturn

import torch
from torch import Tensor

from effops import _load

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class ShapeChecker:
    """Matches tensors against patterns of one letter per dimension, such as ``"BSMD"``.

    The first tensor that shows a letter fixes its size; later ones must agree. A digit stands for itself.
    """

    def __init__(self, op: str) -> None:
        self.op = op
        self.sizes: dict[str, int] = {}

    def match(self, argument: str, tensor: Tensor, pattern: str) -> None:
        """Raises ValueError unless the tensor has the pattern's rank and sizes."""
        self.tensor(argument, tensor)
        if tensor.dim() != len(pattern):
            self._mismatch(argument, tensor, pattern)
        for letter, size in zip(pattern, tensor.shape, strict=True):
            expected = int(letter) if letter.isdigit() else self.sizes.setdefault(letter, size)
            if size != expected:
                self._mismatch(argument, tensor, pattern)

    def tensor(self, argument: str, value: object) -> None:
        """Raises TypeError unless the argument is a tensor."""
        if not isinstance(value, Tensor):
            raise TypeError(f"{self.op}: expected {argument} to be a Tensor, got {type(value).__name__}")

    def dtype(self, argument: str, tensor: Tensor, *allowed: torch.dtype) -> None:
        """Raises TypeError unless the tensor has one of the dtypes."""
        if tensor.dtype not in allowed:
            names = " or ".join(dict.fromkeys(_name(dtype) for dtype in allowed))
            raise TypeError(f"{self.op}: expected {argument} of dtype {names}, got {_name(tensor.dtype)}")

    def device(self, argument: str, tensor: Tensor, other_argument: str, other: Tensor) -> None:
        """Raises ValueError unless both tensors are on one device."""
        if tensor.device != other.device:
            raise ValueError(
                f"{self.op}: expected {argument} on the device of {other_argument} ({other.device}), "
                f"got {tensor.device}"
            )

    def _mismatch(self, argument: str, tensor: Tensor, pattern: str) -> NoReturn:
        expected = ", ".join(
            f"{letter}={self.sizes[letter]}" if letter in self.sizes else letter for letter in pattern
        )
        raise ValueError(f"{self.op}: expected {argument} of shape [{expected}], got {list(tensor.shape)}")


def check_type(op: str, argument: str, value: object, name: str, *types: type) -> None:
    """Raises TypeError unless the value has one of the types."""
    if not isinstance(value, types):
        raise TypeError(f"{op}: expected {argument} of type {name}, got {type(value).__name__}")


def check_integer(op: str, argument: str, value: object) -> None:
    """Raises TypeError unless the value is an integer."""
    check_type(op, argument, value, "int", int, torch.SymInt)


def number_of(op: str, argument: str, numbers: Mapping[str, int], value: object) -> int:
    """The schema's number of an option; raises ValueError if there is no such option."""
    number = numbers.get(value) if isinstance(value, str) else None
    if number is None:
        *others, last = (f'"{name}"' for name in numbers)
        raise ValueError(f"{op}: expected {argument} {', '.join(others)} or {last}, got {value!r}")
    return number


def check_backend(op: str, tensor: Tensor) -> None:
    """Raises RuntimeError, with the cure, for a device that this installation cannot serve."""
    if tensor.device.type == "cuda" and _load.cuda_missing_reason is not None:
        raise RuntimeError(f"{op}: no CUDA kernels: {_load.cuda_missing_reason}")
    if tensor.device.type not in ("cpu", "cuda", "meta"):
        raise RuntimeError(f"{op}: expected tensors on cpu or cuda, got {tensor.device}")


def explain(op: str, error: Exception, check: Callable[[], object]) -> NoReturn:
    """Raises the typed error behind a failed op call.

    ``check`` repeats the metadata checks and raises ValueError or TypeError. What it does not find, the
    kernel found in the tensors' values: those messages begin with the op's name.
    """
    check()
    message = str(error).split("\n")[0]
    if message.startswith(f"{op}:"):
        raise ValueError(message) from None
    raise error
