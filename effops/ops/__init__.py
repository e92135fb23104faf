"""The operators, one file each. See the docstring of each function for its formula and its source."""

from effops import _load  # noqa: F401  the native libraries register the schemas that the ops build on
from effops.ops.ms_deform_attn import ms_deform_attn
from effops.ops.point_sample import point_sample
from effops.ops.roi_align import roi_align

__all__ = ["ms_deform_attn", "point_sample", "roi_align"]
