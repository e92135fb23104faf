"""Convolution of an SPS at its active cells."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effops.ops import _autocast, _autograd, _rowconv, _sps, _vmap
from effops.ops._checks import ShapeChecker, check_backend, check_integer, explain

_NAME = "sps_conv2d"
_op = torch.ops.effops.sps_conv2d.default
_backward_op = torch.ops.effops.sps_conv2d_backward.default

_RELU = 1  # in the schema, where None is 0


def sps_conv2d(
    active: Tensor,  # [NA, F]
    passive: Tensor,  # [NP, F]
    index_map: Tensor,  # [R, H, W]
    roi: Tensor,  # [NA]
    xy: Tensor,  # [NA, 2]
    weight: Tensor | Sequence[Tensor],  # [O, F / groups, k, k], or D of them
    bias: Tensor | Sequence[Tensor] | None = None,  # [O], or D of them
    dilation: int | Sequence[int] = 1,
    activation: str | None = None,
    groups: int = 1,
) -> Tensor:  # [NA, O]
    r"""New features for the active cells of an SPS, computed from everything around them in their map.

    .. math::
        out[i] = \sum_d act\Big(b_d + \sum_{u, v} W_d[:, :, u, v] \, f(x_i + d\,v,\; y_i + d\,u)\Big), \qquad
        f(x, y) = cat([active, passive])[index\_map[roi_i, y, x]]

    with u and v from -(k - 1) / 2 to (k - 1) / 2, the weights indexed from their centre: cross-correlation,
    as in :func:`torch.nn.functional.conv2d`, and the same numbers as a dense convolution with zero padding at
    the active cells. Passive cells contribute in full, with the features that they have; cells outside the
    map are left out of the sum (the padding is never multiplied, so that an infinite weight does no harm).
    Without lists there is one dilation d; with lists the branches are computed in one pass, and the
    activation precedes their sum (the three dilations of the semantic fusion module).

    Args:
        active, passive, index_map, roi, xy: The fields of an :class:`effops.SPS` of R maps of H x W cells
            with F features in float32, float64, bfloat16 or float16.
        weight: [O, F / groups, k, k], k odd; or a list of D >= 1 of them, which may differ in k.
        bias: [O], or a list of D beside a list of weights; None for no bias.
        dilation: At least 1; or a list of D beside a list of weights.
        activation: None or ``"relu"``; relu(NaN) is NaN, and the gradient at 0 is 0.
        groups: Blocks of channels that are convolved separately; divides F and O.

    Returns:
        [NA, O], contiguous, in the dtype of the features; computed in float32 (float64 for float64) and
        rounded once.

    Raises:
        ValueError: wrong ranks or sizes, an even k, lists of different lengths, a dilation below 1, another
            activation, groups that do not divide the channels, tensors on different devices, and on the CPU
            an id, a map or a cell that is out of range. CUDA kernels skip such an id (the host
            never waits for them).
        TypeError: wrong dtypes, or an argument of another kind.
        RuntimeError: no kernels for the device in this installation.

    Differentiable in ``active``, ``passive``, ``weight`` and ``bias``, once; for that a bit per branch and
    output is kept of the activation. Deterministic on the CPU for any number of threads; on CUDA under
    ``torch.use_deterministic_algorithms(True)``. vmap may batch every tensor (with weights or biases of
    their own, a loop over its members). ``torch.func.grad`` is not supported.

    Source: C. Picron, PhD thesis, section 5.3.2.
    """
    weights, biases, dilations = _branches(weight, bias, dilation)
    if activation is not None and activation != "relu":
        raise ValueError(f'{_NAME}: expected activation None or "relu", got {activation!r}')
    settings = (dilations, 0 if activation is None else _RELU, groups)
    try:
        return _op(active, passive, index_map, roi, xy, weights, biases, *settings)[0]
    except (RuntimeError, TypeError) as error:
        inputs = (active, passive, index_map, roi, xy, weights, biases, *settings)
        return explain(_NAME, error, lambda: _check(*inputs))


def _branches(
    weight: Tensor | Sequence[Tensor], bias: Tensor | Sequence[Tensor] | None, dilation: int | Sequence[int]
) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """The weights, the biases (none: an empty list) and the dilations of all branches."""
    if isinstance(weight, Tensor):
        if bias is not None and not isinstance(bias, Tensor):
            kind = type(bias).__name__
            raise TypeError(f"{_NAME}: expected bias to be a Tensor, as weight is one, got {kind}")
        if not isinstance(dilation, (int, torch.SymInt)):
            kind = type(dilation).__name__
            raise TypeError(f"{_NAME}: expected dilation of type int beside a single weight, got {kind}")
        return [weight], [] if bias is None else [bias], [dilation]
    for argument, value in (("weight", weight), ("bias", bias), ("dilation", dilation)):
        if not isinstance(value, (list, tuple)) and not (argument == "bias" and value is None):
            kind = type(value).__name__
            expected = "a Tensor or a list of Tensors" if argument == "weight" else "a list beside weights"
            raise TypeError(f"{_NAME}: expected {argument} to be {expected}, got {kind}")
    weights, dilations = list(weight), list(dilation)  # type: ignore[arg-type]
    if bias is None:
        return weights, [], dilations
    biases = list(bias)
    if len(biases) != len(weights):
        raise ValueError(f"{_NAME}: expected one bias per weight ({len(weights)}), got {len(biases)}")
    return weights, biases, dilations


def _check(
    active: Tensor,
    passive: Tensor,
    index_map: Tensor,
    roi: Tensor,
    xy: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    dilation: Sequence[int],
    activation: int,
    groups: int,
) -> ShapeChecker:
    """The metadata checks of csrc/rowconv/sps_conv2d.h."""
    check = ShapeChecker(_NAME)
    _sps.check_sps(check, active, passive, index_map, roi, xy)
    if len(weight) == 0:
        raise ValueError(f"{_NAME}: expected at least one weight, got none")
    check.tensor("weight[0]", weight[0])
    outputs = weight[0].shape[0] if weight[0].dim() == 4 else 0
    _rowconv.check_groups(_NAME, groups, check.sizes["F"], outputs)
    check.sizes["C"] = check.sizes["F"] // groups
    for d, branch in enumerate(weight):
        check.sizes.pop("k", None)  # may differ between branches
        check.match(f"weight[{d}]", branch, "OCkk")
        check.dtype(f"weight[{d}]", branch, active.dtype)
        check.device(f"weight[{d}]", branch, "active", active)
        if branch.shape[-1] % 2 == 0:
            shape = list(branch.shape)
            raise ValueError(f"{_NAME}: expected weight[{d}] with an odd kernel size, got {shape}")
    if len(bias) not in (0, len(weight)):
        raise ValueError(f"{_NAME}: expected one bias per weight ({len(weight)}), got {len(bias)}")
    for d, branch in enumerate(bias):
        check.match(f"bias[{d}]", branch, "O")
        check.dtype(f"bias[{d}]", branch, active.dtype)
        check.device(f"bias[{d}]", branch, "active", active)
    if len(dilation) != len(weight):
        raise ValueError(f"{_NAME}: expected one dilation per weight ({len(weight)}), got {len(dilation)}")
    for branch, rate in zip(weight, dilation, strict=True):
        check_integer(_NAME, "dilation", rate)
        _rowconv.check_dilation(_NAME, "dilation", rate, branch.shape[-1], least=1)
    check_backend(_NAME, active)
    return check


# ------------------------------------------------------------------------------------------ fake


@torch.library.register_fake("effops::sps_conv2d")
def _fake(
    active: Tensor,
    passive: Tensor,
    index_map: Tensor,
    roi: Tensor,
    xy: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    dilation: Sequence[int],
    activation: int,
    groups: int,
) -> tuple[Tensor, Tensor]:
    settings = (dilation, activation, groups)
    sizes = _check(active, passive, index_map, roi, xy, weight, bias, *settings).sizes
    rows, outputs = sizes["A"], sizes["O"]
    sign_maps = len(weight) if activation == _RELU else 0
    signs = active.new_empty((sign_maps, rows, (outputs + 7) // 8), dtype=torch.uint8)
    return active.new_empty((rows, outputs)), signs


@torch.library.register_fake("effops::sps_conv2d_backward")
def _fake_backward(
    grad_output: Tensor,
    signs: Tensor,
    active: Tensor,
    passive: Tensor,
    index_map: Tensor,
    roi: Tensor,
    xy: Tensor,
    weight: Sequence[Tensor],
    dilation: Sequence[int],
    activation: int,
    groups: int,
    need_active: bool,
    need_passive: bool,
    need_weight: bool,
    need_bias: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    return (
        active.new_empty(active.shape if need_active else (0,)),
        passive.new_empty(passive.shape if need_passive else (0,)),
        [branch.new_empty(branch.shape if need_weight else (0,)) for branch in weight],
        [branch.new_empty((branch.shape[0],)) for branch in weight] if need_bias else [],
    )


# ------------------------------------------------------------------------------------------ autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *fields, weight, bias, dilation, activation, groups = inputs
    ctx.set_materialize_grads(False)  # the signs have none
    ctx.settings = dilation, activation, groups
    ctx.save_for_backward(output[1], *fields, *weight)


def _backward(ctx: Any, grad_output: Tensor | None, _: None) -> tuple[Any, ...]:
    signs, active, passive, index_map, roi, xy, *weight = ctx.saved_tensors
    need_active, need_passive, _, _, _, need_weights, need_biases, *_ = ctx.needs_input_grad
    if grad_output is None:
        return *(None,) * 5, [None] * len(need_weights), [None] * len(need_biases), *(None,) * 3
    needs = need_active, need_passive, any(need_weights), any(need_biases)
    deterministic = torch.are_deterministic_algorithms_enabled()
    fields = (active, passive, index_map, roi, xy)
    grad_active, grad_passive, grad_weight, grad_bias = _backward_op(
        grad_output, signs, *fields, weight, *ctx.settings, *needs, deterministic
    )
    if not any(need_biases):
        grad_bias = [None] * len(need_biases)
    return (
        grad_active if need_active else None,
        grad_passive if need_passive else None,
        None,
        None,
        None,
        [gradient if need else None for gradient, need in zip(grad_weight, need_weights, strict=True)],
        [gradient if need else None for gradient, need in zip(grad_bias, need_biases, strict=True)],
        None,
        None,
        None,
    )


torch.library.register_autograd("effops::sps_conv2d", _backward, setup_context=_save)
_autograd.refuse_second_derivatives_of_lists(_NAME)

# ------------------------------------------------------------------------------------------ autocast

_autocast.install(
    _NAME, (*_sps.AUTOCAST, _autocast.CAST, _autocast.CAST, _autocast.KEEP, _autocast.KEEP, _autocast.KEEP)
)

# ------------------------------------------------------------------------------------------ vmap


@torch.library.register_vmap("effops::sps_conv2d")
def _vmap_rule(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
    size = info.batch_size
    fields, (weight, bias, *settings) = inputs[:5], inputs[5:]
    if _vmap.must_loop(size, *in_dims[5], *in_dims[6]):
        return _vmap.loop(_op, inputs, in_dims, size)
    output, signs = _op(*_sps.fold_sps(fields, in_dims[:5], size), weight, bias, *settings)
    return (_vmap.unfold(output, size), _rowconv.unfold_dim(signs, 1, size)), (0, 1)


def _vmap_backward_rule(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
    size = info.batch_size
    grad_output, signs, *fields = inputs[:7]
    weight, *settings = inputs[7:]
    needs = inputs[11:15]
    if any(needs[2:]) or _vmap.must_loop(size, *in_dims[7]):
        return _vmap.loop(_backward_op, inputs, in_dims, size)
    grad = _vmap.fold(grad_output, in_dims[0], size)
    folded_signs = _vmap.move_to_front(signs, in_dims[1], size).movedim(0, 1).flatten(1, 2)
    folded = _sps.fold_sps(fields, in_dims[2:7], size)
    *gradients, grad_weight, grad_bias = _backward_op(grad, folded_signs, *folded, weight, *settings)
    unfolded, out_dims = _sps.unfold_gradients(gradients, needs[:2], size)
    return (*unfolded, grad_weight, grad_bias), (*out_dims, [None] * len(weight), [])


torch.library.register_vmap("effops::sps_conv2d_backward", _vmap_backward_rule)
_vmap.support_batched_gradients(_NAME, _vmap_backward_rule)

# ------------------------------------------------------------------------------------------ FLOPs


@register_flop_formula(torch.ops.effops.sps_conv2d)
def _flops(
    active: Any, passive: Any, index_map: Any, roi: Any, xy: Any, weight: Any, *args: Any, **_: Any
) -> int:
    """A multiply-add per active row and element of the weights; taps outside the map are counted."""
    return sum(_rowconv.product_flops(branch, active[0]) for branch in weight)


@register_flop_formula(torch.ops.effops.sps_conv2d_backward)
def _backward_flops(grad_output: Any, signs: Any, *args: Any, **_: Any) -> int:
    """The same for the features, active and passive together, and again for the weights."""
    weight, needs = args[5], args[9:12]
    products = int(needs[0] or needs[1]) + int(needs[2])
    return products * sum(_rowconv.product_flops(branch, grad_output[0]) for branch in weight)
