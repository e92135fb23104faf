"""Nearest neighbours by Hamming distance."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effops.ops import _packed, _vmap
from effops.ops._checks import ShapeChecker, check_type, explain

_NAME = "hamming_knn"
_op = torch.ops.effops.hamming_knn.default
_MOST_NEIGHBOURS = 2**32 - 1


def hamming_knn(
    a: Tensor,  # [B, Na, W] or [Na, W]
    b: Tensor,  # [B, Nb, W] or [Nb, W]
    k: int = 1,
    *,
    lengths_a: Tensor | None = None,  # [B] or []
    lengths_b: Tensor | None = None,  # [B] or []
    mask: Tensor | None = None,  # [B, Na, Nb] or [Na, Nb]
    mutual: bool = False,
) -> tuple[Tensor, Tensor]:  # twice [B, Na, k] or [Na, k]
    r"""The k nearest rows of ``b`` for every row of ``a``, by Hamming distance.

    .. math::
        d_{ij} = \sum_w popcount(a[i, w] \oplus b[j, w]), \qquad
        indices[i] = \text{the first k of all j, ordered by } (d_{ij}, j)

    Ties go to the lowest index, as in OpenCV's and faiss' exact search. A neighbour that does not exist has
    index -1 and distance 2^31 - 1. The matrix of distances is never stored.

    Args:
        a: Packed rows that look for neighbours, [B, Na, W], or [Na, W] of a single set: int64 words
            (:func:`pack_bits`, :func:`topk_pack`), or uint8 bytes as OpenCV and faiss have them. At most 4096
            bits each.
        b: Packed rows that are found, [B, Nb, W] or [Nb, W], of the same dtype.
        k: Neighbours per row, 0 or more; it may exceed Nb.
        lengths_a: How many rows of ``a`` exist, from the first on, [B] int64, or [] beside a single set. The
            others find nothing. None: all.
        lengths_b: The same for ``b``. The others are not found.
        mask: Pairs that may be neighbours, bool, [B, Na, Nb], or [Na, Nb] for all sets alike. None: all.
        mutual: Keep the neighbours of a row only if its nearest one, j, has this row as its own nearest among
            the rows of ``a`` (those that exist and may be neighbours of j; ties go to the lowest index). With
            k = 1 that is OpenCV's ``crossCheck``, in a result of fixed size.

    Returns:
        distances, int32, and indices, int64, both [B, Na, k] or [Na, k] and contiguous, nearest first.

    Raises:
        ValueError: wrong ranks or sizes, rows of more than 4096 bits, k out of range, tensors on different
            devices, and on the CPU a length out of range. CUDA kernels clamp lengths (the host never waits
            for them).
        TypeError: wrong dtypes, or an argument of another kind.
        RuntimeError: no kernels for the device in this installation.

    Deterministic and the same on every device. vmap may batch every tensor.

    Source: M. Kanakis, PhD thesis, section 5.3; OpenCV's BFMatcher, faiss' IndexBinaryFlat.
    """
    try:
        return _op(a, b, k, lengths_a, lengths_b, mask, mutual)
    except (RuntimeError, TypeError) as error:
        return explain(_NAME, error, lambda: _check(a, b, k, lengths_a, lengths_b, mask, mutual))


def _check(
    a: Tensor,
    b: Tensor,
    k: int,
    lengths_a: Tensor | None,
    lengths_b: Tensor | None,
    mask: Tensor | None,
    mutual: bool,
) -> ShapeChecker:
    """The metadata checks of csrc/binary/hamming.h."""
    check = _packed.check_sets(_NAME, a, b)
    _packed.check_count(_NAME, "k", k, _MOST_NEIGHBOURS)
    batched = "B" in check.sizes
    for argument, lengths in (("lengths_a", lengths_a), ("lengths_b", lengths_b)):
        if lengths is not None:
            check.match(argument, lengths, "B" if batched else "")
            check.dtype(argument, lengths, torch.int64)
            check.device(argument, lengths, "a", a)
    if mask is not None:
        _packed.check_mask(check, mask, a)
    check_type(_NAME, "mutual", mutual, "bool", bool, torch.SymBool)
    return check


# ------------------------------------------------------------------------------------------ fake


@torch.library.register_fake("effops::hamming_knn")
def _fake(
    a: Tensor,
    b: Tensor,
    k: int,
    lengths_a: Tensor | None,
    lengths_b: Tensor | None,
    mask: Tensor | None,
    mutual: bool,
) -> tuple[Tensor, Tensor]:
    _check(a, b, k, lengths_a, lengths_b, mask, mutual)
    shape = (*a.shape[:-1], k)
    return a.new_empty(shape, dtype=torch.int32), a.new_empty(shape, dtype=torch.int64)


# ------------------------------------------------------------------------------------------ vmap


@torch.library.register_vmap("effops::hamming_knn")
def _vmap_rule(
    info: Any,
    in_dims: tuple[int | None, ...],
    a: Tensor,
    b: Tensor,
    k: int,
    lengths_a: Tensor | None,
    lengths_b: Tensor | None,
    mask: Tensor | None,
    mutual: bool,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    size = info.batch_size
    inputs = (a, b, k, lengths_a, lengths_b, mask, mutual)
    members = [_packed.first_member(value, dim) for value, dim in zip(inputs, in_dims, strict=True)]
    sizes = _check(*members).sizes

    def fold_lengths(lengths: Tensor | None, in_dim: int | None) -> Tensor | None:
        return None if lengths is None else _vmap.move_to_front(lengths, in_dim, size).flatten()

    distances, indices = _op(
        _packed.fold_set(a, in_dims[0], size),
        _packed.fold_set(b, in_dims[1], size),
        k,
        fold_lengths(lengths_a, in_dims[3]),
        fold_lengths(lengths_b, in_dims[4]),
        _fold_mask(mask, in_dims[5], size, sizes.get("B")),
        mutual,
    )
    batched = "B" in sizes
    unfolded = (_packed.unfold_set(distances, size, batched), _packed.unfold_set(indices, size, batched))
    return unfolded, (0, 0)


def _fold_mask(mask: Tensor | None, in_dim: int | None, size: int, batch: int | None) -> Tensor | None:
    """A mask of one set for all sets of all members stays as it is."""
    if mask is None or (in_dim is None and mask.dim() == 2):
        return mask
    masks = _vmap.move_to_front(mask, in_dim, size)
    if masks.dim() == 3 and batch is not None:  # each member has one for all of its sets
        masks = masks[:, None].expand(-1, batch, -1, -1)
    return masks.flatten(0, 1) if masks.dim() == 4 else masks


# ------------------------------------------------------------------------------------------ FLOPs


@register_flop_formula(torch.ops.effops.hamming_knn, get_raw=True)
def _flops(a: Tensor, b: Tensor, *settings: Any, out_val: Any = None, **_: Any) -> int:
    """2 per pair and bit."""
    return _packed.pair_flops(a, b)
