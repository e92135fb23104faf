"""A loss on all pairs of pixels that pulls instances together and pushes them apart."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from effops.ops import _autocast, _autograd, _pairwise
from effops.ops._checks import ShapeChecker, explain, number_of

_NAME = "pairwise_embedding_loss"
_op = torch.ops.effops.pairwise_embedding_loss.default
_backward_op = torch.ops.effops.pairwise_embedding_loss_backward.default

#: The schema's numbers.
NORMALIZE = {"sum_w": 0, "thesis": 1, "none": 2}


def pairwise_embedding_loss(
    x: Tensor,  # [B, N, D] or [N, D]
    labels: Tensor,  # [B, N] or [N]
    alpha: float = 0.5,
    weights: Tensor | None = None,  # [B, N] or [N]
    normalize: str = "sum_w",
) -> Tensor:  # []
    r"""Pulls embeddings of one instance together and pushes those of different instances apart.

    With the similarity s and the cost of a pair of points, and for each image the sum over all ordered pairs,
    those of a point with itself included,

    .. math::
        s_{ij} = \frac{1 + \cos \angle(x_i, x_j)}{2}, \quad
        c_{ij} = \begin{cases} 1 - s_{ij} & labels_i = labels_j \\
            \max(s_{ij} - \alpha, 0) & \text{else} \end{cases}, \quad
        L = \sum_{i, j} w_i w_j \, c_{ij}

    the loss is the mean of L over the batch, each divided, by ``normalize``, by

    - ``"sum_w"``: the square of the sum of weights; the loss does not depend on how many points there are.
    - ``"thesis"``: the number of points with a label.
    - ``"none"``: 1.

    Points with a negative label are ignored. The similarities are never stored. The pairs of an instance are
    summed in closed form, those of different ones tile by tile.

    Args:
        x: Embeddings, [B, N, D], or [N, D] of a single image; D from 1 to 512; they need not be normalised.
            float32, float64, bfloat16 or float16.
        labels: int64 [B, N] or [N]: the instance of each point in its image, any number of 0 or more;
            negative (usually -1): none.
        alpha: Similarity that different instances may have, any finite number; 0.5 means orthogonal.
        weights: w, [B, N] or [N], of the dtype of ``x``. None: 1 / (number of points of the instance in its
            image), so that large and small instances count alike.
        normalize: ``"sum_w"``, ``"thesis"`` or ``"none"``.

    Returns:
        A scalar, float32, or float64 for float64. 0 for no images; an image without points that count adds 0.

    Raises:
        ValueError: wrong ranks or sizes, an alpha that is not finite, an unknown option, tensors on different
            devices.
        TypeError: wrong dtypes, or an argument of another kind.
        RuntimeError: no kernels for the device in this installation.

    Differentiable in ``x`` and ``weights``, once; the derivative of the hinge at its kink is 0.
    Deterministic, on the CPU for any number of threads. Under autocast everything is float32. vmap may batch
    every tensor (it calls the op once per member). ``torch.func.grad`` is not supported.

    Source: S. Kong, PhD thesis, section 5.3, eq. 5.1 and 5.2 (``"thesis"``) and its code (``"sum_w"``).
    """
    number = number_of(_NAME, "normalize", NORMALIZE, normalize)
    points, factors = _pairwise.in_float32(x, weights)
    single = _pairwise.is_set(points)
    check_inputs(points, labels, alpha, factors, single)
    if single:
        points, labels, factors = _pairwise.with_batch(points, labels, factors)
    order, segments = sort_by_label(labels)
    if factors is None:
        factors = default_weights(order, segments, points.dtype)
    try:
        return _op(points, order, segments, factors, alpha, number)[0]
    except (RuntimeError, TypeError) as error:
        return explain(_NAME, error, lambda: None)


def sort_by_label(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The points of each image sorted by label, ignored ones first, and in that order the number of each
    point's instance, counted from 0; -1 for ignored points. Both [B, N] int64.
    """
    # No label is that of an ignored point, whichever negative number that has.
    ordered, order = labels.clamp(min=-1).sort(dim=1, stable=True)
    before = functional.pad(ordered, (1, 0), value=-1)[:, :-1]
    return order, (ordered != before).cumsum(1) - 1


