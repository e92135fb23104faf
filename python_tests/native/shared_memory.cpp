#include <cstdlib>
#include <cstring>
#include <vector>

#include "fibers.h"
#include "race_detector.h"

namespace simulator {
namespace {

struct SharedArray {
  const void* key;  // of the declaration; null: dynamic shared memory
  void* allocation;
  void* data;
};

std::vector<SharedArray> arrays;  // of the running block

}  // namespace

void* static_shared(const void* key, const char* name, size_t bytes, size_t alignment) {
  for (const SharedArray& array : arrays) {
    if (array.key == key) return array.data;
  }
  void* allocation = nullptr;
  // An empty array is the end of an allocation, where ASan allows no access.
  const size_t pad = bytes == 0 ? alignment : 0;
  if (posix_memalign(&allocation, alignment, bytes + pad) != 0) fail("no memory for shared memory");
  char* data = static_cast<char*>(allocation) + pad;
  std::memset(data, 0xff, bytes);
  arrays.push_back({key, allocation, data});
  races::watch(data, bytes, name, /*initialised=*/false);
  return data;
}

void begin_shared_memory(size_t dynamic_bytes) {
  static_shared(nullptr, "dynamic shared memory", dynamic_bytes, 16);
}

void* dynamic_shared() { return arrays.front().data; }

void end_shared_memory() {
  for (const SharedArray& array : arrays) {
    races::forget(array.data);
    std::free(array.allocation);
  }
  arrays.clear();
}

}  // namespace simulator
