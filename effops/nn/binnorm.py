"""Binary normalisation as a module."""

from __future__ import annotations

from torch import Tensor, nn

from effops.ops.binnorm import binnorm
from effops.ops.pack_bits import unpack_bits
from effops.ops.topk_pack import topk_pack

_NAME = "BinNorm"


class BinNorm(nn.Module):
    """Rows of k ones: soft while training (:func:`effops.ops.binnorm`), hard in evaluation.

    In evaluation the k largest elements of a row are 1 and all others 0, exactly k of them, with ties to the
    lowest index; no gradient passes. Code that needs the descriptors packed, to store or to match them, calls
    ``effops.topk_pack(x, module.k)`` on the same logits instead: the same bits, in 1/32 of the memory.

    Args:
        k: what each row sums to, 0 or more, at most the length of the rows.

    Raises:
        ValueError: a negative k.
        TypeError: a k that is no integer.

    Source: M. Kanakis, PhD thesis, section 5.3.3; Kanakis et al., "ZippyPoint", CVPR workshops 2023.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"{_NAME}: expected k of type int, got {type(k).__name__}")
        if k < 0:
            raise ValueError(f"{_NAME}: expected k >= 0, got {k}")
        self.k = k

    def forward(
        self,
        x: Tensor,  # [..., M]
    ) -> Tensor:  # [..., M]
        """Numbers in [0, 1] that sum to k in each row of logits; in evaluation 0 and 1, in x's dtype."""
        if self.training:
            return binnorm(x, self.k)
        return unpack_bits(topk_pack(x, self.k), x.shape[-1]).to(x.dtype)

    def extra_repr(self) -> str:
        return f"k={self.k}"
