"""Multi-scale deformable attention: the definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effops.reference._bilinear import (
    check_floating,
    check_shape,
    compute_dtype,
    is_active,
    sample,
    to_pixels,
)

_OP = "ms_deform_attn"
_NO_SHAPES = torch.zeros(0, 2, dtype=torch.int64)  # what an empty list stands for


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor | Sequence[Sequence[int]],
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Weighted sum of bilinear samples of a pyramid, per query and head.

        out[b, q, m] = sum over l, p of  attention_weights[b, q, m, l, p] * v_l(x, y)
        x = loc_x * W_l - 0.5,  y = loc_y * H_l - 0.5,  (loc_x, loc_y) = sampling_locations[b, q, m, l, p]

    v_l interpolates map l of value[b, :, m] bilinearly, with 0 outside the map (align_corners=False).
    A point is active iff -1 < x < W_l and -1 < y < H_l. Any other point, among them those with a NaN
    or infinite coordinate, adds 0 and gives gradient 0 to its location and to its weight.

    Pixel (x, y) of map l is row start_l + y * W_l + x of value. Starts may be in any order, and maps
    may overlap.

    Args:
        value: [B, S, M, D], S rows of M heads with D channels each.
        spatial_shapes: [L, 2] int64 tensor of (H, W) in pixels, or a list of pairs.
        level_start_index: [L] int64, the first row of each map; None: consecutive maps.
        sampling_locations: [B, Q, M, L, P, 2], (x, y), 0 and 1 being the outer edges of the map.
        attention_weights: [B, Q, M, L, P], used as given.

    Returns:
        [B, Q, M * D], dtype of value. Computed in the promoted dtype of the inputs, at least float32
        (float32 locations beside half values lose nothing), and rounded once.

    Raises:
        ValueError: shapes that do not fit together; a level with H <= 0, W <= 0, start < 0 or
            start + H * W > S.
        TypeError: values, locations or weights that are not floating point; metadata that is not int64.

    Source: Zhu et al., Deformable DETR, ICLR 2021, equation 3.
    """
    for name, tensor in (
        ("value", value),
        ("sampling_locations", sampling_locations),
        ("attention_weights", attention_weights),
    ):
        check_floating(_OP, name, tensor)
    check_shape(_OP, "value", value, "BSMD", (None, None, None, None))
    levels = _level_table(spatial_shapes, level_start_index, value.shape[1])
    batch, _, heads, _ = value.shape
    expected = (batch, None, heads, len(levels), None)
    check_shape(_OP, "attention_weights", attention_weights, "BQMLP", expected)
    points = attention_weights.shape
    check_shape(_OP, "sampling_locations", sampling_locations, "BQMLPX", (*points, 2))

    dtype = compute_dtype(value, sampling_locations, attention_weights)
    height, width, start = levels.to(value.device)[:, :, None].unbind(1)  # each [L, 1]
    x, y = to_pixels(sampling_locations.to(dtype), height, width)
    active = is_active(x, y, height, width)

    values = value.to(dtype)
    image = torch.arange(batch, device=value.device)[:, None, None, None, None]
    head = torch.arange(heads, device=value.device)[:, None, None]
    sampled = sample(lambda pixel: values[image, start + pixel, head], x, y, height, width, active)

    weights = torch.where(active, attention_weights.to(dtype), 0.0)
    return (weights[..., None] * sampled).sum((3, 4)).flatten(2).to(value.dtype)


def _level_table(
    spatial_shapes: Tensor | Sequence[Sequence[int]],
    level_start_index: Tensor | None,
    rows: int,
) -> Tensor:
    """(H, W, start) of each level, [L, 3] int64 on the CPU; every level lies within the rows."""
    if not isinstance(spatial_shapes, Tensor):
        spatial_shapes = torch.tensor(spatial_shapes) if spatial_shapes else _NO_SHAPES
    shapes = _check_integers("spatial_shapes", spatial_shapes, "LX", (None, 2))
    area = shapes.prod(1)
    starts = area.cumsum(0) - area if level_start_index is None else level_start_index
    starts = _check_integers("level_start_index", starts, "L", (len(shapes),))

    table = torch.cat([shapes, starts[:, None]], dim=1)
    for level, (height, width, start) in enumerate(table.tolist()):
        if height <= 0 or width <= 0 or start < 0 or start + height * width > rows:
            raise ValueError(
                f"{_OP}: expected levels with H > 0, W > 0, start >= 0 and start + H * W <= S={rows}, "
                f"got level {level} with H={height}, W={width}, start={start}"
            )
    return table


def _check_integers(name: str, tensor: Tensor, letters: str, sizes: tuple[int | None, ...]) -> Tensor:
    """Checked metadata, on the CPU."""
    if tensor.dtype != torch.int64:
        raise TypeError(f"{_OP}: expected {name} of dtype torch.int64, got {tensor.dtype}")
    check_shape(_OP, name, tensor, letters, sizes)
    return tensor.cpu()
