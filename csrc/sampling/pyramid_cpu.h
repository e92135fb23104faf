// Running kernels over the maps of a pyramid on the CPU.
//
// Items (points, RoIs) are put in order of the image of a map that they read. The channels of such an image
// are cut into slices. Forward, a task is a slice and some of its items; backward it is a slice and some of
// its rows, which the task owns: it visits all items of the image in order and needs no atomics. Neither
// result depends on the number of threads.
//
// Kernels are vectorised over channels. Maps whose channels lie apart are packed first where that costs
// less than it saves; else their channels are taken one by one, or kernels pack the pixels that they read.
#pragma once

#include <algorithm>
#include <cstring>

#include "../common/dtype_switch.h"
#include "../common/parallel.h"
#include "../common/scratch.h"
#include "pyramid.h"
#include "pyramid_cpu_kernel.h"

namespace effops::sampling {

constexpr int64_t kSliceRegisters = 4;         // of channels, in packed slices
constexpr int64_t kPixelsPerTask = 4096;       // of packing
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kSerialWork = 1 << 14;       // reads that are not worth a second thread
constexpr int64_t kSumBytes = 1 << 20;         // of a backward task, to stay in the second-level cache

// Items in the order of their image: those of image m have the places begin[m] to begin[m + 1].
struct Buckets {
  std::vector<int64_t> begin;
  std::vector<int64_t> order;  // item of each place; empty: the items come in this order

  int64_t item(int64_t place) const { return order.empty() ? place : order[place]; }
};

// image_of(i) is the image of item i < count; it is called for all items in order, then perhaps again.
template <typename F>
Buckets sort_by_image(int64_t count, int64_t images, const F& image_of) {
  Buckets buckets{std::vector<int64_t>(images + 1, 0), {}};
  bool sorted = true;
  int64_t last = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t image = image_of(i);
    sorted = sorted && last <= image;
    last = image;
    ++buckets.begin[image + 1];
  }
  for (int64_t m = 0; m < images; ++m) buckets.begin[m + 1] += buckets.begin[m];
  if (sorted) return buckets;
  buckets.order.resize(count);
  std::vector<int64_t> next(buckets.begin.begin(), buckets.begin.end() - 1);
  for (int64_t i = 0; i < count; ++i) buckets.order[next[image_of(i)]++] = i;
  return buckets;
}

// Some channels of one image of a map, and the places of the items that read it.
struct SliceUnit {
  int64_t level, image, first_channel;
  int64_t index;       // of the slice in its image
  int64_t begin, end;  // places
  MapSlice slice;
  int64_t packed_bytes;  // 0: read in place
};

// Calls f(slice, first channel): once where kernels are vectorised over channels; else for each channel, so
// that all items read one plane, which fits a cache, before the next.
template <typename F>
void for_channel_groups(const SliceUnit& unit, int64_t type_size, const F& f) {
  if (unit.slice.padded > 0) return f(unit.slice, unit.first_channel);
  MapSlice plane = unit.slice;
  plane.channels = 1;
  for (int64_t channel = 0; channel < unit.slice.channels; ++channel) {
    plane.data = static_cast<const char*>(unit.slice.data) + channel * unit.slice.channel_stride * type_size;
    f(plane, unit.first_channel + channel);
  }
}

template <typename F>
void run_tasks(int64_t count, bool serial, const F& run) {
  parallel_for(count, serial ? std::max<int64_t>(count, 1) : 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) run(task);
  });
}

// What a kernel does with channels that lie apart.
enum class StridedChannels { kOneByOne, kPacks };

