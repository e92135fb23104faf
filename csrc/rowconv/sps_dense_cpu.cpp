// sps_from_dense and sps_to_dense on the CPU: checks, rows of the cells, sums of the passive rows' gradients.
// The kernels that copy are in row_copy_cpu_kernel.cpp.
#include <algorithm>
#include <tuple>

#include "../common/dtype_switch.h"
#include "../common/parallel.h"
#include "../common/scratch.h"
#include "planes_cpu.h"
#include "sps_cpu.h"
#include "sps_dense.h"

namespace effops::rowconv {
namespace {

constexpr int64_t kBlockCells = 1024;  // whose active cells are counted at a time
constexpr int64_t kGrain = 1 << 15;  // elements of a task, at least

// ---------------------------------------------------------------- sps_from_dense

// How many active cells lie before each block of cells; the last entry: how many there are.
std::vector<int64_t> count_active(const bool* mask, int64_t cells) {
  const int64_t blocks = divide_up(cells, kBlockCells);
  std::vector<int64_t> before(blocks + 1, 0);
  parallel_for(blocks, 64, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      before[b + 1] = std::count(mask + b * kBlockCells, mask + std::min((b + 1) * kBlockCells, cells), true);
    }
  });
  for (int64_t b = 0; b < blocks; ++b) before[b + 1] += before[b];
  return before;
}

struct NewSps {
  Tensor active, passive, index_map, roi, xy;
};

template <typename Id>
class SpsWriter {
 public:
  SpsWriter(const NewSps& sps, int64_t width, const bool* mask)
      : mask_(mask),
        width_(static_cast<int32_t>(width)),
        num_active_(sps.active.size(0)),
        row_bytes_(sps.active.size(1) * static_cast<int64_t>(sps.active.element_size())),
        active_(static_cast<char*>(sps.active.mutable_data_ptr())),
        passive_(static_cast<char*>(sps.passive.mutable_data_ptr())),
        ids_(static_cast<Id*>(sps.index_map.mutable_data_ptr())),
        roi_(static_cast<int32_t*>(sps.roi.mutable_data_ptr())),
        xy_(static_cast<int32_t*>(sps.xy.mutable_data_ptr())) {}

  // Everything about the cells of a run but their features, for which it fills in `rows`. `next`: how many
  // active cells lie before the run. Returns the same for the next run.
  int64_t write(const Run& run, int64_t next, void** rows) const {
    int32_t cells[2 * (kCopyTile + 1)];  // one more: what lies after the last active cell is overwritten
    auto x = static_cast<int32_t>(run.x), y = static_cast<int32_t>(run.y);
    int64_t found = 0;
    for (int64_t i = 0; i < run.count; ++i) {
      const bool is_active = mask_[run.first + i];
      const int64_t id = next + found, passive_row = run.first + i - id;
      ids_[run.first + i] = static_cast<Id>(is_active ? id : num_active_ + passive_row);
      rows[i] = is_active ? active_ + id * row_bytes_ : passive_ + passive_row * row_bytes_;
      cells[2 * found] = x;
      cells[2 * found + 1] = y;
      found += is_active;
      const bool row_ends = ++x == width_;
      x = row_ends ? 0 : x;
      y += row_ends;
    }
    std::copy_n(cells, 2 * found, xy_ + 2 * next);
    std::fill_n(roi_ + next, found, static_cast<int32_t>(run.roi));
    return next + found;
  }

 private:
  const bool* mask_;
  int32_t width_;
  int64_t num_active_, row_bytes_;
  char *active_, *passive_;
  Id* ids_;
  int32_t *roi_, *xy_;
};

