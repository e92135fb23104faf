// Packing maps into rows of channels on the CPU, and unpacking the sums of their gradients.
//
// Parallelism: the caller splits pixels; 8 x 8 blocks are transposed in registers.
// Bytes: every element is read once and written once. Bound by memory bandwidth.
#include "pyramid_cpu_kernel.h"
#include "transpose_cpu.h"

namespace effops::sampling::EFFOPS_ISA {
namespace {

template <typename T>
void pack(const PackSource& source, int64_t begin, int64_t end, int64_t channels, int64_t padded,
          void* target) {
  for (int64_t pixel = begin; pixel < end;) {
    const int64_t y = pixel / source.width, x = pixel % source.width;
    const int64_t left = source.width - x, run = left < end - pixel ? left : end - pixel;
    const T* from = static_cast<const T*>(source.data) + y * source.row_stride + x * source.pixel_stride;
    pack_rows(from, source.pixel_stride, source.channel_stride, run, channels, padded,
              static_cast<T*>(target) + pixel * padded);
    pixel += run;
  }
}

template <typename T>
void unpack(const void* sums, int64_t padded, int64_t pixels, int64_t channels, void* target, int64_t plane) {
  unpack_rows(static_cast<const accumulator_t<T>*>(sums), padded, pixels, channels, static_cast<T*>(target),
              plane);
}

}  // namespace

extern const PyramidKernels pyramid_kernels = {
    Vec<float>::lanes,
    {&pack<float>, &pack<double>, &pack<bf16>, &pack<f16>},
    {&unpack<float>, &unpack<double>, &unpack<bf16>, &unpack<f16>},
};

}  // namespace effops::sampling::EFFOPS_ISA
