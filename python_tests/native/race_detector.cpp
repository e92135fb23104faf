// Compiled only into the race-checking drivers, itself without -fsanitize=thread.
//
// Order between two accesses of a block: by the count of block barriers, and among the lanes of a warp by
// vector clocks (each lane's own clock, and how far it knows the others'), which __syncwarp() joins.
#include "race_detector.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "fibers.h"

namespace simulator::races {
namespace {

constexpr unsigned kWarp = 32;

struct Access {
  uint32_t block = 0;  // numbered from 1 through all launches; 0: none
  uint32_t thread = 0;
  uint32_t epoch = 0;  // block barriers before it
  uint32_t clock = 0;  // of the lane
  uintptr_t code = 0;
  bool atomic = false;
};

// One byte of memory. Two reads by different warps are enough to find the race of nearly every write.
struct Cell {
  Access write, reads[2];
  bool initialised = false;
};

struct Region {
  const char* begin;
  const char* end;
  std::string name;
  bool initialised;         // from the start, as inputs are
  std::vector<Cell> cells;  // made at the first access
};

struct LaneClocks {
  uint32_t known[kWarp];  // known[own lane] is its own clock
};

std::vector<Region> regions;
Region* recent = nullptr;
std::vector<LaneClocks> clocks;
std::vector<uint3> block_indices;  // of the launch's blocks, in the order they ran
uint32_t block = 0, first_block_of_launch = 1, epoch = 0, thread = 0;
bool in_kernel = false;

Region* find_region(const char* address) {
  if (recent && address >= recent->begin && address < recent->end) return recent;
  for (Region& region : regions) {
    if (address >= region.begin && address < region.end) return recent = &region;
  }
  return nullptr;
}

Access current_access(uintptr_t code, bool atomic) {
  return {block, thread, epoch, clocks[thread].known[thread % kWarp], code, atomic};
}

// Whether a past access is certain to come before what the running thread does now.
bool is_ordered(const Access& past) {
  if (past.block < first_block_of_launch) return true;  // also: none
  if (past.block != block) return false;
  if (past.thread == thread || past.epoch < epoch) return true;
  return past.thread / kWarp == thread / kWarp && past.clock <= clocks[thread].known[past.thread % kWarp];
}

bool same_warp(const Access& a, const Access& b) {
  return a.block == b.block && a.thread / kWarp == b.thread / kWarp;
}

void remember_read(Cell& cell, const Access& access) {
  Access& first = cell.reads[0];
  Access& second = cell.reads[1];
  if (is_ordered(first)) {
    first = access;
  } else if (is_ordered(second) || same_warp(first, second)) {
    second = access;
  }
}

// ------------------------------------------------------------------------------------------- messages

std::string describe(const char* verb, const Access& access) {
  const uint3 index = block_indices[access.block - first_block_of_launch];
  char text[160];
  std::snprintf(text, sizeof(text), "%s%s by block (%u,%u,%u) thread (%u,%u,%u)",
                access.atomic ? "atomic " : "", verb, index.x, index.y, index.z, access.thread % blockDim.x,
                access.thread / blockDim.x % blockDim.y, access.thread / (blockDim.x * blockDim.y));
  return text;
}

// Lines of the source, innermost first. The driver is linked at a fixed address.
void print_source(const char* title, uintptr_t code) {
  std::fprintf(stderr, "%s\n", title);
  std::fflush(stderr);
  char command[160];
  // The address is where the call returns to, hence - 1.
  std::snprintf(command, sizeof(command), "addr2line -i -e /proc/%d/exe 0x%zx 1>&2",
                static_cast<int>(getpid()), static_cast<size_t>(code - 1));
  if (std::system(command) != 0) std::fprintf(stderr, "  (addr2line is missing)\n");
}

[[noreturn]] void report_race(const Region& region, const char* address, const char* past_verb,
                              const Access& past, const char* verb, const Access& access) {
  in_kernel = false;
  print_source("earlier access at:", past.code);
  print_source("later access at:", access.code);
  fail("data race in %s at byte %zu: %s, %s, and no barrier between them", region.name.c_str(),
       static_cast<size_t>(address - region.begin), describe(past_verb, past).c_str(),
       describe(verb, access).c_str());
}

[[noreturn]] void report_uninitialised(const Region& region, const char* address, const Access& access) {
  in_kernel = false;
  print_source("access at:", access.code);
  fail("read of uninitialised memory in %s at byte %zu", region.name.c_str(),
       static_cast<size_t>(address - region.begin));
}

// -------------------------------------------------------------------------------------------- accesses

void check(const Region& region, const char* address, Cell& cell, const Access& access, bool reads,
           bool writes) {
  const bool plain = !access.atomic;
  if (reads && !cell.initialised) report_uninitialised(region, address, access);
  const char* verb = writes ? (reads ? "update" : "write") : "read";
  if ((plain || !cell.write.atomic) && !is_ordered(cell.write)) {
    report_race(region, address, "write", cell.write, verb, access);
  }
  if (writes) {
    for (const Access& read : cell.reads) {
      if (!is_ordered(read)) report_race(region, address, "read", read, verb, access);
    }
    cell.write = access;
    cell.initialised = true;
  } else {
    remember_read(cell, access);
  }
}

void on_access(const void* pointer, size_t bytes, const void* code, bool reads, bool writes, bool atomic) {
  const char* address = static_cast<const char*>(pointer);
  Region* region = find_region(address);
  if (!region) return;
  if (region->cells.empty()) {
    region->cells.resize(static_cast<size_t>(region->end - region->begin));
    for (Cell& cell : region->cells) cell.initialised = region->initialised;
  }
  const auto first = static_cast<size_t>(address - region->begin);
  const size_t last = std::min(first + bytes, region->cells.size());
  if (!in_kernel) {  // the code around the launches
    for (size_t i = first; writes && i < last; ++i) region->cells[i].initialised = true;
    return;
  }
  const Access access = current_access(reinterpret_cast<uintptr_t>(code), atomic);
  for (size_t i = first; i < last; ++i)
    check(*region, region->begin + i, region->cells[i], access, reads, writes);
}

}  // namespace

void watch(const void* begin, size_t bytes, const char* name, bool initialised) {
  const char* address = static_cast<const char*>(begin);
  recent = nullptr;
  if (bytes) regions.push_back({address, address + bytes, name, initialised, {}});
}

void forget(const void* begin) {
  recent = nullptr;
  std::erase_if(regions, [begin](const Region& region) { return region.begin == begin; });
}

void begin_launch() {
  first_block_of_launch = block + 1;
  block_indices.clear();
  in_kernel = true;
}

void end_launch() {
  in_kernel = false;
  first_block_of_launch = block + 1;
}

void begin_block(unsigned threads) {
  ++block;
  block_indices.push_back(blockIdx);
  epoch = 0;
  clocks.assign(threads, {});
  for (unsigned i = 0; i < threads; ++i) clocks[i].known[i % kWarp] = 1;
}

void set_thread(unsigned thread_) { thread = thread_; }

void order_block() { ++epoch; }

void order_lanes(unsigned warp, unsigned mask) {
  LaneClocks joined{};
  const size_t start = size_t{warp} * kWarp;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    for (unsigned i = 0; i < kWarp; ++i) {
      joined.known[i] = std::max(joined.known[i], clocks[start + lane].known[i]);
    }
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    clocks[start + lane] = joined;
    ++clocks[start + lane].known[lane];
  }
}

