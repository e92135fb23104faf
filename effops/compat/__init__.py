"""Functions of other libraries with their signatures, computed by the ops of `effops.ops`.

Each is one call of :func:`effops.ops.filter_flow`, whose dtypes, devices, gradients and limits it shares
(but :func:`convex_upsample` without a mask, which interpolates); only shapes and settings are checked here.
"""

from effops.compat.carafe import carafe
from effops.compat.convex_upsample import convex_upsample
from effops.compat.involution import involution

__all__ = ["carafe", "convex_upsample", "involution"]
