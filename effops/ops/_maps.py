"""New maps [N, C, H, W] in the memory format of others, as csrc/common/maps.h makes them."""

from collections.abc import Sequence

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether results beside the maps x are channels_last: x is, and is not contiguous at the same time."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def new_maps(x: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised maps on the device and in the memory format of x, and in its dtype if none is named."""
    memory_format = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=memory_format)


def gradient_of(x: Tensor, needed: bool) -> Tensor:
    """Uninitialised: the gradient of x, or what stands for one that is not needed."""
    return new_maps(x, x.shape) if needed else x.new_empty((0,))
