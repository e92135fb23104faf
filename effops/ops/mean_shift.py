"""Mean shift on the unit sphere: points climb to the modes of their own density."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effops.ops import _autocast, _autograd, _pairwise, _vmap
from effops.ops._checks import FLOAT_DTYPES, check_type, explain, number_of

_NAME = "mean_shift"
_op = torch.ops.effops.mean_shift.default
_backward_op = torch.ops.effops.mean_shift_backward.default

# The schema's numbers.
_PRECISIONS = {"high": 0, "medium": 1}
_NO_TOL = -1.0


def mean_shift(
    x: Tensor,  # [B, N, D] or [N, D]
    kappa: float | Tensor = 36.0,
    eta: float = 1.0,
    iterations: int = 10,
    weights: Tensor | None = None,  # [B, N] or [N]
    return_all: bool = False,
    *,
    seeds: Tensor | None = None,  # [B, M, D] or [M, D]
    tol: float | None = None,
    precision: str = "high",
) -> Tensor:  # [B, N, D] or [N, D]; M rows with seeds; [iterations + 1, ...] with return_all
    r"""Moves points on the unit sphere to the modes of their density, by a von Mises-Fisher kernel.

    Rows are normalised first, v / max(\|v\|, 1e-12). Then in every iteration, for each point j at once,

    .. math::
        K_{ij} = e^{\kappa (x_i \cdot x_j - 1)}, \quad d_j = \sum_i w_i K_{ij}, \quad
        x_j \leftarrow normalize
            \Big( (1 - \eta) \, x_j + \eta \, \frac{1}{d_j} \sum_i w_i K_{ij} \, x_i \Big)

    All points move, and the density with them (Gaussian blurring mean shift). With ``seeds`` these move
    instead, by the same rule, and the points x stay (classical mean shift). Images of a batch do not see each
    other. The N x N matrices are never stored: memory grows with N D, with gradients with N D iterations.

    A point whose d is 0 stays: all weights around it are 0, or every kernel value is below the smallest
    normal number of the dtype (float32: kappa (1 - cos) > 87).

    Args:
        x: Points, [B, N, D], or [N, D] of a single set; D from 1 to 512. float32, float64, bfloat16 or
            float16.
        kappa: Concentration of the kernel, 0 or more: a number, or a tensor of one element ([] or [1]) of any
            floating dtype, which may have a gradient. About 1 / (angle in radians)^2 of what is to be merged.
        eta: Share of the way to the weighted mean, in [0, 1].
        iterations: 0 or more.
        weights: Of the points, [B, N] or [N], of the dtype of ``x``; meant to be 0 or more. None: 1.
        return_all: Whether to return all iterates, the normalised input first.
        seeds: Rows that climb, [B, M, D] or [M, D], of the dtype of ``x``. None: all points do.
        tol: An image stops after an iteration in which none of its rows moved further than this (a distance,
            about the angle in radians); its later iterates repeat the last. None: never.
        precision: ``"high"``: float32 accuracy. ``"medium"``: products in bfloat16 where that is faster (on
            CUDA, for float32), with errors of about 1e-2 kappa in the logarithm of a kernel value.

    Returns:
        Unit rows [B, N, D] or [N, D] (M rows with seeds), with ``return_all`` [iterations + 1, ...];
        contiguous. For half precision computed in float32, and rounded once to the dtype of ``x``.

    Raises:
        ValueError: wrong ranks or sizes, kappa, eta, iterations or tol out of range, an unknown precision,
            tensors on different devices, and on the CPU the value of a kappa tensor out of range (CUDA: NaN).
        TypeError: wrong dtypes, or an argument of another kind.
        RuntimeError: no kernels for the device in this installation.

    A NaN or Inf among the points or weights of an image makes all of the image NaN, one in a seed that row.

    Differentiable in ``x``, ``weights``, ``seeds`` and a ``kappa`` tensor, once, through all iterations; for
    that the iterates are kept. Deterministic, on the CPU for any number of threads. Under autocast everything
    is float32. vmap may batch every tensor (a batched ``kappa`` calls the op once per member).
    ``torch.func.grad`` is not supported.

    Source: S. Kong, PhD thesis, section 5.4 and appendix C; Kong and Fowlkes, "Recurrent Pixel Embedding for
    Instance Grouping", CVPR 2018. Backward corrects two misprints there.
    """
    number = number_of(_NAME, "precision", _PRECISIONS, precision)
    points, weights, seeds = _pairwise.in_float32(x, weights, seeds)
    kappa_tensor, kappa_number = _split_kappa(kappa, points)
    tensors = (points, weights, seeds, kappa_tensor)
    settings = (kappa_number, eta, iterations, _tol_number(tol), number, return_all)
    single = _pairwise.is_set(points)
    save = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)
    batch = (*_pairwise.with_batch(*tensors[:3]), kappa_tensor) if single else tensors
    try:
        output = _op(*batch, *settings, save)[0]
    except (RuntimeError, TypeError) as error:
        inputs = (*tensors, *settings)
        return explain(_NAME, error, lambda: _check(*inputs, single=single))
    return _pairwise.rounded(output.squeeze(-3) if single else output, x)


def _split_kappa(kappa: Any, points: Any) -> tuple[Tensor | None, Any]:
    """A tensor in the dtype of the points, or a number beside no tensor."""
    if not isinstance(kappa, Tensor):
        return None, kappa
    fits = kappa.dtype in FLOAT_DTYPES and isinstance(points, Tensor)
    return (kappa.to(points.dtype) if fits else kappa), 0.0


def _tol_number(tol: float | None) -> float:
    """The schema's number: negative for none."""
    if tol is None:
        return _NO_TOL
    _pairwise.check_finite(_NAME, "tol", tol, least=0)
    return tol


