"""Per-pixel filters as a module."""

from __future__ import annotations

from torch import Tensor, nn

from effops.ops._checks import number_of
from effops.ops._localfilter import NORMALIZE, PADDING_MODES, check_factor
from effops.ops.filter_flow import filter_flow

_NAME = "FilterFlow"


class FilterFlow(nn.Module):
    """Applies K x K filters of their own to every pixel: :func:`effops.ops.filter_flow` with fixed settings.

    The filters come from a network, as the channels of its last convolution; with ``normalize="softmax"`` as
    logits.

    Args:
        normalize: ``"softmax"``, ``"none"`` or ``"sum"``.
        padding_mode: ``"zeros"``, ``"replicate"``, ``"reflect"`` or ``"renormalize"``.
        return_flow: whether to return the expected flow too.
        stride: pixels from window to window.
        upsample: windows per pixel and direction; beside a stride of 1 only.
        dilation: pixels from tap to tap.
        groups: blocks of channels with filters of their own.

    Raises:
        ValueError: an unknown option, a number below 1, a stride and an upsampling factor above 1.
        TypeError: a number that is no integer.

    Source: S. Kong, PhD thesis, chapters 6 and 7 (predictive filter flow).
    """

    def __init__(
        self,
        normalize: str = "softmax",
        padding_mode: str = "zeros",
        return_flow: bool = False,
        *,
        stride: int = 1,
        upsample: int = 1,
        dilation: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        number_of(_NAME, "normalize", NORMALIZE, normalize)
        number_of(_NAME, "padding_mode", PADDING_MODES, padding_mode)
        numbers = {"stride": stride, "upsample": upsample, "dilation": dilation, "groups": groups}
        for name, value in numbers.items():
            check_factor(_NAME, name, value)
        if stride > 1 and upsample > 1:
            raise ValueError(f"{_NAME}: expected stride or upsample to be 1, got {stride} and {upsample}")
        self.normalize = normalize
        self.padding_mode = padding_mode
        self.return_flow = return_flow
        self.stride = stride
        self.upsample = upsample
        self.dilation = dilation
        self.groups = groups

    def forward(
        self,
        image: Tensor,  # [N, C, H, W]
        filters: Tensor,  # [N, groups * K * K, Ho, Wo]
    ) -> Tensor | tuple[Tensor, Tensor]:  # [N, C, Ho, Wo]; [N, 2 * groups, Ho, Wo]
        """The filtered image, or that and the expected flow, (dx, dy) in pixels for each group."""
        return filter_flow(
            image,
            filters,
            self.normalize,
            self.padding_mode,
            self.return_flow,
            stride=self.stride,
            upsample=self.upsample,
            dilation=self.dilation,
            groups=self.groups,
        )

    def extra_repr(self) -> str:
        settings = [f"normalize={self.normalize!r}", f"padding_mode={self.padding_mode!r}"]
        if self.return_flow:
            settings.append("return_flow=True")
        numbers = ("stride", "upsample", "dilation", "groups")
        settings += [f"{name}={getattr(self, name)}" for name in numbers if getattr(self, name) != 1]
        return ", ".join(settings)
