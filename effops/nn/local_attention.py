"""Attention of every pixel to the window around it, as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effops.ops._checks import number_of
from effops.ops._localfilter import BORDERS, check_factor
from effops.ops.local_attention import local_attention

_NAME = "LocalAttention2d"


class LocalAttention2d(nn.Module):
    """Multi-head attention of every pixel to the window x window pixels around it.

        out = W_o concat over heads of  local_attention(W_q x, W_k context, W_v context)

    with 1 x 1 convolutions, and :func:`effops.ops.local_attention` between the channels of each head, scaled
    by (channels of a head) ** -0.5. With a context of another task, the local context block of ATRC.

    Args:
        channels: of x.
        window: K, the side of the window in taps.
        key_channels: of queries and keys, all heads together; None: ``channels``.
        out_channels: of values and of the output; None: ``channels``.
        context_channels: of the context; None: ``channels``.
        num_heads: divides ``key_channels`` and ``out_channels``.
        dilation: pixels from tap to tap.
        border: ``"mask"`` (pixels outside take no part) or ``"zero"`` (they take part with similarity 0 and
            value 0, as in ATRC's code).
        bias: whether the convolutions have one.
        device, dtype: of the parameters.

    Raises:
        ValueError: a number below 1, channels that are not a multiple of the heads, an unknown border.
        TypeError: a number that is no integer.

    Source: Brüggemann et al., "Exploring Relational Context for Multi-Task Dense Prediction", ICCV 2021,
    section 3.2.2.
    """

    def __init__(
        self,
        channels: int,
        window: int = 9,
        *,
        key_channels: int | None = None,
        out_channels: int | None = None,
        context_channels: int | None = None,
        num_heads: int = 1,
        dilation: int = 1,
        border: str = "mask",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "channels": channels,
            "window": window,
            "key_channels": channels if key_channels is None else key_channels,
            "out_channels": channels if out_channels is None else out_channels,
            "context_channels": channels if context_channels is None else context_channels,
            "num_heads": num_heads,
            "dilation": dilation,
        }
        for name, size in sizes.items():
            check_factor(_NAME, name, size)
        for name in ("key_channels", "out_channels"):
            if sizes[name] % num_heads != 0:
                raise ValueError(
                    f"{_NAME}: expected {name} to be a multiple of num_heads={num_heads}, got {sizes[name]}"
                )
        number_of(_NAME, "border", BORDERS, border)
        self.channels = channels
        self.window = window
        self.key_channels = sizes["key_channels"]
        self.out_channels = sizes["out_channels"]
        self.context_channels = sizes["context_channels"]
        self.num_heads = num_heads
        self.dilation = dilation
        self.border = border

        def projection(inputs: int, outputs: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, 1, bias=bias, device=device, dtype=dtype)

        self.q_proj = projection(channels, self.key_channels)
        self.k_proj = projection(self.context_channels, self.key_channels)
        self.v_proj = projection(self.context_channels, self.out_channels)
        self.out_proj = projection(self.out_channels, self.out_channels)

    def forward(
        self,
        x: Tensor,  # [N, channels, H, W]
        context: Tensor | None = None,  # [N, context_channels, H, W]
    ) -> Tensor:  # [N, out_channels, H, W]
        """Attend from x to the context, or to x itself.

        Raises:
            ValueError: shapes that do not fit together or the module; no context where its channels are not
                those of x.
        """
        source = x if context is None else context
        self._check_inputs(x, source, "x" if context is None else "context")
        q, k, v = self.q_proj(x), self.k_proj(source), self.v_proj(source)
        if self.num_heads > 1:
            q, k, v = (maps.unflatten(1, (self.num_heads, -1)).flatten(0, 1) for maps in (q, k, v))
        mixed = local_attention(q, k, v, self.window, self.dilation, border=self.border)
        if self.num_heads > 1:
            mixed = mixed.unflatten(0, (x.shape[0], self.num_heads)).flatten(1, 2)
        output: Tensor = self.out_proj(mixed)
        return output

    def _check_inputs(self, x: Tensor, source: Tensor, source_name: str) -> None:
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"{_NAME}: expected x of shape [N, {self.channels}, H, W], got {list(x.shape)}")
        batch, _, height, width = x.shape
        expected = (batch, self.context_channels, height, width)
        if source.dim() != 4 or any(a != b for a, b in zip(source.shape, expected, strict=True)):
            shape = f"[N={batch}, {self.context_channels}, H={height}, W={width}]"
            raise ValueError(
                f"{_NAME}: expected {source_name} of shape {shape}, got {list(source.shape)}"
                + (" and no context" if source_name == "x" else "")
            )

    def extra_repr(self) -> str:
        return (
            f"window={self.window}, num_heads={self.num_heads}, dilation={self.dilation}, "
            f"border={self.border!r}"
        )
