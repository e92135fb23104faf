"""The list of the positions that a mask keeps."""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effops._mask_plan import MaskPlan
from effops.ops._checks import FLOAT_DTYPES, ShapeChecker, check_backend, explain

_NAME = "plan_mask"
_op = torch.ops.effops.plan_mask.default


def plan_mask(
    mask: Tensor,  # [N, Ho, Wo]
) -> MaskPlan:
    r"""Lists the positions at which a mask is not 0, for all layers that share it.

    .. math::
        positions = \{\, n H_o W_o + y W_o + x \;:\; mask[n, y, x] \ne 0 \,\} \text{ ascending}, \qquad
        positions[rows[n, y, x]] = n H_o W_o + y W_o + x

    :func:`perforated_conv2d` makes such a list anew for each mask tensor; the layers of a block whose outputs
    have one size, and the mask, can share one. A NaN is kept.

    Args:
        mask: [N, Ho, Wo], bool, float32, float64, bfloat16 or float16.

    Returns:
        An :class:`effops.MaskPlan` of the mask itself (not copied; its gradient flows through the plan), the
        K kept positions, [K] int64, and ``rows``, [N, Ho, Wo] int64, -1 where nothing is kept.

    Raises:
        ValueError: a mask that has not three dimensions, and vmap, which is not supported.
        TypeError: wrong dtypes, or an argument that is no tensor.
        RuntimeError: no kernels for the device in this installation.

    The size of the result depends on the data: on CUDA the host waits for it, and ``torch.compile`` needs
    ``torch._dynamo.config.capture_dynamic_output_shape_ops = True`` to keep the op in one graph.
    Deterministic and the same on every device.

    Source: Figurnov et al., "PerforatedCNNs", NIPS 2016; S. Kong, PhD thesis, chapter 4.
    """
    try:
        return MaskPlan(mask, *_op(mask))
    except (RuntimeError, TypeError) as error:
        return explain(_NAME, error, lambda: _check(mask))


def _check(mask: Tensor) -> None:
    """The metadata checks of csrc/rowconv/mask_plan.h."""
    check = ShapeChecker(_NAME)
    check.tensor("mask", mask)
    if mask.dim() != 3:
        raise ValueError(f"{_NAME}: expected mask of shape [N, Ho, Wo], got {list(mask.shape)}")
    check.dtype("mask", mask, torch.bool, *FLOAT_DTYPES)
    check_backend(_NAME, mask)


# ------------------------------------------------------------------------------------------ fake


@torch.library.register_fake("effops::plan_mask")
def _fake(mask: Tensor) -> tuple[Tensor, Tensor]:
    _check(mask)
    count = torch.library.get_ctx().new_dynamic_size()
    positions = mask.new_empty((count,), dtype=torch.int64)
    return positions, mask.new_empty(mask.shape, dtype=torch.int64)


# ------------------------------------------------------------------------------------------ vmap


@torch.library.register_vmap("effops::plan_mask")
def _vmap_rule(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> NoReturn:
    raise ValueError(f"{_NAME}: vmap is not supported: the number of positions depends on the data")


# ------------------------------------------------------------------------------------------ FLOPs


@register_flop_formula(torch.ops.effops.plan_mask)
def _flops(mask: Any, *, out_shape: Any = None, **_: Any) -> int:
    """1 per position, which is compared with 0."""
    images, height, width = mask
    return images * height * width