void on_atomic(const void* address, size_t bytes, const void* code) {
  on_access(address, bytes, code, /*reads=*/true, /*writes=*/true, /*atomic=*/true);
}

}  // namespace simulator::races

// ------------------------------------------------------- what -fsanitize=thread calls in kernel code

namespace {

void on_plain(const void* address, size_t bytes, const void* code, bool writes) {
  static bool busy = false;  // the containers above may be compiled with the calls in
  if (busy) return;
  busy = true;
  simulator::races::on_access(address, bytes, code, !writes, writes, /*atomic=*/false);
  busy = false;
}

}  // namespace

#define EFFOPS_ACCESS(bytes)                                                                               \
  void __tsan_read##bytes(void* address) { on_plain(address, bytes, __builtin_return_address(0), false); } \
  void __tsan_write##bytes(void* address) { on_plain(address, bytes, __builtin_return_address(0), true); }

extern "C" {
EFFOPS_ACCESS(1)
EFFOPS_ACCESS(2)
EFFOPS_ACCESS(4)
EFFOPS_ACCESS(8)
EFFOPS_ACCESS(16)
void __tsan_read_range(void* address, size_t bytes) {
  on_plain(address, bytes, __builtin_return_address(0), false);
}
void __tsan_write_range(void* address, size_t bytes) {
  on_plain(address, bytes, __builtin_return_address(0), true);
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
#undef EFFOPS_ACCESS
