"""Rows of constant weight: the k largest elements as packed ones."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effops.ops import _packed
from effops.ops._checks import FLOAT_DTYPES, explain

_NAME = "topk_pack"
_op = torch.ops.effops.topk_pack.default


def topk_pack(
    x: Tensor,  # [..., M]
    k: int,
) -> Tensor:  # [..., ceil(M / 64)]
    r"""Packed rows with exactly k ones: at the k largest elements of each row of ``x``.

    .. math::
        bit_j = 1 \iff \#\{i : x_i > x_j\} + \#\{i < j : x_i = x_j\} < k

    Ties go to the lowest index. NaN is larger than every number, as in ``torch.topk``, and all NaN tie; so do
    0 and -0. It is what :func:`binnorm` becomes at inference: a descriptor of constant weight, for
    :func:`hamming_knn` and its sisters.

    Args:
        x: Rows of M elements, [..., M]. float32, float64, bfloat16 or float16.
        k: Ones per row, 0 to M.

    Returns:
        [..., ceil(M / 64)] int64, contiguous, bits in the order of :func:`pack_bits`.

    Raises:
        ValueError: a tensor without dimensions, k out of range.
        TypeError: wrong dtypes, or an argument that is no tensor or no integer.
        RuntimeError: no kernels for the device in this installation.

    The result has no gradient; train through :func:`binnorm`. Deterministic. vmap may batch ``x``.

    Source: M. Kanakis, PhD thesis, section 5.3.3; Kanakis et al., "ZippyPoint", CVPR workshops 2023.
    """
    try:
        return _op(x, k)
    except (RuntimeError, TypeError) as error:
        return explain(_NAME, error, lambda: _check(x, k))


def _check(x: Tensor, k: int) -> None:
    """The metadata checks of csrc/binary/topk_pack.h."""
    _packed.check_rows(_NAME, "x", x, *FLOAT_DTYPES)
    _packed.check_count(_NAME, "k", k, x.shape[-1])


# ------------------------------------------------------------------------------------------ fake


@torch.library.register_fake("effops::topk_pack")
def _fake(x: Tensor, k: int) -> Tensor:
    _check(x, k)
    return x.new_empty((*x.shape[:-1], _packed.words_of(x.shape[-1])), dtype=torch.int64)


# ------------------------------------------------------------------------------------------ vmap


@torch.library.register_vmap("effops::topk_pack")
def _vmap_rule(info: Any, in_dims: tuple[int, None], x: Tensor, k: int) -> tuple[Tensor, int]:
    _check(_packed.first_member(x, in_dims[0]), k)
    return _op(x.movedim(in_dims[0], 0), k), 0


# ------------------------------------------------------------------------------------------ FLOPs


@register_flop_formula(torch.ops.effops.topk_pack, get_raw=True)
def _flops(x: Tensor, k: int, *, out_val: Any = None, **_: Any) -> int:
    """A comparison per element, with the k-th largest of its row; finding that is not counted."""
    return x.numel()
