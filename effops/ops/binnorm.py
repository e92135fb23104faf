"""Binary normalisation: rows of numbers in (0, 1) that sum to k."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effops.ops import _autocast, _autograd, _packed, _vmap
from effops.ops._checks import FLOAT_DTYPES, explain

_NAME = "binnorm"
_op = torch.ops.effops.binnorm.default
_backward_op = torch.ops.effops.binnorm_backward.default


def binnorm(
    x: Tensor,  # [..., M]
    k: int,
) -> Tensor:  # [..., M]
    r"""A sigmoid whose threshold makes each row sum to k: the soft form of :func:`topk_pack`.

    .. math::
        y_i = \sigma(x_i + \nu), \qquad \nu \text{ such that } \sum_i y_i = k

    It is the z in [0, 1]^M with sum k that minimises :math:`-x^T z - H(z)`, H being the entropy of the bits.
    Its gradient is

    .. math::
        dx = h \odot (dy - \langle h, dy \rangle / \langle h, 1 \rangle), \qquad h = y (1 - y)

    and 0 for a row without any h > 0. k = 0 gives zeros, k = M ones. An element of -Inf is 0 and one of +Inf
    is 1; the finite elements share what is left of k. A row that cannot do that, or holds a NaN, is NaN.

    Args:
        x: Logits, [..., M]. float32, float64, bfloat16 or float16.
        k: What each row sums to, an integer from 0 to M.

    Returns:
        [..., M], contiguous, in the dtype of ``x``; computed in float32 (float64 for float64) and rounded
        once.

    Raises:
        ValueError: a tensor without dimensions, k out of range.
        TypeError: wrong dtypes, or an argument that is no tensor or no integer.
        RuntimeError: no kernels for the device in this installation.

    Differentiable in ``x``, once; only the result is kept for that. Autocast computes it in float32.
    Deterministic. vmap may batch ``x``. ``torch.func.grad`` is not supported.

    Source: M. Kanakis, PhD thesis, section 5.3.3, eqs. 5.3 to 5.7; Kanakis et al., "ZippyPoint", CVPR
    workshops 2023.
    """
    try:
        return _op(x, k)
    except (RuntimeError, TypeError) as error:
        return explain(_NAME, error, lambda: _check(x, k))


def _check(x: Tensor, k: int) -> None:
    """The metadata checks of csrc/binary/binnorm.h."""
    _packed.check_rows(_NAME, "x", x, *FLOAT_DTYPES)
    _packed.check_count(_NAME, "k", k, x.shape[-1])


# ------------------------------------------------------------------------------------------ fake


@torch.library.register_fake("effops::binnorm")
def _fake(x: Tensor, k: int) -> Tensor:
    _check(x, k)
    return x.new_empty(x.shape)


@torch.library.register_fake("effops::binnorm_backward")
def _fake_backward(grad_output: Tensor, output: Tensor) -> Tensor:
    return output.new_empty(output.shape)


# ------------------------------------------------------------------------------------------ autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    (output,) = ctx.saved_tensors
    return _backward_op(grad_output, output), None


_autograd.install(_NAME, _save, _backward, differentiable=(0,))
_autograd.refuse_second_derivatives(_NAME, differentiable=(0, 1))

# ------------------------------------------------------------------------------------------ autocast

_autocast.install(_NAME, (_autocast.FLOAT32, _autocast.KEEP))

# ------------------------------------------------------------------------------------------ vmap


@torch.library.register_vmap("effops::binnorm")
def _vmap_rule(info: Any, in_dims: tuple[int, None], x: Tensor, k: int) -> tuple[Tensor, int]:
    _check(_packed.first_member(x, in_dims[0]), k)
    return _op(x.movedim(in_dims[0], 0), k), 0


@torch.library.register_vmap("effops::binnorm_backward")
def _vmap_backward_rule(
    info: Any, in_dims: tuple[int | None, int | None], grad_output: Tensor, output: Tensor
) -> tuple[Tensor, int]:
    gradient = _vmap.move_to_front(grad_output, in_dims[0], info.batch_size)
    return _backward_op(gradient, _vmap.move_to_front(output, in_dims[1], info.batch_size)), 0


# ------------------------------------------------------------------------------------------ FLOPs


@register_flop_formula(torch.ops.effops.binnorm, get_raw=True)
def _flops(x: Tensor, k: int, *, out_val: Any = None, **_: Any) -> int:
    """4 per element for a sigmoid and its argument; the search for the shift is not counted."""
    return 4 * x.numel()


@register_flop_formula(torch.ops.effops.binnorm_backward, get_raw=True)
def _backward_flops(grad_output: Tensor, output: Tensor, *, out_val: Any = None, **_: Any) -> int:
    """7 per element: h, two sums, and the gradient."""
    return 7 * output.numel()
