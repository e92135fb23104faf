"""effops: operators for efficient vision networks, as real torch ops on CPU and CUDA.

Functions are in :mod:`effops.ops` (and here), modules in :mod:`effops.nn` and :mod:`effops.losses`, the
definitions they are tested against in :mod:`effops.reference`; :mod:`effops.compat` has functions of other
libraries by their names, :mod:`effops.interop` turns results into objects of other libraries.
"""

from effops import compat, interop, losses, nn, ops, reference
from effops._load import build_info, cpu_capability
from effops._mask_plan import MaskPlan
from effops._sps import SPS
from effops._version import __version__
from effops.ops import *  # noqa: F403
from effops.ops import __all__ as _op_names

__all__ = [
    "SPS",
    "MaskPlan",
    "__version__",
    "build_info",
    "compat",
    "cpu_capability",
    "interop",
    "losses",
    "nn",
    "ops",
    "reference",
    *_op_names,
]
