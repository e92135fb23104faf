"""For tests: a database of all ops with samples, wrong inputs and tolerances, and comparisons with it.

``for info in OP_DB: check_all(info)`` checks an installation. Needs torch alone.
"""

from effops.testing._check import assert_close, check_all, check_forward, check_gradients
from effops.testing._info import ErrorInput, Maker, OpInfo, SampleInput, Tolerance
from effops.testing._layouts import LAYOUTS
from effops.testing.op_db import OP_DB

__all__ = [
    "LAYOUTS",
    "OP_DB",
    "ErrorInput",
    "Maker",
    "OpInfo",
    "SampleInput",
    "Tolerance",
    "assert_close",
    "check_all",
    "check_forward",
    "check_gradients",
]
