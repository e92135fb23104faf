"""What the entries of several engines share: arguments that are wrong, and what forward saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from effops.testing._info import ErrorInput

Wrong = Callable[..., ErrorInput]


def wrong_maker(op: str, good: Mapping[str, Any], keywords: Sequence[str] = ()) -> Wrong:
    """Makes error inputs from arguments that are right; ``keywords`` are those given by name."""

    def wrong(name: str, error: Any, blamed: str, changes: dict[str, Any], **settings: Any) -> ErrorInput:
        arguments = {**good, **changes}
        by_name = {key: arguments.pop(key) for key in keywords if key in arguments}
        match = rf"^{op}: expected .*\b{blamed}\b"
        return ErrorInput(name, tuple(arguments.values()), error, match, by_name, **settings)

    return wrong


def wrong_dtypes(
    argument: str, good: Tensor, dtypes: Sequence[torch.dtype], wrong: Wrong
) -> Iterator[ErrorInput]:
    """The tensor in dtypes that are refused."""
    for dtype in dtypes:
        name = f"{argument}_{str(dtype).removeprefix('torch.')}"
        yield wrong(name, TypeError, argument, {argument: good.to(dtype)})


def wrong_kinds(argument: str, wrong: Wrong, optional: bool = False) -> Iterator[ErrorInput]:
    """What is no tensor."""
    values: dict[str, Any] = {
        "none": None,
        "a_string": "wrong",
        "a_list": [1.0, 2.0],
        "a_nested_list": [[1.0], [2.0]],
        "a_dict": {},
        "a_dtype": torch.float32,
    }
    if optional:
        del values["none"]
    for name, value in values.items():
        yield wrong(f"{argument}_{name}", TypeError, argument, {argument: value}, native=False)


def wrong_counts(argument: str, most: int, wrong: Wrong, **settings: Any) -> Iterator[ErrorInput]:
    """Integers beyond [0, most], and what is no integer."""
    for number in (-1, most + 1, most + 2**31, 2**63 - 1, -(2**63)):
        yield wrong(f"{argument}_{number}", ValueError, argument, {argument: number}, **settings)
    values: dict[str, Any] = {"none": None, "a_string": "3", "a_fraction": 1.5, "a_list": [1]}
    for name, value in values.items():
        yield wrong(f"{argument}_{name}", TypeError, argument, {argument: value}, native=False)


def wrong_options(argument: str, wrong: Wrong) -> Iterator[ErrorInput]:
    """What is no name of an option."""
    value: Any
    for value in ("Zeros", "other", "", None, 0.5, []):
        yield wrong(f"{argument}_{value!r}", ValueError, argument, {argument: value}, native=False)


def saved_outputs(op: Any, inputs: Sequence[Any], stand_ins: Sequence[Any]) -> Sequence[Any]:
    """What forward saves for backward; the stand-ins if it refuses the inputs."""
    with torch.no_grad():
        try:
            outputs: Any = op(*inputs)
        except (RuntimeError, TypeError, ValueError):
            return stand_ins
    return outputs if isinstance(outputs, tuple) else (outputs,)