class PyramidRunner {
 public:
  // `reads` gives, for the items at places begin to end, how many elements of a channel they read.
  template <typename F>
  PyramidRunner(const std::vector<Tensor>& pyramid, const Buckets& buckets, StridedChannels strided,
                const F& reads)
      : pyramid_(pyramid),
        strided_(strided),
        type_(float_type_of(pyramid[0].scalar_type())),
        type_size_(static_cast<int64_t>(pyramid[0].element_size())),
        lanes_(pyramid_kernels().float_lanes / (type_ == FloatType::kDouble ? 2 : 1)) {
    const int64_t batch = pyramid[0].size(0);
    for (size_t m = 0; m + 1 < buckets.begin.size(); ++m) {
      const int64_t begin = buckets.begin[m], end = buckets.begin[m + 1];
      if (begin == end) continue;
      const int64_t count = reads(begin, end);
      work_ += count * pyramid[0].size(1);
      images_.push_back(
          {static_cast<int64_t>(m) / batch, static_cast<int64_t>(m) % batch, begin, end, count});
    }
  }

  // Slices that an image is cut into, at most.
  int64_t slices() const {
    int64_t count = 1;
    for (const SliceUnit& unit : read_units()) count = std::max(count, unit.index + 1);
    return count;
  }

  // Calls f(unit, begin, end) for all slices and blocks of their items, on all threads.
  template <typename F>
  void read(int64_t least_items, const F& f) const {
    std::vector<SliceUnit> units = read_units();
    std::vector<size_t> ends;  // of groups of units whose packed slices are in memory at one time
    int64_t most_bytes = 0, bytes = 0;
    for (size_t u = 0, first = 0; u < units.size(); ++u) {
      bytes += units[u].packed_bytes;
      most_bytes = std::max(most_bytes, bytes);
      const bool full = u + 1 - first >= static_cast<size_t>(num_threads()) && bytes > 0;
      if (!full && u + 1 < units.size()) continue;
      ends.push_back(first = u + 1);
      bytes = 0;
    }
    const Scratch packed(most_bytes);
    size_t first = 0;
    for (const size_t end : ends) {
      pack(units, first, end, packed);
      run_items(units, first, end, least_items, f);
      first = end;
    }
  }

  // Calls f(unit, sums) for all slices, with zeros to add the gradients of some rows to; puts the sums into
  // the gradients, which are zeros.
  template <typename T, typename F>
  void sum(const std::vector<Tensor>& gradients, const F& f) const {  // L x [B, C, H_l, W_l]
    std::vector<SumTask> tasks = sum_tasks(sizeof(accumulator_t<T>));
    run_tasks(static_cast<int64_t>(tasks.size()), work_ < kSerialWork, [&](int64_t i) {
      const SumTask& task = tasks[i];
      const Tensor& gradient = gradients[task.unit.level];
      if (task.unit.slice.padded > 0) {
        sum_rows<T>(task, gradient, f);
      } else {
        sum_planes<T>(task, gradient, f);
      }
    });
  }

 private:
  struct Image {
    int64_t level, image, begin, end, reads;
  };
  struct SumTask {
    SliceUnit unit;
    int64_t row_begin, row_end;
  };

  int64_t slice_width() const { return kSliceRegisters * lanes_; }
  int64_t pad(int64_t channels) const { return (channels + lanes_ - 1) / lanes_ * lanes_; }

  // Measured: moving an element into a packed map and out of it, 1 ns; a scattered read of a single channel,
  // 1 ns; with the loops around it in roi_align, 4 ns, or 1/2 ns where the kernel packs.
  bool is_worth_packing(const Image& image, double cost_of_read) const {
    const Tensor& map = pyramid_[image.level];
    const int64_t elements = map.size(2) * map.size(3) * pad(map.size(1));
    return static_cast<double>(image.reads * map.size(1)) * cost_of_read > static_cast<double>(elements);
  }

  // Few channels would leave most lanes empty.
  bool kernel_packs() const {
    return strided_ == StridedChannels::kPacks && pyramid_[0].size(1) > lanes_ / 2;
  }
  double cost_of_single_read() const { return strided_ == StridedChannels::kPacks ? 4.0 : 1.0; }

  // All channels of one image of a map, where they lie.
  SliceUnit whole_unit(const Image& image) const {
    const Tensor& map = pyramid_[image.level];
    const char* data = static_cast<const char*>(map.const_data_ptr());
    return {image.level,
            image.image,
            0,
            0,
            image.begin,
            image.end,
            {data + image.image * map.stride(0) * type_size_, map.stride(2), map.stride(3), map.stride(1),
             map.size(1), 0},
            0};
  }

