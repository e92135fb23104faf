// What a simulate_<op>.cpp needs: the arguments that Python passes, outputs, launches, registration.
//
//   #include "simulate.h"
//   #include "scaling/scale_kernels.cuh"
//
//   static void scale(simulator::Call& call) {
//     const simulator::Tensor& x = call.tensor("x");
//     simulator::Tensor& y = call.output("y", x.dtype(), x.sizes());
//     simulator::dispatch<float, effops::bf16>(x.dtype(), [&]<typename T>(std::type_identity<T>) {
//       simulator::launch(dim3(4), dim3(128), /*shared_bytes=*/0, effops::scale_kernel<T>,
//                         x.data<const T>(), y.data<T>(), x.numel(), call.real("factor"));
//     });
//   }
//   EFFOPS_SIMULATE("scale", scale)
//
// and in Python: simulator.run_schedules("scale", {"x": x, "factor": 2.0})["y"].
#pragma once

#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "fibers.h"
#include "tensor_archive.h"

namespace simulator {

// One run of the driver: arguments in, tensors out. An argument that is missing or of another kind fails.
class Call {
 public:
  void read(const char* path);
  void write(const char* path) const;

  bool has(const std::string& name) const { return find(name) != nullptr; }
  const Tensor& tensor(const std::string& name) const;
  int64_t integer(const std::string& name) const;
  double real(const std::string& name) const;  // integers will do
  bool flag(const std::string& name) const;
  std::vector<int64_t> integers(const std::string& name) const;

  // A tensor that goes back to Python. `scratch`: one that doesn't.
  Tensor& output(const std::string& name, DType dtype, std::vector<int64_t> sizes,
                 Fill fill = Fill::kGarbage);
  Tensor& scratch(const std::string& name, DType dtype, std::vector<int64_t> sizes,
                  Fill fill = Fill::kGarbage);

 private:
  const Tensor* find(const std::string& name) const;
  const Tensor& number(const std::string& name, const char* kind) const;

  std::vector<std::unique_ptr<Tensor>> arguments_, outputs_, scratch_;
};

// Calls function(std::type_identity<T>()) with the one of Types that dtype stands for.
template <typename... Types, typename Function>
void dispatch(DType dtype, const Function& function) {
  const bool found = ((dtype == kDTypeOf<Types> && (function(std::type_identity<Types>()), true)) || ...);
  if (!found) fail("the kernel isn't compiled for %s", name_of(dtype));
}

struct Registration {
  Registration(const char* name, void (*function)(Call&));
};

}  // namespace simulator

// At namespace scope: EFFOPS_SIMULATE("name", function), where the function may be an instance of a template.
// Python finds the file of a kernel by this line; names are unique over all files.
#define EFFOPS_SIMULATE(name, ...)                                                         \
  static const ::simulator::Registration EFFOPS_REGISTRATION(__LINE__)(name, __VA_ARGS__);
#define EFFOPS_REGISTRATION(line) EFFOPS_REGISTRATION_(line)
#define EFFOPS_REGISTRATION_(line) effops_registration_##line