template <typename Id>
void write_sps(const Tensor& x, const bool* mask, const std::vector<int64_t>& before, const NewSps& sps) {
  const Planes planes(x);
  const SpsWriter<Id> writer(sps, x.size(3), mask);
  const int64_t channels = x.size(1), cells = sps.index_map.numel();
  const auto to_rows = row_copy_kernels().to_rows[size_index(static_cast<int64_t>(x.element_size()))];
  const int64_t grain = kGrain / (kBlockCells * (channels + 1)) + 1;
  parallel_for(static_cast<int64_t>(before.size()) - 1, grain, [&](int64_t begin, int64_t end) {
    void* rows[kCopyTile];
    int64_t next = before[begin];
    planes.for_runs(begin * kBlockCells, std::min(end * kBlockCells, cells),
                    [&](const Run& run, const PlaneRun& elements) {
                      next = writer.write(run, next, rows);
                      to_rows(elements, run.count, channels, rows);
                    });
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sps_from_dense(const Tensor& x,  // [R, F, H, W]
                                                                  const Tensor& mask) {  // [R, H, W]
  const DenseShape shape = check_sps_from_dense(x, mask);
  const Tensor contiguous = as_contiguous(mask);
  const auto* marks = static_cast<const bool*>(contiguous.const_data_ptr());
  const std::vector<int64_t> before = count_active(marks, shape.cells());
  const int64_t active = before.back(), passive = shape.cells() - active;
  const ScalarType id_type = shape.wide_map() ? ScalarType::Long : ScalarType::Int;
  const NewSps sps{empty_of(x, {active, shape.features}), empty_of(x, {passive, shape.features}),
                   empty_of(x, {shape.maps, shape.height, shape.width}, id_type),
                   empty_of(x, {active}, ScalarType::Int), empty_of(x, {active, 2}, ScalarType::Int)};
  if (shape.wide_map()) {
    write_sps<int64_t>(x, marks, before, sps);
  } else {
    write_sps<int32_t>(x, marks, before, sps);
  }
  return {sps.active, sps.passive, sps.index_map, sps.roi, sps.xy};
}

// ---------------------------------------------------------------- rows to planes

// output[r, :, y, x] = cat([active, passive])[index_map[r, y, x]]
Tensor rows_to_planes(const char* op, const SpsShape& shape, const Tensor& active, const Tensor& passive,
                      const Tensor& index_map) {
  const Tensor map = checked_index_map(op, index_map, shape);
  const Tensor active_rows = as_contiguous(active), passive_rows = as_contiguous(passive);
  Tensor output = empty_of(active, {shape.maps, shape.features, shape.height, shape.width});
  const auto element = static_cast<int64_t>(active.element_size());
  const int64_t row_bytes = shape.features * element, plane = shape.height * shape.width;
  const auto* first_active = static_cast<const char*>(active_rows.const_data_ptr());
  const auto* first_passive = static_cast<const char*>(passive_rows.const_data_ptr());
  auto* out = static_cast<char*>(output.mutable_data_ptr());
  const auto to_planes = row_copy_kernels().to_planes[size_index(element)];
  const Planes planes(output);
  with_ids(map, [&](const auto* ids) {
    parallel_for(map.numel(), kGrain / (shape.features + 1) + 1, [&](int64_t begin, int64_t end) {
      const void* rows[kCopyTile];
      planes.for_runs(begin, end, [&](const Run& run, const PlaneRun&) {
        for (int64_t i = 0; i < run.count; ++i) {
          const int64_t id = ids[run.first + i], passive_row = id - shape.active;
          rows[i] = passive_row < 0 ? first_active + id * row_bytes : first_passive + passive_row * row_bytes;
        }
        const int64_t channel_0 = run.first + run.roi * (shape.features - 1) * plane;
        to_planes(rows, run.count, shape.features, out + channel_0 * element, plane);
      });
    });
  });
  return output;
}

Tensor sps_from_dense_backward(const Tensor& grad_active,  // [NA, F]
                               const Tensor& grad_passive,  // [NP, F]
                               const Tensor& index_map) {  // [R, H, W]
  const SpsShape shape = check_sps_from_dense_grad(grad_active, grad_passive, index_map);
  return rows_to_planes("sps_from_dense_backward", shape, grad_active, grad_passive, index_map);
}

Tensor sps_to_dense(const Tensor& active,  // [NA, F]
                    const Tensor& passive,  // [NP, F]
                    const Tensor& index_map,  // [R, H, W]
                    const Tensor& roi,  // [NA]
                    const Tensor& xy) {  // [NA, 2]
  const SpsShape shape = check_sps_to_dense(active, passive, index_map, roi, xy);
  return rows_to_planes("sps_to_dense", shape, active, passive, index_map);
}

// ---------------------------------------------------------------- sps_to_dense, backward

// Where the passive rows stand.
struct PassiveCells {
  std::vector<int64_t> first;  // cell of each row, -1: none
  bool in_several_maps = false;  // some row is
};

template <typename Id>
PassiveCells find_passive_cells(const Id* ids, const SpsShape& shape) {
  PassiveCells cells{std::vector<int64_t>(shape.passive, -1)};
  const int64_t plane = shape.height * shape.width;
  for (int64_t map_begin = 0; map_begin < shape.maps * plane; map_begin += plane) {
    for (int64_t cell = map_begin; cell < map_begin + plane; ++cell) {
      const int64_t row = ids[cell] - shape.active;
      if (row < 0) continue;
      cells.in_several_maps |= cells.first[row] >= 0 && cells.first[row] < map_begin;
      if (cells.first[row] < 0) cells.first[row] = cell;
    }
  }
  return cells;
}

// One pass over the gradient's planes. An active row takes the elements of its cell, a passive row the sum
// over its cells in their order. A task owns some channels of all rows or, if no row stands in several maps,
// some channels of the rows of a map; the sums are the same either way.
template <typename T, typename Id>
class DenseGradient {
 public:
  using A = accumulator_t<T>;

  DenseGradient(const Tensor& grad_output, const Id* ids, const Cells& cells, const SpsShape& shape,
                const Tensor& grad_active, const Tensor& grad_passive, bool need_active, bool need_passive)
      : planes_(grad_output),
        ids_(ids),
        cells_(cells),
        shape_(shape),
        passive_cells_(need_passive ? find_passive_cells(ids, shape) : PassiveCells{}),
        type_(static_cast<int>(float_type_of(grad_output.scalar_type()))),
        need_active_(need_active),
        need_passive_(need_passive),
        grad_active_(static_cast<T*>(grad_active.mutable_data_ptr())),
        grad_passive_(static_cast<T*>(grad_passive.mutable_data_ptr())),
        wide_sums_(kInPlace || !need_passive ? 0 : shape.passive * shape.features) {
    if constexpr (kInPlace) {
      sums_ = grad_passive_;
    } else {
      sums_ = wide_sums_.data();
    }
  }

  void run() {
    take_cells();
    if (need_active_) take_lost_rows();
    if (need_passive_) finish_sums();
  }

 private:
  static constexpr bool kInPlace = std::is_same_v<T, A>;
  static constexpr int64_t kLeastChannels = 16;  // of a task: half a cache line or more

  struct Later {
    int64_t in_tile, row;
  };

  void take_cells() const {
    const int64_t plane = shape_.height * shape_.width;
    const int64_t groups = passive_cells_.in_several_maps ? 1 : std::max<int64_t>(shape_.maps, 1);
    const int64_t cells = shape_.maps / groups * plane;
    const int64_t wanted = divide_up(4 * num_threads(), groups);
    const int64_t slices =
        num_threads() == 1 ? 1 : std::clamp<int64_t>(shape_.features / kLeastChannels, 1, wanted);
    const int64_t width = divide_up(shape_.features, slices);
    const int64_t grain = kGrain / (cells * width + 1) + 1;
    parallel_for(groups * slices, grain, [&](int64_t begin, int64_t end) {
      const Scratch tile(kCopyTile * width * static_cast<int64_t>(sizeof(T)));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t group = task / slices, channel = task % slices * width;
        const int64_t channels = std::min(width, shape_.features - channel);
        if (channels <= 0) continue;
        planes_.for_runs(group * cells, (group + 1) * cells, [&](const Run& run, const PlaneRun& elements) {
          take_run(run, elements, channel, channels, static_cast<T*>(tile.at(0)));
        });
      }
    });
  }

  void take_run(const Run& run, PlaneRun elements, int64_t channel, int64_t channels, T* tile) const {
    void* rows[kCopyTile];
    Later later[kCopyTile];
    int64_t number = 0;
    bool wanted = false;
    for (int64_t i = 0; i < run.count; ++i) {
      const int64_t cell = run.first + i, id = ids_[cell], passive = id - shape_.active;
      rows[i] = tile + i * channels;
      if (passive < 0 && need_active_ && cells_.flat(id) == cell) {
        rows[i] = grad_active_ + id * shape_.features + channel;
        wanted = true;
      } else if (passive >= 0 && need_passive_ && kInPlace && passive_cells_.first[passive] == cell) {
        rows[i] = grad_passive_ + passive * shape_.features + channel;
        wanted = true;
      } else if (passive >= 0 && need_passive_) {
        later[number++] = {i, passive};
      }
    }
    if (!wanted && number == 0) return;
    elements.data = static_cast<const T*>(elements.data) + channel * elements.channel_stride;
    row_copy_kernels().to_rows[size_index(sizeof(T))](elements, run.count, channels, rows);
    const auto add = row_copy_kernels().add[type_];
    for (int64_t k = 0; k < number; ++k) {
      add(rows[later[k].in_tile], channels, sums_ + later[k].row * shape_.features + channel);
    }
  }

  // Active rows that the map doesn't show where they say that they stand.
  void take_lost_rows() const {
    for (int64_t row = 0; row < shape_.active; ++row) {
      const int64_t cell = cells_.flat(row);
      if (ids_[cell] == row) continue;
      void* target = grad_active_ + row * shape_.features;
      planes_.for_runs(cell, cell + 1, [&](const Run&, const PlaneRun& elements) {
        row_copy_kernels().to_rows[size_index(sizeof(T))](elements, 1, shape_.features, &target);
      });
    }
  }

  void finish_sums() const {
    const int64_t features = shape_.features;
    parallel_for(shape_.passive, kGrain / (features + 1) + 1, [&](int64_t begin, int64_t end) {
      if constexpr (!kInPlace) {
        row_copy_kernels().round[type_](sums_ + begin * features, (end - begin) * features,
                                        grad_passive_ + begin * features);
      } else {
        for (int64_t row = begin; row < end; ++row) {
          if (passive_cells_.first[row] < 0) std::fill_n(grad_passive_ + row * features, features, T(0));
        }
      }
    });
  }

  Planes planes_;
  const Id* ids_;
  const Cells& cells_;
  SpsShape shape_;
  PassiveCells passive_cells_;
  int type_;
  bool need_active_, need_passive_;
  T *grad_active_, *grad_passive_;
  std::vector<A> wide_sums_;
  A* sums_;
};

std::tuple<Tensor, Tensor> sps_to_dense_backward(const Tensor& grad_output,  // [R, F, H, W]
                                                 const Tensor& active,  // [NA, F]
                                                 const Tensor& passive,  // [NP, F]
                                                 const Tensor& index_map,  // [R, H, W]
                                                 const Tensor& roi,  // [NA]
                                                 const Tensor& xy,  // [NA, 2]
                                                 bool need_active, bool need_passive,
                                                 bool /*deterministic: always*/) {
  constexpr const char* op = "sps_to_dense_backward";
  const SpsShape shape = check_sps_to_dense(active, passive, index_map, roi, xy);
  check_sps_to_dense_grad(grad_output, active, shape);
  const Tensor map = checked_index_map(op, index_map, shape);
  const Cells cells(op, roi, xy, shape);
  const auto gradient_of = [&](const Tensor& rows, bool needed) {
    return needed ? empty_of(rows, {rows.size(0), shape.features}) : empty_of(rows, {0});
  };
  const Tensor grad_active = gradient_of(active, need_active);
  const Tensor grad_passive = gradient_of(passive, need_passive);
  if (need_active || need_passive) {
    dispatch_floating(op, "active", active.scalar_type(), [&](auto tag) {
      with_ids(map, [&](const auto* ids) {
        using Id = std::remove_const_t<std::remove_pointer_t<decltype(ids)>>;
        DenseGradient<typename decltype(tag)::type, Id>(grad_output, ids, cells, shape, grad_active,
                                                        grad_passive, need_active, need_passive)
            .run();
      });
    });
  }
  return {grad_active, grad_passive};
}

}  // namespace
}  // namespace effops::rowconv

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, m) {
  m.impl("sps_from_dense", TORCH_BOX(&effops::rowconv::sps_from_dense));
  m.impl("sps_from_dense_backward", TORCH_BOX(&effops::rowconv::sps_from_dense_backward));
  m.impl("sps_to_dense", TORCH_BOX(&effops::rowconv::sps_to_dense));
  m.impl("sps_to_dense_backward", TORCH_BOX(&effops::rowconv::sps_to_dense_backward));
}
