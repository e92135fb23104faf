"""The attention layer of Deformable DETR."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from effops.ops.ms_deform_attn import ms_deform_attn

_NAME = "MultiScaleDeformableAttention"


class MultiScaleDeformableAttention(nn.Module):
    """Each query reads a few points of a pyramid around its reference point.

        out[b, q] = W_o concat over heads m of  sum over l, p of  A[m, l, p] * V_m,l(loc[m, l, p])

    Offsets and weights A (a softmax over the L * P points of a head jointly) are linear in the query,
    V_m,l is map l of head m of the projected value, sampled by :func:`effops.ops.ms_deform_attn`.
    The locations are

        loc = reference + offset / (W_l, H_l)                           reference point (x, y)
        loc = centre + offset / num_points * (w, h) / 2                 reference box (cx, cy, w, h)

    At the start the weights are uniform and the offset of point k = 1 ... num_points of head m is k
    times the direction (cos, sin)(2 pi m / num_heads), scaled to maximum norm 1. With one point and
    eight heads these are the corners and edge midpoints of a reference box.

    Parameter names are those of Deformable DETR, whose checkpoints load unchanged.

    Args:
        embed_dim: channels E of query, value and output.
        num_heads: heads M.
        num_levels: maps L of the pyramid.
        num_points: sampling points P per head and level.
        value_proj_ratio: the value is projected to int(embed_dim * value_proj_ratio) channels.
        device, dtype: of the parameters.

    Raises:
        ValueError: a size below 1; projected channels that are not a multiple of the heads.

    Source: Zhu et al., Deformable DETR, ICLR 2021.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        value_proj_ratio: float = 1.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "embed_dim": embed_dim,
            "num_heads": num_heads,
            "num_levels": num_levels,
            "num_points": num_points,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{_NAME}: expected {name} of at least 1, got {size}")
        value_dim = int(embed_dim * value_proj_ratio)
        if value_dim < 1 or value_dim % num_heads != 0:
            raise ValueError(
                f"{_NAME}: expected int(embed_dim * value_proj_ratio) to be a positive multiple of "
                f"num_heads={num_heads}, got embed_dim={embed_dim}, value_proj_ratio={value_proj_ratio}"
            )
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        self.value_proj_ratio = value_proj_ratio

        points = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(embed_dim, points * 2, device=device, dtype=dtype)
        self.attention_weights = nn.Linear(embed_dim, points, device=device, dtype=dtype)
        self.value_proj = nn.Linear(embed_dim, value_dim, device=device, dtype=dtype)
        self.output_proj = nn.Linear(value_dim, embed_dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters as in Deformable DETR."""
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(self._initial_offsets().flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        spatial_shapes: Tensor | Sequence[Sequence[int]],
        level_start_index: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from every query.

        Coordinates are computed in float32 (float64 for float64 parameters), also under autocast. The
        values of `spatial_shapes` are never read back from a GPU.

        Args:
            query: [B, Q, E], positional encoding added.
            reference_points: [B, Q, L, 2] points (x, y) or [B, Q, L, 4] boxes (cx, cy, w, h), 0 and 1
                being the outer edges of the padded map.
            value: [B, S, E], the pixels of all maps.
            spatial_shapes: [L, 2] int64 tensor of (H, W), or a list of pairs.
            level_start_index: [L] int64, the first row of each map in value; None: consecutive maps.
            padding_mask: [B, S] bool, True where a pixel is padding: its projected value is set to 0.

        Returns:
            [B, Q, E]

        Raises:
            ValueError: shapes that do not fit together or the module.
            TypeError: a padding mask that is not bool.
        """
        self._check_inputs(query, reference_points, value, spatial_shapes, padding_mask)
        heads, levels, points = self.num_heads, self.num_levels, self.num_points

        values = self.value_proj(value)
        if padding_mask is not None:
            values = values.masked_fill(padding_mask[..., None], 0.0)
        values = values.unflatten(2, (heads, -1))

        offsets = self.sampling_offsets(query).unflatten(2, (heads, levels, points, 2))
        logits = self.attention_weights(query).unflatten(2, (heads, levels * points))
        weights = logits.softmax(-1).unflatten(3, (levels, points))
        locations = self._locations(reference_points, offsets, spatial_shapes)

        sampled = ms_deform_attn(values, spatial_shapes, level_start_index, locations, weights)
        output: Tensor = self.output_proj(sampled)
        return output

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_levels={self.num_levels}, "
            f"num_points={self.num_points}, value_proj_ratio={self.value_proj_ratio}"
        )

    def _initial_offsets(self) -> Tensor:
        """[M, L, P, 2]: point k of head m at k times the direction of the head."""
        angle = torch.arange(self.num_heads, dtype=torch.float64) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        direction = direction.round(decimals=12)  # cos(pi / 2) is 6e-17: make axes and diagonals exact
        step = torch.arange(1, self.num_points + 1, dtype=torch.float64)
        offsets = direction[:, None, None, :] * step[:, None]
        return offsets.expand(-1, self.num_levels, -1, -1)

    def _locations(
        self,
        reference_points: Tensor,
        offsets: Tensor,
        spatial_shapes: Tensor | Sequence[Sequence[int]],
    ) -> Tensor:
        """Normalised sampling locations [B, Q, M, L, P, 2], at least float32."""
        dtype = torch.promote_types(offsets.dtype, torch.float32)
        offsets = offsets.to(dtype)
        reference = reference_points.to(dtype)[:, :, None, :, None, :]
        if reference_points.shape[-1] == 2:
            return reference + offsets / _map_sizes(spatial_shapes, offsets)[:, None, :]
        return reference[..., :2] + offsets / self.num_points * reference[..., 2:] * 0.5

    def _check_inputs(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        spatial_shapes: Tensor | Sequence[Sequence[int]],
        padding_mask: Tensor | None,
    ) -> None:
        if query.dim() != 3 or query.shape[2] != self.embed_dim:
            _wrong_shape("query", f"[B, Q, E={self.embed_dim}]", query)
        batch, queries, _ = query.shape
        if value.dim() != 3 or value.shape[0] != batch or value.shape[2] != self.embed_dim:
            _wrong_shape("value", f"[B={batch}, S, E={self.embed_dim}]", value)
        frame = tuple(reference_points.shape)
        if frame[:-1] != (batch, queries, self.num_levels) or frame[-1] not in (2, 4):
            _wrong_shape(
                "reference_points", f"[B={batch}, Q={queries}, L={self.num_levels}, 2 or 4]", reference_points
            )
        if len(spatial_shapes) != self.num_levels:
            raise ValueError(
                f"{_NAME}: expected spatial_shapes of {self.num_levels} levels, got {len(spatial_shapes)}"
            )
        if padding_mask is None:
            return
        if padding_mask.dtype != torch.bool:
            raise TypeError(f"{_NAME}: expected padding_mask of dtype torch.bool, got {padding_mask.dtype}")
        if padding_mask.shape != value.shape[:2]:
            _wrong_shape("padding_mask", f"[B={batch}, S={value.shape[1]}]", padding_mask)


def _map_sizes(spatial_shapes: Tensor | Sequence[Sequence[int]], like: Tensor) -> Tensor:
    """(W, H) of every level, [L, 2], in the dtype and on the device of `like`.

    Numbers on the host are passed as scalars of fill kernels: a copy to the GPU would synchronise.
    """
    if isinstance(spatial_shapes, Tensor) and spatial_shapes.device == like.device:
        return spatial_shapes.flip(1).to(like.dtype)
    sizes = like.new_empty(len(spatial_shapes), 2)
    for level, (height, width) in enumerate(spatial_shapes):
        sizes[level, 0].fill_(width)
        sizes[level, 1].fill_(height)
    return sizes


def _wrong_shape(name: str, expected: str, tensor: Tensor) -> None:
    raise ValueError(f"{_NAME}: expected {name} of shape {expected}, got {list(tensor.shape)}")
