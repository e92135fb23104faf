// Argument checks of the ops. Every message reads "<op>: expected <what>, got <what>"; Python turns
// them into ValueError or TypeError (effops/ops/_checks.py), a direct torch.ops call shows RuntimeError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "torch.h"

namespace effops {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Half;
}

inline std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "[") << tensor.size(i);
  text << (tensor.dim() == 0 ? "[]" : "]");
  return text.str();
}

// Matches tensors against patterns of one letter per dimension ("BSMD"): the first tensor that shows a
// letter fixes its size, later ones must agree; a digit stands for itself.
class ShapeChecker {
 public:
  explicit ShapeChecker(const char* op) : op_(op) {
    for (int64_t& size : sizes_) size = -1;
  }

  void match(const char* argument, const Tensor& tensor, const char* pattern) {
    const int64_t rank = static_cast<int64_t>(std::char_traits<char>::length(pattern));
    if (tensor.dim() != rank) mismatch(argument, tensor, pattern);
    for (int64_t i = 0; i < rank; ++i) {
      const char letter = pattern[i];
      const bool literal = letter >= '0' && letter <= '9';
      int64_t& known = sizes_[static_cast<unsigned char>(letter) & 127];
      const int64_t expected = literal ? letter - '0' : known;
      const int64_t got = tensor.size(i);
      if (expected < 0) {
        known = got;
      } else if (got != expected) {
        mismatch(argument, tensor, pattern);
      }
    }
  }

  int64_t operator[](char letter) const { return sizes_[static_cast<unsigned char>(letter) & 127]; }

 private:
  [[noreturn]] void mismatch(const char* argument, const Tensor& tensor, const char* pattern) const {
    std::ostringstream text;
    for (const char* letter = pattern; *letter; ++letter) {
      text << (letter == pattern ? "[" : ", ") << *letter;
      if (const int64_t size = (*this)[*letter]; size >= 0) text << "=" << size;
    }
    fail(op_, ": expected ", argument, " of shape ", text.str(), "], got ", shape_text(tensor));
  }

  const char* op_;
  int64_t sizes_[128];
};

inline void check_dtype(const char* op, const char* argument, const Tensor& tensor, ScalarType expected) {
  if (tensor.scalar_type() != expected) {
    fail(op, ": expected ", argument, " of dtype ", dtype_name(expected), ", got ",
         dtype_name(tensor.scalar_type()));
  }
}

inline void check_floating(const char* op, const char* argument, const Tensor& tensor) {
  if (!is_floating(tensor.scalar_type())) {
    fail(op, ": expected ", argument, " of dtype float32, float64, bfloat16 or float16, got ",
         dtype_name(tensor.scalar_type()));
  }
}

inline void check_int32_or_int64(const char* op, const char* argument, const Tensor& tensor) {
  if (tensor.scalar_type() != ScalarType::Int && tensor.scalar_type() != ScalarType::Long) {
    fail(op, ": expected ", argument, " of dtype int32 or int64, got ", dtype_name(tensor.scalar_type()));
  }
}

// Coordinates and weights may stay in float32 beside half-precision values.
inline void check_dtype_or_float(const char* op, const char* argument, const Tensor& tensor,
                                 ScalarType expected) {
  if (tensor.scalar_type() != ScalarType::Float) check_dtype(op, argument, tensor, expected);
}

inline void check_same_device(const char* op, const char* argument, const Tensor& tensor,
                              const char* other_argument, const Tensor& other) {
  if (tensor.is_cuda() != other.is_cuda() || tensor.is_cpu() != other.is_cpu() ||
      tensor.get_device_index() != other.get_device_index()) {
    fail(op, ": expected ", argument, " on the device of ", other_argument, ", got another device");
  }
}

}  // namespace effops
