// Every op's schema, one line each. Exported programs hold these: new arguments only at the end, with
// defaults. Backward ops are ops too, so that they can be compiled and traced.
#include "common/torch.h"

// clang-format off: one line each

STABLE_TORCH_LIBRARY(effops, m) {
  // sampling
  m.def("ms_deform_attn(Tensor value, Tensor spatial_shapes, Tensor? level_start_index, Tensor sampling_locations, Tensor attention_weights) -> Tensor");
  m.def("ms_deform_attn_backward(Tensor grad_output, Tensor value, Tensor spatial_shapes, Tensor? level_start_index, Tensor sampling_locations, Tensor attention_weights, bool need_value, bool need_locations, bool need_weights, bool deterministic) -> (Tensor, Tensor, Tensor)");
  m.def("point_sample(Tensor[] pyramid, Tensor batch, Tensor level, Tensor xy) -> Tensor");
  m.def("point_sample_backward(Tensor grad_output, Tensor[] pyramid, Tensor batch, Tensor level, Tensor xy, bool need_pyramid, bool need_xy, bool deterministic) -> (Tensor[], Tensor)");
  m.def("roi_align(Tensor[] pyramid, Tensor rois, Tensor level, SymInt output_height, SymInt output_width, int sampling_ratio, bool aligned, float[] strides) -> Tensor");
  m.def("roi_align_backward(Tensor grad_output, Tensor[] pyramid, Tensor rois, Tensor level, SymInt output_height, SymInt output_width, int sampling_ratio, bool aligned, float[] strides, bool deterministic) -> Tensor[]");
  // binary
  m.def("pack_bits(Tensor x) -> Tensor");
  m.def("unpack_bits(Tensor packed, SymInt num_bits) -> Tensor");
  m.def("topk_pack(Tensor x, int k) -> Tensor");
  m.def("binnorm(Tensor x, int k) -> Tensor");
  m.def("binnorm_backward(Tensor grad_output, Tensor output) -> Tensor");
  m.def("hamming_distance(Tensor a, Tensor b) -> Tensor");
  m.def("hamming_knn(Tensor a, Tensor b, SymInt k, Tensor? lengths_a, Tensor? lengths_b, Tensor? mask, bool mutual) -> (Tensor, Tensor)");
  m.def("hamming_match(Tensor a, Tensor b, float? ratio, int? max_distance, bool mutual, Tensor? mask) -> (Tensor, Tensor)");
  // rowconv
  m.def("sps_from_dense(Tensor x, Tensor mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("sps_from_dense_backward(Tensor grad_active, Tensor grad_passive, Tensor index_map) -> Tensor");
  m.def("sps_to_dense(Tensor active, Tensor passive, Tensor index_map, Tensor roi, Tensor xy) -> Tensor");
  m.def("sps_to_dense_backward(Tensor grad_output, Tensor active, Tensor passive, Tensor index_map, Tensor roi, Tensor xy, bool need_active, bool need_passive, bool deterministic) -> (Tensor, Tensor)");
  m.def("sps_refine(Tensor active, Tensor passive, Tensor index_map, Tensor roi, Tensor xy, Tensor scores, SymInt num_refine, bool upsample) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("sps_refine_backward(Tensor grad_active, Tensor grad_passive, Tensor new_ids, SymInt num_passive, bool upsample, bool need_active, bool need_passive) -> (Tensor, Tensor)");
  m.def("sps_conv2d(Tensor active, Tensor passive, Tensor index_map, Tensor roi, Tensor xy, Tensor[] weight, Tensor[] bias, int[] dilation, int activation, int groups) -> (Tensor, Tensor)");
  m.def("sps_conv2d_backward(Tensor grad_output, Tensor signs, Tensor active, Tensor passive, Tensor index_map, Tensor roi, Tensor xy, Tensor[] weight, int[] dilation, int activation, int groups, bool need_active, bool need_passive, bool need_weight, bool need_bias, bool deterministic) -> (Tensor, Tensor, Tensor[], Tensor[])");
  m.def("plan_mask(Tensor mask) -> (Tensor, Tensor)");
  m.def("perforated_conv2d(Tensor x, Tensor weight, Tensor mask, Tensor? bias, Tensor? base, int[] stride, int[] padding, int[] dilation, int groups, int fill, Tensor? positions, Tensor? rows, bool deterministic) -> Tensor");
  m.def("perforated_conv2d_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor mask, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups, int fill, Tensor? positions, Tensor? rows, bool need_x, bool need_weight, bool need_mask, bool need_bias, bool need_base, bool deterministic) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("select_conv2d(Tensor x, Tensor weights, Tensor choice, Tensor? bias, int[] dilations) -> Tensor");
  m.def("select_conv2d_backward(Tensor grad_output, Tensor x, Tensor weights, Tensor choice, int[] dilations, bool need_x, bool need_weights, bool need_bias, bool deterministic) -> (Tensor, Tensor, Tensor)");
  // localfilter
  m.def("filter_flow(Tensor image, Tensor filters, int normalize, int padding_mode, int stride, int upsample, int dilation, int groups, bool return_flow) -> (Tensor, Tensor, Tensor)");
  m.def("filter_flow_backward(Tensor grad_output, Tensor? grad_flow, Tensor image, Tensor filters, Tensor? output, Tensor? flow, Tensor normalizer, int normalize, int padding_mode, int stride, int upsample, int dilation, int groups, bool need_image, bool need_filters) -> (Tensor, Tensor)");
  m.def("expected_flow(Tensor filters, int normalize, int dilation, int groups) -> (Tensor, Tensor)");
  m.def("expected_flow_backward(Tensor grad_flow, Tensor filters, Tensor flow, Tensor normalizer, int normalize, int dilation, int groups) -> Tensor");
  m.def("local_attention(Tensor q, Tensor k, Tensor v, int window, int dilation, float scale, int border) -> (Tensor, Tensor)");
  m.def("local_attention_backward(Tensor grad_output, Tensor q, Tensor k, Tensor v, Tensor output, Tensor log_sum_exp, int window, int dilation, float scale, int border, bool need_q, bool need_k, bool need_v) -> (Tensor, Tensor, Tensor)");
  m.def("neighborhood_dot(Tensor q, Tensor k, int window, int dilation) -> Tensor");
  m.def("neighborhood_dot_backward(Tensor grad_output, Tensor q, Tensor k, int window, int dilation, bool need_q, bool need_k) -> (Tensor, Tensor)");
  m.def("neighborhood_mix(Tensor weights, Tensor v, int dilation) -> Tensor");
  m.def("neighborhood_mix_backward(Tensor grad_output, Tensor weights, Tensor v, int dilation, bool need_weights, bool need_v) -> (Tensor, Tensor)");
  // pairwise
  m.def("mean_shift(Tensor x, Tensor? weights, Tensor? seeds, Tensor? kappa_tensor, float kappa, float eta, int iterations, float tol, int precision, bool return_all, bool save) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("mean_shift_backward(Tensor grad_output, Tensor x, Tensor? weights, Tensor? seeds, Tensor? kappa_tensor, Tensor iterates, Tensor sums, Tensor steps, float kappa, float eta, int precision, bool return_all, bool need_x, bool need_weights, bool need_seeds, bool need_kappa) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("assign_modes(Tensor modes, float threshold, int min_size) -> Tensor");
  m.def("mean_shift_cluster(Tensor x, float kappa, int iterations, float threshold, int min_size) -> Tensor");
  m.def("pairwise_embedding_loss(Tensor x, Tensor order, Tensor segments, Tensor weights, float alpha, int normalize) -> (Tensor, Tensor)");
  m.def("pairwise_embedding_loss_backward(Tensor grad_loss, Tensor x, Tensor order, Tensor segments, Tensor weights, Tensor costs, float alpha, int normalize, bool need_x, bool need_weights) -> (Tensor, Tensor)");
}
