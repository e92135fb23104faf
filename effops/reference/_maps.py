"""Maps [N, C, H, W] in the memory format of others."""

from __future__ import annotations

import torch
from torch import Tensor


def in_format_of(maps: Tensor, like: Tensor) -> Tensor:
    """Channels_last if `like` is channels_last and not contiguous at the same time, else contiguous."""
    is_channels_last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    memory_format = torch.channels_last if is_channels_last else torch.contiguous_format
    out: Tensor = maps.contiguous(memory_format=memory_format)
    return out