def _check(
    x: Tensor,
    weights: Tensor | None,
    seeds: Tensor | None,
    kappa_tensor: Tensor | None,
    kappa: float,
    eta: float,
    iterations: int,
    tol: float,
    precision: int,
    return_all: bool,
    single: bool = False,
) -> None:
    """The metadata checks of csrc/pairwise/mean_shift.h."""
    check = _pairwise.check_points(_NAME, "x", x, single)
    if weights is not None:
        _pairwise.check_beside(check, "weights", weights, "N", x)
    if seeds is not None:
        _pairwise.check_beside(check, "seeds", seeds, "MD", x)
    if kappa_tensor is not None:
        if kappa_tensor.dim() > 1 or kappa_tensor.numel() != 1:
            raise ValueError(f"{_NAME}: expected kappa of shape [] or [1], got {list(kappa_tensor.shape)}")
        check.dtype("kappa", kappa_tensor, x.dtype)
        if kappa_tensor.device.type != "cpu":
            check.device("kappa", kappa_tensor, "x", x)
    _pairwise.check_finite(_NAME, "kappa", kappa, least=0)
    check_type(_NAME, "eta", eta, "float", float, int, torch.SymFloat, torch.SymInt)
    if not 0 <= eta <= 1:
        raise ValueError(f"{_NAME}: expected eta in [0, 1], got {eta}")
    _pairwise.check_at_least(_NAME, "iterations", iterations, 0)
    if not tol < 0:
        _pairwise.check_finite(_NAME, "tol", tol, least=0)
    _pairwise.check_number(_NAME, "precision", precision, len(_PRECISIONS))
    check_type(_NAME, "return_all", return_all, "bool", bool, torch.SymBool)


# ------------------------------------------------------------------------------------------ fake