  // Calls f(unit) for slices of at most kSliceRegisters registers.
  template <typename F>
  void for_slices(const SliceUnit& whole, const F& f) const {
    const int64_t width = slice_width();
    for (int64_t channel = 0; channel < whole.slice.channels; channel += width) {
      SliceUnit unit = whole;
      unit.first_channel = channel;
      unit.index = channel / width;
      unit.slice.channels = std::min(width, whole.slice.channels - channel);
      unit.slice.padded = pad(unit.slice.channels);
      f(unit);
    }
  }

  std::vector<SliceUnit> read_units() const {
    std::vector<SliceUnit> units;
    for (const Image& image : images_) {
      SliceUnit whole = whole_unit(image);
      if (whole.slice.channel_stride == 1 && whole.slice.channels % lanes_ == 0) {
        whole.slice.padded = whole.slice.channels;
        units.push_back(whole);
      } else if (is_worth_packing(image, kernel_packs() ? 0.5 : cost_of_single_read())) {
        const Tensor& map = pyramid_[image.level];
        for_slices(whole, [&](SliceUnit& unit) {
          unit.packed_bytes = map.size(2) * map.size(3) * unit.slice.padded * type_size_;
          units.push_back(unit);
        });
      } else if (kernel_packs()) {
        whole.slice.padded = pad(whole.slice.channels);
        whole.slice.kernel_packs = true;
        units.push_back(whole);
      } else {
        for_slices(whole, [&](SliceUnit& unit) {
          const char* data = static_cast<const char*>(unit.slice.data);
          unit.slice.data = data + unit.first_channel * unit.slice.channel_stride * type_size_;
          unit.slice.padded = 0;
          units.push_back(unit);
        });
      }
    }
    return units;
  }

  void pack(std::vector<SliceUnit>& units, size_t first, size_t last, const Scratch& memory) const {
    struct PackTask {
      const SliceUnit* unit;
      PackSource source;
      void* target;
      int64_t begin, end;
    };
    std::vector<PackTask> tasks;
    int64_t offset = 0;
    for (size_t u = first; u < last; ++u) {
      SliceUnit& unit = units[u];
      if (unit.packed_bytes == 0) continue;
      const Tensor& map = pyramid_[unit.level];
      const int64_t height = map.size(2), width = map.size(3), pixels = height * width;
      MapSlice& slice = unit.slice;
      PackSource source{
          static_cast<const char*>(slice.data) + unit.first_channel * slice.channel_stride * type_size_,
          width, slice.row_stride, slice.pixel_stride, slice.channel_stride};
      if (source.row_stride == width * source.pixel_stride) source.width = std::max<int64_t>(pixels, 1);
      void* target = memory.at(offset);
      offset += unit.packed_bytes;
      for (int64_t begin = 0; begin < pixels; begin += kPixelsPerTask) {
        tasks.push_back({&unit, source, target, begin, std::min(begin + kPixelsPerTask, pixels)});
      }
      slice.data = target;
      slice.pixel_stride = slice.padded;
      slice.row_stride = width * slice.padded;
      slice.channel_stride = 1;
    }
    const auto pack = pyramid_kernels().pack[static_cast<int>(type_)];
    run_tasks(static_cast<int64_t>(tasks.size()), work_ < kSerialWork, [&](int64_t i) {
      const PackTask& task = tasks[i];
      pack(task.source, task.begin, task.end, task.unit->slice.channels, task.unit->slice.padded,
           task.target);
    });
  }

  template <typename F>
  void run_items(const std::vector<SliceUnit>& units, size_t first, size_t last, int64_t least_items,
                 const F& f) const {
    struct ItemTask {
      const SliceUnit* unit;
      int64_t begin, end;
    };
    int64_t total = 0;
    for (size_t u = first; u < last; ++u) total += units[u].end - units[u].begin;
    const int64_t block = std::max(least_items, total / (kTasksPerThread * num_threads()));
    std::vector<ItemTask> tasks;
    for (size_t u = first; u < last; ++u) {
      for (int64_t begin = units[u].begin; begin < units[u].end; begin += block) {
        tasks.push_back({&units[u], begin, std::min(begin + block, units[u].end)});
      }
    }
    run_tasks(static_cast<int64_t>(tasks.size()), work_ < kSerialWork,
              [&](int64_t i) { f(*tasks[i].unit, tasks[i].begin, tasks[i].end); });
  }