def default_weights(order: Tensor, segments: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / (number of points of the instance) for every point, in the order of the points."""
    # Instances are runs, so that a binary search counts them, on CUDA as deterministically as here.
    end = torch.searchsorted(segments, segments, right=True)
    counts = end - torch.searchsorted(segments, segments)
    return torch.zeros_like(counts, dtype=dtype).scatter(1, order, 1 / counts.to(dtype))


def check_inputs(x: Tensor, labels: Tensor, alpha: float, weights: Tensor | None, single: bool) -> None:
    """Of the public function, before the labels are sorted."""
    check = _pairwise.check_points(_NAME, "x", x, single)
    check.match("labels", labels, "N" if single else "BN")
    check.dtype("labels", labels, torch.int64)
    check.device("labels", labels, "x", x)
    if weights is not None:
        _pairwise.check_beside(check, "weights", weights, "N", x)
    _pairwise.check_finite(_NAME, "alpha", alpha)


# ------------------------------------------------------------------------------------------ fake


def _check(
    x: Tensor, order: Tensor, segments: Tensor, weights: Tensor, alpha: float, normalize: int
) -> ShapeChecker:
    """The metadata checks of csrc/pairwise/pairwise_embedding_loss.h."""
    check = _pairwise.check_points(_NAME, "x", x, single=False)
    for argument, indices in (("order", order), ("segments", segments)):
        check.match(argument, indices, "BN")
        check.dtype(argument, indices, torch.int64)
        check.device(argument, indices, "x", x)
    _pairwise.check_beside(check, "weights", weights, "N", x)
    _pairwise.check_finite(_NAME, "alpha", alpha)
    _pairwise.check_number(_NAME, "normalize", normalize, len(NORMALIZE))
    return check


@torch.library.register_fake("effops::pairwise_embedding_loss")
def _fake(
    x: Tensor, order: Tensor, segments: Tensor, weights: Tensor, alpha: float, normalize: int
) -> tuple[Tensor, Tensor]:
    _check(x, order, segments, weights, alpha, normalize)
    return x.new_empty(()), x.new_empty(x.shape[:2])


@torch.library.register_fake("effops::pairwise_embedding_loss_backward")
def _fake_backward(
    grad_loss: Tensor,
    x: Tensor,
    order: Tensor,
    segments: Tensor,
    weights: Tensor,
    costs: Tensor,
    alpha: float,
    normalize: int,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else (0,)),
        weights.new_empty(weights.shape if need_weights else (0,)),
    )


# ------------------------------------------------------------------------------------------ autograd


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    *tensors, alpha, normalize = inputs
    _, costs = outputs
    ctx.settings = (alpha, normalize)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(costs)
    ctx.save_for_backward(*tensors, costs)


def _backward(ctx: Any, grad_loss: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 6
    need_x, need_weights = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    grad_x, grad_weights = _backward_op(grad_loss, *ctx.saved_tensors, *ctx.settings, need_x, need_weights)
    return grad_x if need_x else None, None, None, grad_weights if need_weights else None, None, None


_autograd.install(_NAME, _save, _backward, differentiable=(0, 3))
_autograd.refuse_second_derivatives(_NAME, differentiable=(0, 1, 4, 5))

# ------------------------------------------------------------------------------------------ autocast

_autocast.install(
    _NAME, (_autocast.FLOAT32, *(_autocast.KEEP,) * 2, _autocast.FLOAT32, *(_autocast.KEEP,) * 2)
)

# ------------------------------------------------------------------------------------------ vmap

# The loss is a mean over the batch, which must not mix the members.
_pairwise.install_looping_vmap(_NAME)
_pairwise.install_looping_vmap(f"{_NAME}_backward")

# ------------------------------------------------------------------------------------------ FLOPs


@register_flop_formula(torch.ops.effops.pairwise_embedding_loss)
def _flops(x: Any, *others: Any, out_shape: Any = None, **_: Any) -> int:
    """A multiply-add per channel of every pair."""
    return _pairwise.pair_flops(2, x)


@register_flop_formula(torch.ops.effops.pairwise_embedding_loss_backward)
def _backward_flops(grad_loss: Any, x: Any, *others: Any, out_shape: Any = None, **_: Any) -> int:
    """Two: the similarities again, and the sum of what pulls and pushes."""
    return _pairwise.pair_flops(4, x)