@torch.library.register_fake("effops::mean_shift")
def _fake(
    x: Tensor,
    weights: Tensor | None,
    seeds: Tensor | None,
    kappa_tensor: Tensor | None,
    kappa: float,
    eta: float,
    iterations: int,
    tol: float,
    precision: int,
    return_all: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(x, weights, seeds, kappa_tensor, kappa, eta, iterations, tol, precision, return_all)
    batch, rows, channels = x.shape if seeds is None else seeds.shape
    every = (iterations + 1, batch, rows, channels)
    return (
        x.new_empty(every if return_all else every[1:]),
        x.new_empty(every if save and not return_all else (0,)),
        x.new_empty((iterations, 2, batch, rows) if save else (0,)),
        x.new_empty((batch,), dtype=torch.int64),
    )


@torch.library.register_fake("effops::mean_shift_backward")
def _fake_backward(
    grad_output: Tensor,
    x: Tensor,
    weights: Tensor | None,
    seeds: Tensor | None,
    kappa_tensor: Tensor | None,
    iterates: Tensor,
    sums: Tensor,
    steps: Tensor,
    kappa: float,
    eta: float,
    precision: int,
    return_all: bool,
    need_x: bool,
    need_weights: bool,
    need_seeds: bool,
    need_kappa: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def gradient(tensor: Tensor | None, needed: bool) -> Tensor:
        return x.new_empty(tensor.shape if needed and tensor is not None else (0,))

    return (
        gradient(x, need_x),
        gradient(weights, need_weights),
        gradient(seeds, need_seeds),
        gradient(kappa_tensor, need_kappa),  # on the device of x
    )


# ------------------------------------------------------------------------------------------ autograd


def _saving(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs, with the order to keep what backward reads."""
    return (*inputs[:-1], True)


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    *tensors, kappa, eta, _, _, precision, return_all, save = inputs
    if not save:
        raise RuntimeError(f"{_NAME}: expected save=True where gradients are needed")
    output, iterates, sums, steps = outputs
    ctx.settings = (kappa, eta, precision, return_all)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(iterates, sums, steps)
    ctx.save_for_backward(*tensors, output if return_all else iterates, sums, steps)


def _backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 11
    needs = ctx.needs_input_grad[:4]
    found = _backward_op(grad_output, *ctx.saved_tensors, *ctx.settings, *needs)
    *gradients, grad_kappa = (gradient if need else None for gradient, need in zip(found, needs, strict=True))
    if grad_kappa is not None:
        grad_kappa = grad_kappa.to(ctx.saved_tensors[3].device)
    return *gradients, grad_kappa, *(None,) * 7


_autograd.install(_NAME, _save, _backward, differentiable=(0, 1, 2, 3), adapt=_saving)
_autograd.refuse_second_derivatives(_NAME, differentiable=(0, 1, 2, 3, 4, 5, 6))

# ------------------------------------------------------------------------------------------ autocast

_autocast.install(_NAME, (*(_autocast.FLOAT32,) * 4, *(_autocast.KEEP,) * 7))

# ------------------------------------------------------------------------------------------ vmap


@torch.library.register_vmap("effops::mean_shift")
def _vmap_rule(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
    size, kappa_dim = info.batch_size, in_dims[3]
    if _vmap.must_loop(size, kappa_dim):
        return _vmap.loop(_op, inputs, in_dims, size)
    folded = (_pairwise.fold(inputs[i], in_dims[i], size) for i in range(3))
    outputs = _op(*folded, *inputs[3:])
    *_, return_all, _ = inputs
    batches = (1 if return_all else 0, 1, 2, 0)  # which dimension is the batch
    is_there = (True, outputs[1].dim() > 1, outputs[2].dim() > 1, True)  # [0] stands for what is not saved
    results = tuple(
        _pairwise.unfold(output, size, batch) if there else output
        for output, batch, there in zip(outputs, batches, is_there, strict=True)
    )
    return results, tuple(batch if there else None for batch, there in zip(batches, is_there, strict=True))


@torch.library.register_vmap("effops::mean_shift_backward")
def _vmap_backward_rule(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
    size, kappa_dim = info.batch_size, in_dims[4]
    *_, return_all, need_x, need_weights, need_seeds, need_kappa = inputs
    if _vmap.must_loop(size, kappa_dim) or need_kappa:  # the gradient of kappa is a sum over the batch
        return _vmap.loop(_backward_op, inputs, in_dims, size)
    # grad_output, x, weights, seeds, kappa (shared), iterates, sums, steps
    batches = (1 if return_all else 0, 0, 0, 0, None, 1, 2, 0)
    folded = (
        value if batch is None else _pairwise.fold(value, in_dim, size, batch)
        for value, in_dim, batch in zip(inputs[:8], in_dims[:8], batches, strict=True)
    )
    gradients = _backward_op(*folded, *inputs[8:])
    needs = (need_x, need_weights, need_seeds, False)
    results = tuple(
        _pairwise.unfold(gradient, size) if need else gradient
        for gradient, need in zip(gradients, needs, strict=True)
    )
    return results, tuple(0 if need else None for need in needs)


# ------------------------------------------------------------------------------------------ FLOPs


def _rows(seeds: Any) -> int | None:
    return None if seeds is None else seeds[1]


@register_flop_formula(torch.ops.effops.mean_shift)
def _flops(
    x: Any,
    weights: Any,
    seeds: Any,
    kappa_tensor: Any,
    kappa: float,
    eta: float,
    iterations: int,
    *settings: Any,
    out_shape: Any = None,
    **_: Any,
) -> int:
    """Two multiply-adds per iteration and channel of every pair: for the kernel and for the sum."""
    return iterations * _pairwise.pair_flops(4, x, _rows(seeds))


@register_flop_formula(torch.ops.effops.mean_shift_backward)
def _backward_flops(
    grad_output: Any,
    x: Any,
    weights: Any,
    seeds: Any,
    kappa_tensor: Any,
    iterates: Any,
    *others: Any,
    **_: Any,
) -> int:
    """Five: two products of rows, the kernel's and its gradient's, and three sums."""
    return (iterates[0] - 1) * _pairwise.pair_flops(10, x, _rows(seeds))
