// Every op's schema, one line each. Exported programs hold these: new arguments only at the end, with
// defaults. Backward ops are ops too, so that they can be compiled and traced.
#include "common/torch.h"

STABLE_TORCH_LIBRARY(effops, m) {
  // sampling
  m.def("ms_deform_attn(Tensor value, Tensor spatial_shapes, Tensor? level_start_index, Tensor sampling_locations, Tensor attention_weights) -> Tensor");
  m.def("ms_deform_attn_backward(Tensor grad_output, Tensor value, Tensor spatial_shapes, Tensor? level_start_index, Tensor sampling_locations, Tensor attention_weights, bool need_value, bool need_locations, bool need_weights, bool deterministic) -> (Tensor, Tensor, Tensor)");
}
