"""Modules: parameters, initialisation and settings around the functions of `effops.ops`."""

from effops.nn.binnorm import BinNorm
from effops.nn.filter_flow import FilterFlow
from effops.nn.local_attention import LocalAttention2d
from effops.nn.mean_shift import MeanShiftGrouping
from effops.nn.ms_deform_attn import MultiScaleDeformableAttention
from effops.nn.roi_align import RoIAlign
from effops.nn.sps_conv2d import SPSConv2d
from effops.nn.sps_fusion import SPSFusion

__all__ = [
    "BinNorm",
    "FilterFlow",
    "LocalAttention2d",
    "MeanShiftGrouping",
    "MultiScaleDeformableAttention",
    "RoIAlign",
    "SPSConv2d",
    "SPSFusion",
]
