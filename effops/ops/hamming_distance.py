"""Hamming distances of all pairs of two sets."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effops.ops import _packed
from effops.ops._checks import explain

_NAME = "hamming_distance"
_op = torch.ops.effops.hamming_distance.default


def hamming_distance(
    a: Tensor,  # [B, Na, W] or [Na, W]
    b: Tensor,  # [B, Nb, W] or [Nb, W]
) -> Tensor:  # [B, Na, Nb] or [Na, Nb]
    r"""How many bits differ, for every row of ``a`` and every row of ``b``.

    .. math::
        out[i, j] = \sum_w popcount(a[i, w] \oplus b[j, w])

    For rows of k ones each (:func:`topk_pack`) that is :math:`2 k - 2\, popcount(a_i \wedge b_j)`, an even
    number. :func:`hamming_knn` and :func:`hamming_match` need the nearest rows alone and store no matrix.

    Args:
        a: Packed rows, [B, Na, W], or [Na, W] of a single set: int64 words (:func:`pack_bits`,
            :func:`topk_pack`), or uint8 bytes as OpenCV and faiss have them. At most 4096 bits each.
        b: Packed rows, [B, Nb, W] or [Nb, W], of the same dtype.

    Returns:
        [B, Na, Nb] or [Na, Nb] int32, contiguous.

    Raises:
        ValueError: wrong ranks or sizes, rows of more than 4096 bits, tensors on different devices.
        TypeError: wrong dtypes, or an argument that is no tensor.
        RuntimeError: no kernels for the device in this installation.

    Deterministic and the same on every device. vmap may batch both arguments.

    Source: M. Kanakis, PhD thesis, section 5.3; the distance of OpenCV's NORM_HAMMING.
    """
    try:
        return _op(a, b)
    except (RuntimeError, TypeError) as error:
        return explain(_NAME, error, lambda: _packed.check_sets(_NAME, a, b))


# ------------------------------------------------------------------------------------------ fake


@torch.library.register_fake("effops::hamming_distance")
def _fake(a: Tensor, b: Tensor) -> Tensor:
    _packed.check_sets(_NAME, a, b)
    return a.new_empty((*a.shape[:-1], b.shape[-2]), dtype=torch.int32)


# ------------------------------------------------------------------------------------------ vmap


@torch.library.register_vmap("effops::hamming_distance")
def _vmap_rule(info: Any, in_dims: tuple[int | None, int | None], a: Tensor, b: Tensor) -> tuple[Tensor, int]:
    size = info.batch_size
    members = (_packed.first_member(a, in_dims[0]), _packed.first_member(b, in_dims[1]))
    batched = "B" in _packed.check_sets(_NAME, *members).sizes
    distances = _op(_packed.fold_set(a, in_dims[0], size), _packed.fold_set(b, in_dims[1], size))
    return _packed.unfold_set(distances, size, batched), 0


# ------------------------------------------------------------------------------------------ FLOPs


@register_flop_formula(torch.ops.effops.hamming_distance, get_raw=True)
def _flops(a: Tensor, b: Tensor, *, out_val: Any = None, **_: Any) -> int:
    """2 per pair and bit."""
    return _packed.pair_flops(a, b)
