# effops_isa_sources(target file...): compiles each kernel file once per instruction set, in a namespace
# of its own (EFFOPS_ISA), and adds the objects to the target. The table of function pointers that each
# file exports is chosen at load (csrc/common/cpu_capability.h).
set(effops_isa_variants "default")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND effops_isa_variants avx2 avx512)
endif()
set(effops_flags_default "")
set(effops_flags_avx2 -mavx2 -mfma -mf16c)
set(effops_flags_avx512 ${effops_flags_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl
                        -mprefer-vector-width=512)

# With AVX-512's own instructions to count ones, or to multiply pairs of bfloat16, which not every AVX-512
# processor has. A kernel that wants such a variant asks for it and finds out itself whether it can run
# (effops_isa_source).
set(effops_flags_avx512_popcount ${effops_flags_avx512} -mavx512bitalg -mavx512vpopcntdq)
set(effops_flags_avx512_bf16 ${effops_flags_avx512} -mavx512bf16)

function(effops_isa_source target file isa)
  get_filename_component(name "${file}" NAME_WE)
  set(object "${name}_${isa}")
  add_library(${object} OBJECT "${file}")
  target_compile_definitions(${object} PRIVATE EFFOPS_ISA=isa_${isa})
  # Kernels see no torch header and rely on no floating-point trap; NaN and Inf keep their meaning.
  target_compile_options(
    ${object} PRIVATE ${effops_flags_${isa}} ${effops_warnings} ${prefix_maps} -O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast
                      # g++ 12 sees uninitialised registers in its own AVX-512 intrinsics
                      $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>)
  target_link_libraries(${object} PRIVATE effops_sanitize)
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:${object}>)
endfunction()

function(effops_isa_sources target)
  foreach(file ${ARGN})
    foreach(isa ${effops_isa_variants})
      effops_isa_source(${target} "${file}" ${isa})
    endforeach()
  endforeach()
endfunction()

list(LENGTH effops_isa_variants count)
if(count GREATER 1)
  add_compile_definitions(EFFOPS_HAVE_X86_ISAS)
endif()
