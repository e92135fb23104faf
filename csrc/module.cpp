// effops._C: loads the op libraries and tells how they were built. The ops themselves are reached through
// torch.ops.effops, whose libraries hold no Python and work with any CPython and any torch >= 2.10.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

namespace py = pybind11;

namespace {

void* cpu_library = nullptr;

// dlopen with the loader's own words as the error. libtorch must be loaded already (import torch).
void* load(const std::string& path) {
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) throw std::runtime_error(dlerror());
  return handle;
}

std::string cpu_capability() {
  using Query = int (*)();
  if (cpu_library == nullptr) throw std::runtime_error("effops: libeffops_cpu.so is not loaded");
  const auto query = reinterpret_cast<Query>(dlsym(cpu_library, "effops_cpu_capability"));
  const char* names[] = {"default", "avx2", "avx512"};
  return names[query()];
}

py::dict build_info() {
  py::dict info;
  info["version"] = EFFOPS_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "g++ " __VERSION__;
#endif
  info["torch_target"] = "2.10";
  info["isa_variants"] = EFFOPS_ISA_VARIANTS;
  info["cuda_compiler"] = EFFOPS_CUDA_COMPILER;
  info["cuda_architectures"] = EFFOPS_CUDA_ARCHS;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Loader and build information of effops.";
  m.def("load_cpu", [](const std::string& path) { cpu_library = load(path); }, py::arg("path"));
  m.def("load_cuda", [](const std::string& path) { load(path); }, py::arg("path"));
  m.def("cpu_capability", &cpu_capability);
  m.def("build_info", &build_info);
}
