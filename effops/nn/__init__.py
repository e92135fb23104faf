"""Modules: parameters, initialisation and settings around the functions of `effops.ops`."""

from effops.nn.ms_deform_attn import MultiScaleDeformableAttention

__all__ = ["MultiScaleDeformableAttention"]
