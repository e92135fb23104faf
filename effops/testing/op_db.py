"""The database of the ops. Every property test in python_tests/ runs over it.

To add an op: write its entry (an :class:`~effops.testing.OpInfo`, with a ``build``, a samples and an errors
function) in the file of its engine, ``effops/testing/_<engine>.py``, and append it to that file's ENTRIES. A
new engine's ENTRIES are added here.
"""

from effops.testing import (
    _binary,
    _binary_hamming,
    _binary_match,
    _localfilter,
    _localfilter_attention,
    _pairwise,
    _pairwise_labels,
    _pairwise_loss,
    _rowconv,
    _rowconv_masks,
    _rowconv_select,
    _rowconv_sps,
    _sampling,
    _sampling_pyramid,
)
from effops.testing._info import OpInfo

OP_DB: tuple[OpInfo, ...] = (
    *_sampling.ENTRIES,
    *_sampling_pyramid.ENTRIES,
    *_binary.ENTRIES,
    *_binary_hamming.ENTRIES,
    *_binary_match.ENTRIES,
    *_rowconv_sps.ENTRIES,
    *_rowconv.ENTRIES,
    *_rowconv_masks.ENTRIES,
    *_rowconv_select.ENTRIES,
    *_localfilter.ENTRIES,
    *_localfilter_attention.ENTRIES,
    *_pairwise.ENTRIES,
    *_pairwise_labels.ENTRIES,
    *_pairwise_loss.ENTRIES,
)
