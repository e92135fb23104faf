"""The sections of the demo, one file each. A new one: a file with a constant SECTION, and a line here."""

from importlib import import_module
from typing import cast

from effops.demo._section import Section

#: Names on the command line and the modules behind them, in the order of the page.
SECTIONS: dict[str, str] = {
    "ms_deform_attn": "effops.demo.sections.ms_deform_attn",
    "roi_align": "effops.demo.sections.roi_align",
    "hamming_match": "effops.demo.sections.hamming_match",
    "sps_conv2d": "effops.demo.sections.sps_conv2d",
    "perforated_conv2d": "effops.demo.sections.perforated_conv2d",
    "filter_flow": "effops.demo.sections.filter_flow",
    "expected_flow": "effops.demo.sections.expected_flow",
    "mean_shift": "effops.demo.sections.mean_shift",
    "pairwise_embedding_loss": "effops.demo.sections.pairwise_embedding_loss",
}


def load(name: str) -> Section:
    """The section of that name."""
    return cast(Section, import_module(SECTIONS[name]).SECTION)