  // Slices and rows, or single channels where the items are few.
  std::vector<SumTask> sum_tasks(int64_t accumulator_size) const {
    std::vector<SumTask> tasks;
    const int64_t wanted = kTasksPerThread * num_threads();
    for (const Image& image : images_) {
      const SliceUnit whole = whole_unit(image);
      const int64_t height = pyramid_[image.level].size(2), width = pyramid_[image.level].size(3);
      if (height * width == 0) continue;  // no gradients to write
      if (!is_worth_packing(image, cost_of_single_read())) {
        for (int64_t channel = 0; channel < whole.slice.channels; ++channel) {
          tasks.push_back({whole, 0, height});
          tasks.back().unit.first_channel = channel;
        }
        continue;
      }
      const int64_t slices = (whole.slice.channels + slice_width() - 1) / slice_width();
      const int64_t units = static_cast<int64_t>(images_.size()) * slices;
      for_slices(whole, [&](const SliceUnit& unit) {
        const int64_t bytes = height * width * unit.slice.padded * accumulator_size;
        const int64_t parts =
            std::clamp<int64_t>(std::max(wanted / units, bytes / kSumBytes), 1, std::max<int64_t>(height, 1));
        for (int64_t part = 0; part < parts; ++part) {
          tasks.push_back({unit, part * height / parts, (part + 1) * height / parts});
        }
      });
    }
    return tasks;
  }

  template <typename T, typename F>
  void sum_rows(const SumTask& task, const Tensor& gradient, const F& f) const {
    using A = accumulator_t<T>;
    const MapSlice& slice = task.unit.slice;
    const int64_t width = gradient.size(3), plane = gradient.size(2) * width;
    const int64_t pixels = (task.row_end - task.row_begin) * width;
    const int64_t bytes = pixels * slice.padded * static_cast<int64_t>(sizeof(A));
    const Scratch memory(bytes);
    memset(memory.at(0), 0, bytes);
    f(task.unit, SumSlice{memory.at(0), task.row_begin, task.row_end, width * slice.padded, slice.padded,
                          slice.channels, slice.padded, 1});
    T* target = static_cast<T*>(gradient.mutable_data_ptr()) +
                (task.unit.image * gradient.size(1) + task.unit.first_channel) * plane +
                task.row_begin * width;
    pyramid_kernels().unpack[static_cast<int>(type_)](memory.at(0), slice.padded, pixels, slice.channels,
                                                      target, plane);
  }

  template <typename T, typename F>
  void sum_planes(const SumTask& task, const Tensor& gradient, const F& f) const {
    using A = accumulator_t<T>;
    const int64_t width = gradient.size(3), plane = gradient.size(2) * width;
    T* target = static_cast<T*>(gradient.mutable_data_ptr()) +
                (task.unit.image * gradient.size(1) + task.unit.first_channel) * plane;
    const auto run = [&](void* sums) {
      f(task.unit, SumSlice{sums, task.row_begin, task.row_end, width, 1, 1, 0, plane});
    };
    if constexpr (std::is_same_v<T, A>) {
      run(target);
    } else {
      const int64_t bytes = plane * static_cast<int64_t>(sizeof(A));
      const Scratch memory(bytes);
      memset(memory.at(0), 0, bytes);
      run(memory.at(0));
      pyramid_kernels().unpack[static_cast<int>(type_)](memory.at(0), 1, plane, 1, target, plane);
    }
  }

  const std::vector<Tensor>& pyramid_;
  StridedChannels strided_;
  FloatType type_;
  int64_t type_size_;
  int64_t lanes_;
  int64_t work_ = 0;
  std::vector<Image> images_;
};

}  // namespace effops::sampling
