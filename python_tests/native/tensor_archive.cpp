#include "tensor_archive.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "fibers.h"
#include "race_detector.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace simulator {
namespace {

std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  return strides;
}

// Elements from the first to the last.
int64_t span(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  int64_t last = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] <= 0) return 0;
    last += (sizes[i] - 1) * strides[i];
  }
  return last + 1;
}

}  // namespace

const char* name_of(DType dtype) {
  constexpr const char* kNames[] = {"bool",  "uint8",   "int8",     "int16",   "int32",
                                    "int64", "float16", "bfloat16", "float32", "float64"};
  return kNames[static_cast<int>(dtype)];
}

size_t size_of(DType dtype) {
  constexpr size_t kSizes[] = {1, 1, 1, 2, 4, 8, 2, 2, 4, 8};
  return kSizes[static_cast<int>(dtype)];
}

Tensor::Tensor(std::string name, DType dtype, std::vector<int64_t> sizes, Fill fill)
    : Tensor(std::move(name), dtype, sizes, contiguous_strides(sizes), 0, fill) {}

Tensor::Tensor(std::string name, DType dtype, std::vector<int64_t> sizes, std::vector<int64_t> strides,
               size_t offset, Fill fill)
    : name_(std::move(name)),
      dtype_(dtype),
      sizes_(std::move(sizes)),
      strides_(std::move(strides)),
      bytes_(static_cast<size_t>(span(sizes_, strides_)) * size_of(dtype)) {
  // An empty tensor is the end of an allocation, where ASan allows no access.
  const size_t before = bytes_ == 0 ? 16 : offset;
  if (posix_memalign(&allocation_, 16, before + bytes_) != 0) fail("no memory for %s", name_.c_str());
  data_ = static_cast<char*>(allocation_) + before;
  std::memset(data_, fill == Fill::kZeros ? 0 : 0xff, bytes_);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(allocation_, before);
#endif
  races::watch(data_, bytes_, name_.c_str(), fill != Fill::kGarbage);
}

Tensor::~Tensor() {
  races::forget(data_);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(
      allocation_, static_cast<size_t>(static_cast<char*>(data_) - static_cast<char*>(allocation_)));
#endif
  std::free(allocation_);
}

int64_t Tensor::numel() const {
  int64_t count = 1;
  for (const int64_t size : sizes_) count *= size;
  return count;
}

size_t Tensor::index_of(int64_t dimension) const {
  const auto dimensions = static_cast<int64_t>(sizes_.size());
  const int64_t index = dimension < 0 ? dimension + dimensions : dimension;
  if (index < 0 || index >= dimensions) {
    fail("%s has no dimension %lld", name_.c_str(), static_cast<long long>(dimension));
  }
  return static_cast<size_t>(index);
}

void Tensor::check_type(DType dtype) const {
  if (dtype != dtype_)
    fail("%s is %s, used as %s", name_.c_str(), simulator::name_of(dtype_), simulator::name_of(dtype));
}

}  // namespace simulator
