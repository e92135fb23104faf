"""What the entries of the binary engine share: packed rows, and wrong arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from effops import reference
from effops.testing._info import ErrorInput, Maker

WORD_DTYPES = (torch.int64, torch.uint8)
#: Bits per row, around words, bytes and registers.
WIDTHS = (1, 7, 8, 63, 64, 65, 256, 1000, 4096)

Wrong = Callable[..., ErrorInput]


def word_bits(make: Maker) -> int:
    """Bits in a word of the sample's dtype, int64 or uint8."""
    return 8 * make.dtype.itemsize


def words(make: Maker, bits: Tensor) -> Tensor:
    """Bits [..., M] as words of the sample's dtype; padding bits are 0."""
    packed = reference.pack_bits(bits)
    if make.dtype == torch.int64:
        return packed
    return packed.view(torch.uint8)[..., : (bits.shape[-1] + 7) // 8].contiguous()


def random_words(make: Maker, *rows: int, bits: int) -> Tensor:
    """Rows [..., W] of random bits; padding bits are 0."""
    count = (bits + word_bits(make) - 1) // word_bits(make)
    data = make.integers(*rows, count * make.dtype.itemsize, high=256).to(torch.uint8)
    whole, rest = divmod(bits, 8)
    if rest > 0:
        data[..., whole] &= 2**rest - 1
    data[..., (bits + 7) // 8 :] = 0
    return data.flatten().view(make.dtype).view(*rows, count)


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
