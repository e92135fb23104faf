// The driver: simulate NAME --schedule forward|reverse|random[:SEED] IN OUT, or simulate --list.
#include "simulate.h"

#include <bit>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <string_view>
#include <utility>

#include "race_detector.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>

// A simulator that fails leaves by _Exit, and the stacks of the fibers stay to the end.
extern "C" const char* __asan_default_options() { return "detect_leaks=0:allocator_may_return_null=1"; }
extern "C" const char* __ubsan_default_options() { return "print_stacktrace=1"; }
extern "C" void __ubsan_on_report() { simulator::report_place(); }
#endif

namespace simulator {
namespace {

static_assert(std::endian::native == std::endian::little, "archives are in little endian");

constexpr char kMagic[] = "EFFOPSTA";

struct Entry {
  const char* name;
  void (*function)(Call&);
};
std::vector<Entry>& entries() {
  static std::vector<Entry> instance;
  return instance;
}

struct File {
  File(const char* path, const char* mode) : path(path), stream(std::fopen(path, mode)) {
    if (!stream) fail("cannot open %s", path);
  }
  ~File() { std::fclose(stream); }

  void read(void* data, size_t bytes) const {
    if (bytes && std::fread(data, 1, bytes, stream) != bytes) fail("%s ends too early", path);
  }
  template <typename T>
  T read() const {
    T value;
    read(&value, sizeof(T));
    return value;
  }
  void write(const void* data, size_t bytes) const {
    if (bytes && std::fwrite(data, 1, bytes, stream) != bytes) fail("cannot write %s", path);
  }
  template <typename T>
  void write(T value) const {
    write(&value, sizeof(T));
  }

  const char* path;
  std::FILE* stream;
};

std::unique_ptr<Tensor> read_tensor(const File& file) {
  std::string name(file.read<uint32_t>(), '\0');
  file.read(name.data(), name.size());
  const auto code = file.read<uint8_t>();
  if (code > static_cast<uint8_t>(DType::kFloat64)) fail("%s: unknown type %d", name.c_str(), code);
  const auto offset = file.read<uint8_t>();
  std::vector<int64_t> sizes(file.read<uint32_t>()), strides(sizes.size());
  file.read(sizes.data(), sizes.size() * sizeof(int64_t));
  file.read(strides.data(), strides.size() * sizeof(int64_t));
  // kZeros: what is read from the file counts as initialised.
  auto tensor = std::make_unique<Tensor>(name, static_cast<DType>(code), std::move(sizes), std::move(strides),
                                         offset % 16, Fill::kZeros);
  if (file.read<uint64_t>() != tensor->bytes()) fail("%s: sizes and bytes disagree", name.c_str());
  file.read(tensor->raw(), tensor->bytes());
  return tensor;
}

void write_tensor(const File& file, const Tensor& tensor) {
  file.write(static_cast<uint32_t>(tensor.name().size()));
  file.write(tensor.name().data(), tensor.name().size());
  file.write(static_cast<uint8_t>(tensor.dtype()));
  file.write(uint8_t{0});
  file.write(static_cast<uint32_t>(tensor.sizes().size()));
  file.write(tensor.sizes().data(), tensor.sizes().size() * sizeof(int64_t));
  file.write(tensor.strides().data(), tensor.strides().size() * sizeof(int64_t));
  file.write(static_cast<uint64_t>(tensor.bytes()));
  file.write(tensor.raw(), tensor.bytes());
}

}  // namespace

void Call::read(const char* path) {
  const File file(path, "rb");
  char magic[sizeof(kMagic) - 1];
  file.read(magic, sizeof(magic));
  if (std::memcmp(magic, kMagic, sizeof(magic)) != 0) fail("%s is no tensor archive", path);
  const auto count = file.read<uint32_t>();
  for (uint32_t i = 0; i < count; ++i) arguments_.push_back(read_tensor(file));
}

void Call::write(const char* path) const {
  const File file(path, "wb");
  file.write(kMagic, sizeof(kMagic) - 1);
  file.write(static_cast<uint32_t>(outputs_.size()));
  for (const auto& tensor : outputs_) write_tensor(file, *tensor);
}

const Tensor* Call::find(const std::string& name) const {
  for (const auto& tensor : arguments_) {
    if (tensor->name() == name) return tensor.get();
  }
  return nullptr;
}

const Tensor& Call::tensor(const std::string& name) const {
  const Tensor* tensor = find(name);
  if (!tensor) fail("argument %s is missing", name.c_str());
  return *tensor;
}

const Tensor& Call::number(const std::string& name, const char* kind) const {
  const Tensor& value = tensor(name);
  if (!value.sizes().empty()) fail("argument %s is a tensor, not %s", name.c_str(), kind);
  return value;
}

int64_t Call::integer(const std::string& name) const { return *number(name, "an integer").data<int64_t>(); }

double Call::real(const std::string& name) const {
  const Tensor& value = number(name, "a number");
  return value.dtype() == DType::kInt64 ? static_cast<double>(*value.data<int64_t>()) : *value.data<double>();
}

bool Call::flag(const std::string& name) const { return *number(name, "a flag").data<bool>(); }

std::vector<int64_t> Call::integers(const std::string& name) const {
  const Tensor& list = tensor(name);
  if (list.sizes().size() != 1) fail("argument %s is no list", name.c_str());
  const int64_t* data = list.data<int64_t>();
  return {data, data + list.numel()};
}

Tensor& Call::output(const std::string& name, DType dtype, std::vector<int64_t> sizes, Fill fill) {
  return *outputs_.emplace_back(std::make_unique<Tensor>(name, dtype, std::move(sizes), fill));
}

Tensor& Call::scratch(const std::string& name, DType dtype, std::vector<int64_t> sizes, Fill fill) {
  return *scratch_.emplace_back(std::make_unique<Tensor>(name, dtype, std::move(sizes), fill));
}

Registration::Registration(const char* name, void (*function)(Call&)) {
  for (const Entry& entry : entries()) {
    if (std::strcmp(entry.name, name) == 0) fail("two kernels are named %s", name);
  }
  entries().push_back({name, function});
}

namespace {

bool parse_schedule(std::string_view text) {
  if (text == "forward" || text == "reverse") {
    set_schedule(text == "forward" ? Order::kForward : Order::kReverse, 0);
    return true;
  }
  constexpr std::string_view kRandom = "random";
  if (!text.starts_with(kRandom)) return false;
  text.remove_prefix(kRandom.size());
  uint64_t seed = 0;
  if (!text.empty()) {
    const char* end = text.data() + text.size();
    const auto [rest, error] = std::from_chars(text.data() + 1, end, seed);
    if (text.front() != ':' || error != std::errc() || rest != end) return false;
  }
  set_schedule(Order::kRandom, seed);
  return true;
}

int run(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "--list") == 0) {
    for (const Entry& entry : entries()) std::puts(entry.name);
    return 0;
  }
  if (argc != 6 || std::strcmp(argv[2], "--schedule") != 0 || !parse_schedule(argv[3])) {
    std::fputs("usage: simulate NAME --schedule forward|reverse|random[:SEED] IN OUT\n", stderr);
    return 2;
  }
  for (const Entry& entry : entries()) {
    if (std::strcmp(entry.name, argv[1]) != 0) continue;
    Call call;
    call.read(argv[4]);
    entry.function(call);
    call.write(argv[5]);
    return 0;
  }
  std::fprintf(stderr, "no kernel is named %s\n", argv[1]);
  return 2;
}

}  // namespace
}  // namespace simulator

int main(int argc, char** argv) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_set_death_callback(simulator::report_place);
#endif
  return simulator::run(argc, argv);
}
