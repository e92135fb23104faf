"""Convolution of an SPS as a module."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from effops._sps import SPS
from effops.ops.sps_conv2d import sps_conv2d

_NAME = "SPSConv2d"


class SPSConv2d(nn.Module):
    """New features for the active cells of an SPS: :func:`effops.ops.sps_conv2d` with weights of its own.

    What :class:`torch.nn.Conv2d` with ``padding="same"`` computes on the dense maps, at the active cells
    alone. Passive cells take part with the features that they have, and keep them: a layer after this one
    mixes active features that this one has made with passive features that it has not. With ``out_channels``
    other than the width of the passive features the two no longer fit; the caller brings the passive ones to
    the new width (a linear layer on ``sps.passive``, say) before the next op on the SPS.

    Parameters ``weight`` [out_channels, in_channels, kernel_size, kernel_size] and ``bias`` [out_channels]
    are initialised as those of :class:`torch.nn.Conv2d`.

    Args:
        in_channels: features F of the SPS.
        out_channels: new features of the active cells.
        kernel_size: odd.
        dilation: 1 or more.
        bias: whether to add one.
        activation: None or "relu", applied to the result.
        device, dtype: of the parameters.

    Raises:
        ValueError: a size below 1, an even kernel size, an unknown activation.

    Source: C. Picron, PhD thesis, section 5.3.2.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        dilation: int = 1,
        bias: bool = True,
        activation: str | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "kernel_size": kernel_size,
            "dilation": dilation,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{_NAME}: expected {name} of at least 1, got {size}")
        if kernel_size % 2 == 0:
            raise ValueError(f"{_NAME}: expected an odd kernel_size, got {kernel_size}")
        if activation not in (None, "relu"):
            raise ValueError(f'{_NAME}: expected activation None or "relu", got {activation!r}')
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.activation = activation
        shape = (out_channels, in_channels, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias: nn.Parameter | None = nn.Parameter(
                torch.empty(out_channels, device=device, dtype=dtype)
            )
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters as torch.nn.Conv2d does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, sps: SPS) -> SPS:
        """The SPS with new active features; all else is shared with the one given.

        Args:
            sps: of ``in_channels`` features.

        Returns:
            Active features [NA, out_channels]. Under autocast the passive features get their dtype, too.

        Raises:
            ValueError, TypeError: as :func:`effops.ops.sps_conv2d`.
        """
        active = sps_conv2d(
            sps.active,
            sps.passive,
            sps.index_map,
            sps.roi,
            sps.xy,
            self.weight,
            self.bias,
            self.dilation,
            self.activation,
        )
        return with_active(sps, active)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"dilation={self.dilation}, bias={self.bias is not None}, activation={self.activation!r}"
        )


def with_active(sps: SPS, active: Tensor) -> SPS:
    """The SPS with other active features, of whose dtype (autocast changes it) the passive ones become."""
    return SPS(active, sps.passive.to(active.dtype), sps.index_map, sps.roi, sps.xy)
