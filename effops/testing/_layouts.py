"""The same numbers in other places of memory."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor


def _poison(tensor: Tensor, *shape: int) -> Tensor:
    """Memory around the tensor's elements, filled with what must not be read."""
    if tensor.is_floating_point():
        return tensor.new_full(shape, float("nan"))
    return torch.full_like(tensor, 1, memory_format=torch.contiguous_format).new_full(
        shape, True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max
    )


def permuted(tensor: Tensor) -> Tensor:
    """Dimensions in reverse order in memory."""
    order = tuple(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order)


def sliced(tensor: Tensor) -> Tensor:
    """Every second element of every dimension of a larger tensor, from the second on."""
    view = _poison(tensor, *(2 * size + 1 for size in tensor.shape))
    for dim in range(tensor.dim()):
        view = view.narrow(dim, 1, view.shape[dim] - 1)[(slice(None),) * dim + (slice(None, None, 2),)]
    return view.copy_(tensor)


def padded(tensor: Tensor) -> Tensor:
    """The last dimension is the beginning of a longer one, as in ``x[..., :D]``."""
    if tensor.dim() == 0:
        return tensor
    return _poison(tensor, *tensor.shape[:-1], tensor.shape[-1] + 3)[..., : tensor.shape[-1]].copy_(tensor)


def offset(tensor: Tensor) -> Tensor:
    """Contiguous, but aligned to no more than an element, within a longer storage."""
    return _poison(tensor, tensor.numel() + 8)[3 : 3 + tensor.numel()].view(tensor.shape).copy_(tensor)


def channels_last(tensor: Tensor) -> Tensor:
    """The second dimension is the innermost in memory."""
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if tensor.dim() > 2 else tensor


def negated(tensor: Tensor) -> Tensor:
    """A lazily negated view (``Tensor.is_neg``), where the dtype can have one."""
    if tensor.dtype not in (torch.float32, torch.float64):
        return tensor
    return torch.complex(torch.zeros_like(tensor), -tensor).conj().imag


def expanded_first(tensor: Tensor) -> Tensor:
    """The first element of the first dimension, repeated with stride 0."""
    if tensor.dim() == 0 or tensor.shape[0] == 0:
        return tensor
    return tensor[:1].clone().expand(tensor.shape)


def expanded_last(tensor: Tensor) -> Tensor:
    """The first element of the last dimension, repeated with stride 0."""
    if tensor.dim() == 0 or tensor.shape[-1] == 0:
        return tensor
    return tensor[..., :1].clone().expand(tensor.shape)


#: Layouts by name. All keep the tensor's numbers except those in STRIDE_ZERO.
LAYOUTS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        layout.__name__: layout
        for layout in (
            permuted,
            sliced,
            padded,
            offset,
            channels_last,
            negated,
            expanded_first,
            expanded_last,
        )
    }
)
STRIDE_ZERO = ("expanded_first", "expanded_last")
