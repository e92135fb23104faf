"""Every op defined in pure PyTorch: same names and signatures as `effops.ops`, torch alone.

These functions say what an op computes; they are written to be read, not to be fast. They are
differentiable by autograd, exact to rounding in float64, and need no compiled code.
"""

from effops.reference.ms_deform_attn import ms_deform_attn
from effops.reference.point_sample import point_sample
from effops.reference.roi_align import roi_align

__all__ = ["ms_deform_attn", "point_sample", "roi_align"]
