"""What the entries of the pairwise engine share: points in groups, and wrong inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from effops.testing._info import HALF_DTYPES, ErrorInput, Maker
from effops.testing._wrong import Wrong, wrong_dtypes, wrong_kinds


def cast_like_op(*values: Any) -> tuple[Any, ...]:
    """Half-precision tensors in float32, as leaves, where the first is one: what public functions pass on."""
    if not (isinstance(values[0], Tensor) and values[0].dtype in HALF_DTYPES):
        return values
    return tuple(
        value.detach().float().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.dtype in HALF_DTYPES
        else value
        for value in values
    )


def with_batch(*values: Any) -> tuple[Any, ...]:
    """Tensors of a single set as a batch of one, as leaves."""
    return tuple(
        value.detach().unsqueeze(0).requires_grad_(value.requires_grad)
        if isinstance(value, Tensor)
        else value
        for value in values
    )


def spread(make: Maker, *shape: int) -> Tensor:
    """Numbers from 0.3 to 1.5 and their opposites: no row is nearly 0, neither in a layout that repeats one.

    The gradient of a row is divided by its norm, rounding errors of a gradient that vanishes included.
    """
    return make.uniform(*shape, low=0.3, high=1.5) * make.choice((-1.0, 1.0), *shape)


def groups(make: Maker, *shape: int, count: int = 3, noise: float = 0.05, order: str = "runs") -> Tensor:
    """Points [..., N, D] around a few directions per image, of lengths from 0.5 to 2.

    Directions are the axes and their opposites, turned at random together, so that groups stay apart; a
    noise of 0.05 per channel and sqrt(D) does not join them. ``order``: groups in runs or mixed.
    """
    *batch, points, channels = shape
    turn = torch.linalg.qr(make.normal(channels, channels).double().cpu()).Q
    corners = torch.cat([turn, -turn])[: max(min(count, 2 * channels), 1)]
    which = torch.arange(points) * len(corners) // max(points, 1)
    if order == "mixed":
        which = which[make.permutation(points).cpu()]
    spread = make.normal(*shape).double().cpu() * noise
    lengths = make.uniform(*batch, points, 1, low=0.5, high=2.0).double().cpu()
    return ((corners[which] + spread) * lengths).to(make.dtype).to(make.device)


def arc(make: Maker, *degrees: float) -> Tensor:
    """Points [N, 3] in one plane at the given angles."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    flat = torch.stack([angle.cos(), angle.sin(), torch.zeros_like(angle)], dim=-1)
    turn = torch.linalg.qr(make.normal(3, 3).double().cpu()).Q
    return functional.normalize(flat @ turn, dim=-1).to(make.dtype).to(make.device)


# ------------------------------------------------------------------------------------ wrong inputs


def wrong_points(argument: str, points: Tensor, wrong: Wrong) -> Iterator[ErrorInput]:
    """Points [B, N, D] of another rank, kind or dtype."""
    for name, tensor in {"1": points[0, 0], "4": points[None], "0": points.sum()}.items():
        yield wrong(f"{argument}_rank_{name}", ValueError, argument, {argument: tensor})
    yield wrong(f"{argument}_of_no_channels", ValueError, argument, {argument: points[..., :0]})
    wide = points[..., :1].expand(*points.shape[:2], 513)
    yield wrong(f"{argument}_of_513_channels", ValueError, argument, {argument: wide})
    yield from wrong_dtypes(argument, points, (torch.int64, torch.bool, torch.complex64), wrong)
    yield from wrong_kinds(argument, wrong)


def wrong_beside(argument: str, good: Tensor, wrong: Wrong) -> Iterator[ErrorInput]:
    """A tensor [B, ...] beside points that does not fit them."""
    for name, tensor in {
        "rank_too_low": good[0],
        "rank_too_high": good[None],
        "rank_0": good.sum(),
        "B_1": good[:1],
        "B_0": good[:0],
    }.items():
        yield wrong(f"{argument}_{name}", ValueError, argument, {argument: tensor})
    yield wrong(f"{argument}_on_meta", ValueError, argument, {argument: good.to("meta")})


def wrong_numbers(
    argument: str, values: Sequence[float], wrong: Wrong, **settings: Any
) -> Iterator[ErrorInput]:
    """Numbers out of range, and what is no number."""
    for value in values:
        yield wrong(f"{argument}_{value}", ValueError, argument, {argument: value}, **settings)
    others: dict[str, Any] = {"a_string": "1", "a_list": [1.0], "complex": 1j, "a_dict": {}}
    for name, value in others.items():
        yield wrong(f"{argument}_{name}", TypeError, argument, {argument: value}, native=False)


def wrong_integers(
    argument: str, values: Sequence[int], wrong: Wrong, **settings: Any
) -> Iterator[ErrorInput]:
    """Integers out of range, and what is no integer."""
    for value in values:
        yield wrong(f"{argument}_{value}", ValueError, argument, {argument: value}, **settings)
    others: dict[str, Any] = {"none": None, "a_string": "3", "a_fraction": 1.5, "a_list": [1]}
    for name, value in others.items():
        yield wrong(f"{argument}_{name}", TypeError, argument, {argument: value}, native=False)
