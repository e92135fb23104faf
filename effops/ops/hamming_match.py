"""Matches between two sets of binary descriptors."""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effops.ops import _packed
from effops.ops._checks import ShapeChecker, check_integer, check_type, explain

_NAME = "hamming_match"
_op = torch.ops.effops.hamming_match.default


def hamming_match(
    a: Tensor,  # [Na, W]
    b: Tensor,  # [Nb, W]
    ratio: float | None = None,
    max_distance: int | None = None,
    mutual: bool = True,
    *,
    mask: Tensor | None = None,  # [Na, Nb]
) -> tuple[Tensor, Tensor]:  # [n, 2], [n]
    r"""Pairs of rows of ``a`` and their nearest rows of ``b``, those that pass the tests.

    With :math:`d_1 \le d_2` the distances of row i to its nearest row j and to its second nearest one (ties
    go to the lowest index), the pair (i, j) is a match iff

    .. math::
        d_1 \le max\_distance, \qquad d_1 < ratio \cdot d_2, \qquad
        i = \text{nearest row of a to } j \;\; (\text{if } mutual)

    The tests do not depend on each other. The ratio test compares in float64, looks from ``a`` to ``b`` only,
    refuses :math:`d_1 = d_2 = 0`, and is passed by a row with a single candidate.

    Args:
        a: Packed rows, [Na, W]: int64 words (:func:`pack_bits`, :func:`topk_pack`), or uint8 bytes as OpenCV
            and faiss have them. At most 4096 bits each.
        b: Packed rows, [Nb, W], of the same dtype.
        ratio: Largest ratio of the distances, greater than 0. None: no such test.
        max_distance: Largest distance, inclusive, 0 or more. None: no such test.
        mutual: Whether both rows must be the nearest of each other: OpenCV's ``crossCheck``.
        mask: Pairs that may match, [Na, Nb] bool. None: all.

    Returns:
        matches, [n, 2] int64, the indices in ``a`` (ascending) and in ``b``; and their distances, [n] int32;
        contiguous. :func:`hamming_knn` with ``mutual=True`` has a result of fixed size instead.

    Raises:
        ValueError: wrong ranks or sizes, rows of more than 4096 bits, a ratio that is not positive, a
            negative distance, tensors on different devices, and vmap, which is not supported.
        TypeError: wrong dtypes, or an argument of another kind.
        RuntimeError: no kernels for the device in this installation.

    The size of the result depends on the data: on CUDA the host waits for it, and ``torch.compile`` needs
    ``torch._dynamo.config.capture_dynamic_output_shape_ops = True`` to keep it in one graph. Deterministic
    and the same on every device.

    Source: M. Kanakis, PhD thesis, section 5.3; Lowe, "Distinctive Image Features", IJCV 2004 (ratio test);
    OpenCV's BFMatcher.
    """
    try:
        return _op(a, b, ratio, max_distance, mutual, mask)
    except (RuntimeError, TypeError) as error:
        return explain(_NAME, error, lambda: _check(a, b, ratio, max_distance, mutual, mask))


def _check(
    a: Tensor,
    b: Tensor,
    ratio: float | None,
    max_distance: int | None,
    mutual: bool,
    mask: Tensor | None,
) -> None:
    """The metadata checks of csrc/binary/hamming.h."""
    ShapeChecker(_NAME).match("a", a, "NW")  # a single set
    check = _packed.check_sets(_NAME, a, b)
    if ratio is not None:
        check_type(_NAME, "ratio", ratio, "float", float, int, torch.SymFloat, torch.SymInt)
        if not ratio > 0:
            raise ValueError(f"{_NAME}: expected ratio > 0, got {ratio}")
    if max_distance is not None:
        check_integer(_NAME, "max_distance", max_distance)
        if max_distance < 0:
            raise ValueError(f"{_NAME}: expected max_distance >= 0, got {max_distance}")
    check_type(_NAME, "mutual", mutual, "bool", bool, torch.SymBool)
    if mask is not None:
        _packed.check_mask(check, mask, a)


# ------------------------------------------------------------------------------------------ fake


@torch.library.register_fake("effops::hamming_match")
def _fake(
    a: Tensor,
    b: Tensor,
    ratio: float | None,
    max_distance: int | None,
    mutual: bool,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    _check(a, b, ratio, max_distance, mutual, mask)
    count = torch.library.get_ctx().new_dynamic_size()
    return a.new_empty((count, 2), dtype=torch.int64), a.new_empty((count,), dtype=torch.int32)


# ------------------------------------------------------------------------------------------ vmap


@torch.library.register_vmap("effops::hamming_match")
def _vmap_rule(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> NoReturn:
    raise ValueError(f"{_NAME}: vmap is not supported: the number of matches depends on the data")


# ------------------------------------------------------------------------------------------ FLOPs


@register_flop_formula(torch.ops.effops.hamming_match, get_raw=True)
def _flops(a: Tensor, b: Tensor, *settings: Any, out_val: Any = None, **_: Any) -> int:
    """2 per pair and bit."""
    return _packed.pair_flops(a, b)
