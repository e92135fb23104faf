"""RoIAlign as a module."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from effops.ops.roi_align import roi_align

_NAME = "RoIAlign"


class RoIAlign(nn.Module):
    """Average of bilinear samples in each bin of a box: :func:`effops.ops.roi_align` with fixed settings.

    Args:
        output_size: (h, w), the number of bins, or one number for both.
        strides: image pixels per pixel of each map, one number per map.
        sampling_ratio: samples per bin and axis; 0 or less: adaptive.
        aligned: whether pixel centres lie at half-integer coordinates of the image.

    Raises:
        ValueError: an output size below 1, no stride, or one that is not positive and finite.

    Source: He et al., Mask R-CNN, ICCV 2017.
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        strides: Sequence[float],
        sampling_ratio: int = 0,
        aligned: bool = True,
    ) -> None:
        super().__init__()
        height, width = (output_size, output_size) if isinstance(output_size, int) else output_size
        if height < 1 or width < 1:
            raise ValueError(f"{_NAME}: expected output_size of at least 1, got {output_size}")
        if len(strides) == 0 or not all(stride > 0 and math.isfinite(stride) for stride in strides):
            raise ValueError(f"{_NAME}: expected strides that are positive and finite, got {tuple(strides)}")
        self.output_size = (height, width)
        self.strides = tuple(float(stride) for stride in strides)
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(
        self,
        pyramid: Sequence[Tensor],  # L x [B, C, H_l, W_l]
        rois: Tensor,  # [R, 5]
        level: Tensor,  # [R]
    ) -> Tensor:  # [R, C, h, w]
        """One [C, h, w] block per row (image, x1, y1, x2, y2) of ``rois``, from map ``level``."""
        return roi_align(
            pyramid, rois, level, self.output_size, self.sampling_ratio, self.aligned, strides=self.strides
        )

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, strides={self.strides}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}"
        )
