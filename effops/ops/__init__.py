"""The operators, one file each. See the docstring of each function for its formula and its source."""

from effops import _load  # noqa: F401  the native libraries register the schemas that the ops build on
from effops.ops.assign_modes import assign_modes
from effops.ops.binnorm import binnorm
from effops.ops.expected_flow import expected_flow
from effops.ops.filter_flow import filter_flow
from effops.ops.hamming_distance import hamming_distance
from effops.ops.hamming_knn import hamming_knn
from effops.ops.hamming_match import hamming_match
from effops.ops.local_attention import local_attention
from effops.ops.mean_shift import mean_shift
from effops.ops.mean_shift_cluster import mean_shift_cluster
from effops.ops.ms_deform_attn import ms_deform_attn
from effops.ops.neighborhood_dot import neighborhood_dot
from effops.ops.neighborhood_mix import neighborhood_mix
from effops.ops.pack_bits import pack_bits, unpack_bits
from effops.ops.pairwise_embedding_loss import pairwise_embedding_loss
from effops.ops.perforated_conv2d import perforated_conv2d
from effops.ops.plan_mask import plan_mask
from effops.ops.point_sample import point_sample
from effops.ops.roi_align import roi_align
from effops.ops.select_conv2d import select_conv2d
from effops.ops.sps_conv2d import sps_conv2d
from effops.ops.sps_from_dense import sps_from_dense
from effops.ops.sps_refine import sps_refine
from effops.ops.sps_to_dense import sps_to_dense
from effops.ops.topk_pack import topk_pack

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
