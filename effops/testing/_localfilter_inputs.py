"""What the entries of the localfilter engine share: right and wrong inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from effops.testing._info import DEFAULT_TOLERANCES, ErrorInput, Maker, Tolerance
from effops.testing._wrong import Wrong, wrong_dtypes, wrong_kinds

#: Of ops whose backward reads the output, rounded: an error of D, the sum of dO * O, in every softmax.
ROUNDED_TOLERANCES = {
    **DEFAULT_TOLERANCES,
    torch.float16: Tolerance(1e-3, 6e-3),
    torch.bfloat16: Tolerance(8e-3, 5e-2),
}


def channels_last(maps: Tensor) -> Tensor:
    return maps.contiguous(memory_format=torch.channels_last)


def window_weights(make: Maker, batch: int, channels: int, height: int, width: int, positive: bool) -> Tensor:
    """Numbers for every tap; positive ones have a sum that can be divided by."""
    shape = (batch, channels, height, width)
    return make.uniform(*shape, low=0.2, high=1.0) if positive else make.normal(*shape)


# ------------------------------------------------------------------------------------ wrong inputs


def wrong_factors(argument: str, wrong: Wrong, **settings: Any) -> Iterator[ErrorInput]:
    """Integers beyond [1, 2^31), and what is no integer."""
    for number in (0, -1, -3, 2**31, 2**63 - 1, -(2**63)):
        yield wrong(f"{argument}_{number}", ValueError, argument, {argument: number}, **settings)
    values: dict[str, Any] = {"none": None, "a_string": "3", "a_fraction": 1.5, "a_list": [1]}
    for name, value in values.items():
        yield wrong(f"{argument}_{name}", TypeError, argument, {argument: value}, native=False)


def wrong_ranks(argument: str, maps: Tensor, wrong: Wrong) -> Iterator[ErrorInput]:
    """Maps [N, C, H, W] with other numbers of dimensions."""
    for name, tensor in {"3": maps[0], "5": maps[None], "1": maps.flatten(), "0": maps.sum()}.items():
        yield wrong(f"{argument}_rank_{name}", ValueError, argument, {argument: tensor})


def wrong_maps(argument: str, blamed: str, maps: Tensor, wrong: Wrong) -> Iterator[ErrorInput]:
    """Maps of another rank or kind; `blamed` is the argument that a batch, a side or a device contradicts."""
    yield from wrong_ranks(argument, maps, wrong)
    for name, tensor in {
        "N_1": maps[:1],
        "N_0": maps[:0],
        "short": maps[:, :, 1:],
        "narrow": maps[..., 1:],
        "transposed": maps.mT,
    }.items():
        yield wrong(f"{argument}_{name}", ValueError, blamed, {argument: tensor})
    yield wrong(f"{argument}_on_meta", ValueError, blamed, {argument: maps.to("meta")})
    yield from wrong_kinds(argument, wrong)
    yield from wrong_dtypes(argument, maps, (torch.int64, torch.bool, torch.complex64), wrong)


def too_wide(*maps: Tensor) -> list[Tensor]:
    """The first columns of the maps, repeated more often than a side may have pixels."""
    return [tensor[..., :1].expand(*tensor.shape[:3], 2**31) for tensor in maps]
