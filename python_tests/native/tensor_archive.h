// Tensors of the simulator, and the file they travel in between Python and the driver.
//
// A file is, all in little endian:
//   "EFFOPSTA", uint32 number of tensors, then per tensor
//   uint32 length of the name, the name, uint8 DType, uint8 bytes that the data lies past a multiple of 16,
//   uint32 dimensions, int64 sizes[], int64 strides[] in elements, uint64 bytes, the bytes
// The bytes span the first to the last element, with whatever the strides skip. Numbers are tensors
// without dimensions: int64, float64 or bool; lists of integers are int64 tensors of one dimension.
// python_tests/simulator.py reads and writes the same.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "common/dtype.h"

namespace simulator {

enum class DType : uint8_t {
  kBool,
  kUInt8,
  kInt8,
  kInt16,
  kInt32,
  kInt64,
  kFloat16,
  kBFloat16,
  kFloat32,
  kFloat64
};
const char* name_of(DType dtype);
size_t size_of(DType dtype);

template <typename T>
inline constexpr auto kDTypeOf = nullptr;
template <>
inline constexpr auto kDTypeOf<bool> = DType::kBool;
template <>
inline constexpr auto kDTypeOf<uint8_t> = DType::kUInt8;
template <>
inline constexpr auto kDTypeOf<int8_t> = DType::kInt8;
template <>
inline constexpr auto kDTypeOf<int16_t> = DType::kInt16;
template <>
inline constexpr auto kDTypeOf<int32_t> = DType::kInt32;
template <>
inline constexpr auto kDTypeOf<int64_t> = DType::kInt64;
template <>
inline constexpr auto kDTypeOf<effops::f16> = DType::kFloat16;
template <>
inline constexpr auto kDTypeOf<effops::bf16> = DType::kBFloat16;
template <>
inline constexpr auto kDTypeOf<float> = DType::kFloat32;
template <>
inline constexpr auto kDTypeOf<double> = DType::kFloat64;

enum class Fill {
  kGarbage,  // all bits set: NaN, -1; the race detector reports reads of it
  kZeros,
};

// Owns memory that stands for device memory: one allocation, guarded by ASan at both ends.
class Tensor {
 public:
  Tensor(std::string name, DType dtype, std::vector<int64_t> sizes, Fill fill = Fill::kGarbage);
  Tensor(std::string name, DType dtype, std::vector<int64_t> sizes, std::vector<int64_t> strides,
         size_t offset, Fill fill);
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor();

  const std::string& name() const { return name_; }
  DType dtype() const { return dtype_; }
  const std::vector<int64_t>& sizes() const { return sizes_; }
  const std::vector<int64_t>& strides() const { return strides_; }
  // -1 is the last dimension.
  int64_t size(int64_t dimension) const { return sizes_[index_of(dimension)]; }
  int64_t stride(int64_t dimension) const { return strides_[index_of(dimension)]; }
  int64_t numel() const;
  size_t bytes() const { return bytes_; }
  void* raw() const { return data_; }

  // Fails if the tensor is of another type.
  template <typename T>
  T* data() const {
    check_type(kDTypeOf<std::remove_const_t<T>>);
    return static_cast<T*>(data_);
  }

 private:
  size_t index_of(int64_t dimension) const;
  void check_type(DType dtype) const;

  std::string name_;
  DType dtype_;
  std::vector<int64_t> sizes_, strides_;
  size_t bytes_;
  void* allocation_ = nullptr;
  void* data_;
};

}  // namespace simulator
