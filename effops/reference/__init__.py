"""Every op defined in pure PyTorch: same names and signatures as `effops.ops`, torch alone.

These functions say what an op computes; they are written to be read, not to be fast. They are
differentiable by autograd, exact to rounding in float64, and need no compiled code.
"""

from effops.reference.assign_modes import assign_modes
from effops.reference.binnorm import binnorm
from effops.reference.expected_flow import expected_flow
from effops.reference.filter_flow import filter_flow
from effops.reference.hamming_distance import hamming_distance
from effops.reference.hamming_knn import hamming_knn
from effops.reference.hamming_match import hamming_match
from effops.reference.local_attention import local_attention
from effops.reference.mean_shift import mean_shift
from effops.reference.mean_shift_cluster import mean_shift_cluster
from effops.reference.ms_deform_attn import ms_deform_attn
from effops.reference.neighborhood_dot import neighborhood_dot
from effops.reference.neighborhood_mix import neighborhood_mix
from effops.reference.pack_bits import pack_bits, unpack_bits
from effops.reference.pairwise_embedding_loss import pairwise_embedding_loss
from effops.reference.perforated_conv2d import perforated_conv2d
from effops.reference.plan_mask import plan_mask
from effops.reference.point_sample import point_sample
from effops.reference.roi_align import roi_align
from effops.reference.select_conv2d import select_conv2d
from effops.reference.sps_conv2d import sps_conv2d
from effops.reference.sps_from_dense import sps_from_dense
from effops.reference.sps_refine import sps_refine
from effops.reference.sps_to_dense import sps_to_dense
from effops.reference.topk_pack import topk_pack

__all__ = [
    "assign_modes",
    "binnorm",
    "expected_flow",
    "filter_flow",
    "hamming_distance",
    "hamming_knn",
    "hamming_match",
    "local_attention",
    "mean_shift",
    "mean_shift_cluster",
    "ms_deform_attn",
    "neighborhood_dot",
    "neighborhood_mix",
    "pack_bits",
    "pairwise_embedding_loss",
    "perforated_conv2d",
    "plan_mask",
    "point_sample",
    "roi_align",
    "select_conv2d",
    "sps_conv2d",
    "sps_from_dense",
    "sps_refine",
    "sps_to_dense",
    "topk_pack",
    "unpack_bits",
]
