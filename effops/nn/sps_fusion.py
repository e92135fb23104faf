"""The processing module of EffSeg: the semantic fusion module on an SPS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from effops._sps import SPS
from effops.nn.sps_conv2d import SPSConv2d, with_active
from effops.ops.sps_conv2d import sps_conv2d

_NAME = "SPSFusion"


class SPSFusion(nn.Module):
    """Mixes the active cells of an SPS with their surroundings at several distances.

        a <- relu(Linear(a))                                        active features only
        a <- sum over dilations d of relu(SPSConv_d(a, passive))    in one pass over the neighbours
        a <- relu(Linear(relu(Linear(a))))

    All layers keep the width F. The first linear layer is applied to the active features alone, as in the
    author's code: the convolutions mix active features behind it with passive ones that have not seen it.
    For F = 128, 64 and 32, the stages of EffSeg, the three modules have 646,464 parameters.

    Args:
        channels: features F of the SPS.
        dilations: of the parallel convolutions.
        kernel_size: odd.
        device, dtype: of the parameters.

    Raises:
        ValueError: a size below 1, an even kernel size, no dilation.

    Source: C. Picron, PhD thesis, section 5.3, after Zhang et al., "RefineMask", CVPR 2021.
    """

    def __init__(
        self,
        channels: int,
        dilations: Sequence[int] = (1, 3, 5),
        kernel_size: int = 3,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"{_NAME}: expected channels of at least 1, got {channels}")
        if len(dilations) == 0:
            raise ValueError(f"{_NAME}: expected at least one of dilations, got none")
        self.channels = channels
        self.dilations = tuple(dilations)
        self.input_proj = nn.Linear(channels, channels, device=device, dtype=dtype)
        self.convs = nn.ModuleList(
            SPSConv2d(channels, channels, kernel_size, d, activation="relu", device=device, dtype=dtype)
            for d in self.dilations
        )
        self.output_proj = nn.Sequential(
            nn.Linear(channels, channels, device=device, dtype=dtype),
            nn.ReLU(),
            nn.Linear(channels, channels, device=device, dtype=dtype),
            nn.ReLU(),
        )

    def reset_parameters(self) -> None:
        """Initialise all parameters as torch.nn.Linear and torch.nn.Conv2d do."""
        for layer in (self.input_proj, *self.convs, self.output_proj[0], self.output_proj[2]):
            layer.reset_parameters()

    def forward(self, sps: SPS) -> SPS:
        """The SPS with new active features; all else is shared with the one given.

        Args:
            sps: of ``channels`` features.

        Returns:
            Active features [NA, channels]. Under autocast the passive features get their dtype, too.

        Raises:
            ValueError, TypeError: as :func:`effops.ops.sps_conv2d`.
        """
        convs: Any = self.convs  # a ModuleList has items of no type
        sps = with_active(sps, functional.relu(self.input_proj(sps.active)))
        fused = sps_conv2d(
            sps.active,
            sps.passive,
            sps.index_map,
            sps.roi,
            sps.xy,
            [conv.weight for conv in convs],
            [conv.bias for conv in convs],
            self.dilations,
            "relu",
        )
        return with_active(sps, self.output_proj(fused))

    def extra_repr(self) -> str:
        return f"channels={self.channels}, dilations={self.dilations}"
