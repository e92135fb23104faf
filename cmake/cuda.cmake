# libeffops_cuda.so. It builds without a GPU and beside a CPU-only torch: the few functions of
# libtorch_cuda that it calls are linked from a stub with the same SONAME, which is not installed.
set(effops_cuda_archs "")
set(effops_cuda_compiler "")
if(NOT EFFOPS_CUDA MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "EFFOPS_CUDA must be auto, on or off, got '${EFFOPS_CUDA}'")
endif()
if(EFFOPS_CUDA STREQUAL "off")
  return()
endif()

include(CheckLanguage)
if(EFFOPS_CUDA_ARCHITECTURES STREQUAL "release")
  set(effops_cuda_archs 75-real 80-real 86-real 89-real 90-real 100-real 120)
else()
  set(effops_cuda_archs ${EFFOPS_CUDA_ARCHITECTURES})
  list(TRANSFORM effops_cuda_archs APPEND "-real")
endif()
set(CMAKE_CUDA_ARCHITECTURES ${effops_cuda_archs})
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(EFFOPS_CUDA STREQUAL "on")
    message(FATAL_ERROR "EFFOPS_CUDA=on, but no CUDA compiler (nvcc) was found")
  endif()
  message(STATUS "effops: no nvcc found, building without CUDA")
  set(effops_cuda_archs "")
  return()
endif()
set(CMAKE_CUDA_STANDARD 17)  # CMake 3.25 knows no later one for nvcc
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
enable_language(CUDA)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(effops_cuda_compiler "${CMAKE_CUDA_COMPILER_VERSION}")

file(WRITE "${CMAKE_BINARY_DIR}/torch_cuda_stub.c" "
int aoti_torch_get_current_cuda_stream(int device, void** stream) { (void)device; (void)stream; return 1; }
void torch_c10_cuda_check_msg(int e, const char* f, const char* n, unsigned l, _Bool a, char** m) {
  (void)e; (void)f; (void)n; (void)l; (void)a; (void)m; }
void torch_c10_cuda_free_error_msg(char* m) { (void)m; }
")
enable_language(C)
add_library(torch_cuda SHARED "${CMAKE_BINARY_DIR}/torch_cuda_stub.c")
set_target_properties(torch_cuda PROPERTIES C_VISIBILITY_PRESET default
                      LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/stub")

add_library(effops_cuda SHARED
  csrc/binary/binnorm_cuda.cu
  csrc/binary/hamming_cuda.cu
  csrc/binary/pack_bits_cuda.cu
  csrc/binary/topk_pack_cuda.cu
  csrc/localfilter/filter_flow_backward_cuda.cu
  csrc/localfilter/filter_flow_cuda.cu
  csrc/localfilter/local_attention_cuda.cu
  csrc/localfilter/neighborhood_cuda.cu
  csrc/pairwise/assign_modes_cuda.cu
  csrc/pairwise/mean_shift_backward_cuda.cu
  csrc/pairwise/mean_shift_cuda.cu
  csrc/pairwise/pairwise_embedding_loss_cuda.cu
  csrc/rowconv/cell_buckets_cuda.cu
  csrc/rowconv/mask_plan_cuda.cu
  csrc/rowconv/perforated_conv2d_cuda.cu
  csrc/rowconv/row_gemm_cuda.cu
  csrc/rowconv/row_outer_cuda.cu
  csrc/rowconv/scan_cuda.cu
  csrc/rowconv/select_conv2d_cuda.cu
  csrc/rowconv/sps_conv2d_cuda.cu
  csrc/rowconv/sps_dense_cuda.cu
  csrc/rowconv/sps_refine_cuda.cu
  csrc/sampling/ms_deform_attn_cuda.cu
  csrc/sampling/point_sample_cuda.cu
  csrc/sampling/roi_align_cuda.cu)
target_link_libraries(effops_cuda PRIVATE effops_flags torch_cpu torch_cuda)
target_link_options(effops_cuda PRIVATE ${effops_link_options})
target_compile_definitions(effops_cuda PRIVATE USE_CUDA)
list(JOIN prefix_maps "," host_maps)
target_compile_options(effops_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-v,-warn-spills -Xcompiler=${host_maps}>
  $<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${EFFOPS_WERROR}>>:-Werror=all-warnings -Xptxas=-Werror>)
set_target_properties(effops_cuda PROPERTIES
  CUDA_COMPILER_LAUNCHER "${Python_EXECUTABLE};${CMAKE_SOURCE_DIR}/cmake/ptxas_report.py")
install(TARGETS effops_cuda LIBRARY DESTINATION effops)
