// sps_refine on the CPU: choice of the rows that stay active, copies of their features, the new map.
//
// Bytes: the features and the map are read once and the new ones written once.
#include <algorithm>
#include <limits>
#include <tuple>

#include "../common/dtype_switch.h"
#include "../common/order_key.h"
#include "../common/parallel.h"
#include "../common/row_copy_cpu_kernel.h"
#include "../common/stream_copy.h"
#include "sps_cpu.h"
#include "sps_refine.h"

namespace effops::rowconv {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements of a task, at least

// ---------------------------------------------------------------- choice

// Unsigned integers in the order of the scores, all of them above 0 and below the largest one.
template <typename A>
typename KeyOf<A>::Unsigned ascending_key(A score) {
  using Unsigned = typename KeyOf<A>::Unsigned;
  return static_cast<Unsigned>(key_of(score)) - static_cast<Unsigned>(kNoKey<A>);
}

// The highest keys are those above `bound` and the first `ties` of those equal to it.
template <typename Key>
struct Bound {
  Key bound;
  int64_t ties;
};

// The bound of the `wanted` highest keys, 0 <= wanted <= size, digit by digit from the top.
template <typename Key>
Bound<Key> find_bound(std::vector<Key> keys, int64_t wanted) {
  constexpr int kDigit = 11;
  if (wanted == 0) return {std::numeric_limits<Key>::max(), 0};
  if (wanted == static_cast<int64_t>(keys.size())) return {0, 0};
  Key prefix = 0;
  for (int shift = std::numeric_limits<Key>::digits; shift > 0;) {
    const int width = std::min(kDigit, shift);
    shift -= width;
    const Key mask = (Key{1} << width) - 1;
    int64_t counts[1 << kDigit] = {};
    for (const Key key : keys) ++counts[(key >> shift) & mask];
    Key digit = mask;
    while (counts[digit] < wanted) wanted -= counts[digit--];
    prefix |= digit << shift;
    if (counts[digit] == wanted) return {prefix - 1, 0};
    size_t same = 0;  // keys that begin with the digits found
    for (const Key key : keys) {
      keys[same] = key;
      same += (key >> shift & mask) == digit;
    }
    keys.resize(same);
  }
  return {prefix, wanted};
}

// Where each active row goes: the children of the kept ones first, then all passive rows, then the others.
template <typename T>
void choose(const T* scores, const SpsRefineShape& shape, int64_t* new_ids) {
  using Key = typename KeyOf<accumulator_t<T>>::Unsigned;
  std::vector<Key> keys(shape.sps.active);
  for (int64_t i = 0; i < shape.sps.active; ++i) keys[i] = ascending_key(widen(scores[i]));
  auto [bound, ties] = find_bound<Key>(keys, shape.kept);
  int64_t kept = 0, demoted = shape.new_active + shape.sps.passive;
  for (int64_t i = 0; i < shape.sps.active; ++i) {
    const int64_t is_tie = (keys[i] == bound) & (ties > 0), is_kept = (keys[i] > bound) | is_tie;
    ties -= is_tie;
    new_ids[i] = is_kept ? kept : demoted;
    kept += is_kept * shape.children;
    demoted += 1 - is_kept;
  }
}

// ---------------------------------------------------------------- features and cells

struct NewSps {
  Tensor active, passive, index_map, roi, xy;
};

// Copies features, past the caches if there are many of them.
class RowCopier {
 public:
  explicit RowCopier(int64_t bytes_of_all) : streams_(bytes_of_all >= kManyBytes) {}

  void operator()(const char* from, int64_t bytes, char* to) const {
    if (streams_) {
      stream_copy(from, bytes, to);
    } else {
      std::copy_n(from, bytes, to);
    }
  }
  void finish() const {
    if (streams_) finish_streams();
  }

 private:
  static constexpr int64_t kManyBytes = 8 << 20;
  bool streams_;
};

void copy_rows(const Tensor& active, const Tensor& passive, const SpsRefineShape& shape,
               const int64_t* new_ids, const NewSps& sps) {
  const Tensor active_rows = as_contiguous(active), passive_rows = as_contiguous(passive);
  const int64_t row_bytes = shape.sps.features * static_cast<int64_t>(active.element_size());
  const auto* from_active = static_cast<const char*>(active_rows.const_data_ptr());
  const auto* from_passive = static_cast<const char*>(passive_rows.const_data_ptr());
  auto* to_active = static_cast<char*>(sps.active.mutable_data_ptr());
  auto* to_passive = static_cast<char*>(sps.passive.mutable_data_ptr());
  const RowCopier copy((shape.new_active + shape.new_passive) * row_bytes);
  const int64_t grain = kGrain / (shape.sps.features + 1) + 1;
  parallel_for(shape.sps.passive, grain, [&](int64_t begin, int64_t end) {
    copy(from_passive + begin * row_bytes, (end - begin) * row_bytes, to_passive + begin * row_bytes);
    copy.finish();
  });
  parallel_for(shape.sps.active, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const char* row = from_active + i * row_bytes;
      const int64_t demoted = new_ids[i] - shape.new_active;
      const int64_t copies = demoted < 0 ? shape.children : 1;
      char* target = demoted < 0 ? to_active + new_ids[i] * row_bytes : to_passive + demoted * row_bytes;
      for (int64_t k = 0; k < copies; ++k) copy(row, row_bytes, target + k * row_bytes);
    }
    copy.finish();
  });
}

void write_cells(const Cells& cells, const SpsRefineShape& shape, const int64_t* new_ids, const NewSps& sps) {
  std::vector<int64_t> kept(shape.kept + 1);  // one more: what lies after the last one is overwritten
  int64_t found = 0;
  for (int64_t i = 0; i < shape.sps.active; ++i) {
    kept[found] = i;
    found += new_ids[i] < shape.new_active;
  }
  auto* roi = static_cast<int32_t*>(sps.roi.mutable_data_ptr());
  auto* xy = static_cast<int32_t*>(sps.xy.mutable_data_ptr());
  const int64_t scale = shape.children == 4 ? 2 : 1;
  for (int64_t p = 0; p < shape.kept; ++p) {
    const auto [r, y, x] = cells[kept[p]];
    for (int64_t child = 0; child < shape.children; ++child) {
      *roi++ = static_cast<int32_t>(r);
      *xy++ = static_cast<int32_t>(scale * x + child % 2);
      *xy++ = static_cast<int32_t>(scale * y + child / 2);
    }
  }
}

// ---------------------------------------------------------------- map

// Where each old id goes: table[min(id, NA)] + max(id - NA, 0).
template <typename NewId>
std::vector<NewId> make_table(const SpsRefineShape& shape, const int64_t* new_ids) {
  std::vector<NewId> table(shape.sps.active + 1, static_cast<NewId>(shape.new_active));
  std::copy_n(new_ids, shape.sps.active, table.begin());
  return table;
}

// Most cells are passive, and lie together: groups of them need no look at the table. Elsewhere no branch
// could foresee which cells are active, so there is none.
template <typename Id, typename NewId>
void relabel(const Id* ids, int64_t count, const std::vector<NewId>& table, NewId* new_ids) {
  constexpr int64_t kGroup = 8;
  const int64_t active = static_cast<int64_t>(table.size()) - 1, shift = table.back() - active;
  const auto look_up = [&](int64_t id) {
    return static_cast<NewId>(table[std::min(id, active)] + std::max<int64_t>(id - active, 0));
  };
  int64_t first = 0;
  for (; first + kGroup <= count; first += kGroup) {
    const Id* group = ids + first;
    NewId* out = new_ids + first;
    int64_t number = 0;  // of active cells
    for (int64_t i = 0; i < kGroup; ++i) number += group[i] < active;
    if (number == 0) {
      for (int64_t i = 0; i < kGroup; ++i) out[i] = static_cast<NewId>(group[i] + shift);
    } else {
      for (int64_t i = 0; i < kGroup; ++i) out[i] = look_up(group[i]);
    }
  }
  for (; first < count; ++first) new_ids[first] = look_up(ids[first]);
}

// ids of cells, each of which becomes 2 x 2: those of the children, or four times the same.
template <typename NewId>
void double_cells(const NewId* ids, int64_t count, NewId new_active, NewId* upper, NewId* lower) {
  for (int64_t i = 0; i < count; ++i) {
    const NewId id = ids[i], step = id < new_active ? 1 : 0;
    upper[2 * i] = id;
    upper[2 * i + 1] = id + step;
    lower[2 * i] = id + 2 * step;
    lower[2 * i + 1] = id + 3 * step;
  }
}

template <typename NewId, typename Id>
void write_map(const Id* ids, const SpsRefineShape& shape, const std::vector<NewId>& table, NewId* out) {
  constexpr int64_t kPiece = 256;  // cells whose new ids are kept in the first-level cache
  const int64_t width = shape.sps.width, grain = kGrain / (width + 1) + 1;
  parallel_for(shape.sps.maps * shape.sps.height, grain, [&](int64_t begin, int64_t end) {
    NewId piece[kPiece];
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t first = 0; first < width; first += kPiece) {
        const int64_t count = std::min(kPiece, width - first);
        const Id* from = ids + row * width + first;
        NewId* to = shape.children == 4 ? piece : out + row * width + first;
        relabel(from, count, table, to);
        if (shape.children != 4) continue;
        NewId* upper = out + 4 * row * width + 2 * first;
        double_cells(piece, count, static_cast<NewId>(shape.new_active), upper, upper + 2 * width);
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sps_refine(const Tensor& active,     // [NA, F]
                                                                      const Tensor& passive,    // [NP, F]
                                                                      const Tensor& index_map,  // [R, H, W]
                                                                      const Tensor& roi,  // [NA]
                                                                      const Tensor& xy,  // [NA, 2]
                                                                      const Tensor& scores,  // [NA]
                                                                      int64_t num_refine, bool upsample) {
  constexpr const char* op = "sps_refine";
  const SpsRefineShape shape =
      check_sps_refine(active, passive, index_map, roi, xy, scores, num_refine, upsample);
  const Tensor map = checked_index_map(op, index_map, shape.sps);
  const Cells cells(op, roi, xy, shape.sps);
  const Tensor new_ids = empty_of(active, {shape.sps.active}, ScalarType::Long);
  auto* ids_of_rows = static_cast<int64_t*>(new_ids.mutable_data_ptr());
  const Tensor contiguous_scores = as_contiguous(scores);
  dispatch_floating(op, "scores", scores.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    choose(static_cast<const T*>(contiguous_scores.const_data_ptr()), shape, ids_of_rows);
  });
  const int64_t scale = upsample ? 2 : 1;
  const NewSps sps{empty_of(active, {shape.new_active, shape.sps.features}),
                   empty_of(active, {shape.new_passive, shape.sps.features}),
                   empty_of(active, {shape.sps.maps, scale * shape.sps.height, scale * shape.sps.width},
                            shape.wide_new_map ? ScalarType::Long : ScalarType::Int),
                   empty_of(active, {shape.new_active}, ScalarType::Int),
                   empty_of(active, {shape.new_active, 2}, ScalarType::Int)};
  copy_rows(active, passive, shape, ids_of_rows, sps);
  write_cells(cells, shape, ids_of_rows, sps);
  with_ids(map, [&](const auto* ids) {
    void* out = sps.index_map.mutable_data_ptr();
    if (shape.wide_new_map) {
      write_map(ids, shape, make_table<int64_t>(shape, ids_of_rows), static_cast<int64_t*>(out));
    } else {
      write_map(ids, shape, make_table<int32_t>(shape, ids_of_rows), static_cast<int32_t*>(out));
    }
  });
  return {sps.active, sps.passive, sps.index_map, sps.roi, sps.xy, new_ids};
}

// ---------------------------------------------------------------- backward

void check_new_ids(const int64_t* new_ids, const SpsRefineGradShape& shape) {
  const int64_t end = shape.new_active + shape.new_passive;
  for (int64_t i = 0; i < shape.active; ++i) {
    const int64_t id = new_ids[i];
    if (id < 0 || id >= end || (id < shape.new_active && id % shape.children != 0)) {
      fail("sps_refine_backward: expected new_ids of sps_refine, in [0, ", end, "), got ", id);
    }
  }
}

std::tuple<Tensor, Tensor> sps_refine_backward(const Tensor& grad_active,  // [NA', F]
                                               const Tensor& grad_passive,  // [NP', F]
                                               const Tensor& new_ids,  // [NA]
                                               int64_t num_passive, bool upsample, bool need_active,
                                               bool need_passive) {
  const SpsRefineGradShape shape =
      check_sps_refine_grad(grad_active, grad_passive, new_ids, num_passive, upsample);
  const Tensor contiguous_ids = as_contiguous(new_ids);
  const auto* ids = static_cast<const int64_t*>(contiguous_ids.const_data_ptr());
  check_new_ids(ids, shape);
  const Tensor active_rows = as_contiguous(grad_active), passive_rows = as_contiguous(grad_passive);
  const auto* from_active = static_cast<const char*>(active_rows.const_data_ptr());
  const auto* from_passive = static_cast<const char*>(passive_rows.const_data_ptr());
  const int64_t row_bytes = shape.features * static_cast<int64_t>(grad_active.element_size());
  const int64_t grain = kGrain / (shape.features + 1) + 1;
  Tensor active = empty_of(grad_active, {0}), passive = empty_of(grad_active, {0});
  if (need_active) {
    active = empty_of(grad_active, {shape.active, shape.features});
    auto* out = static_cast<char*>(active.mutable_data_ptr());
    const auto add_four =
        row_copy_kernels().add_four[static_cast<int>(float_type_of(grad_active.scalar_type()))];
    parallel_for(shape.active, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t demoted = ids[i] - shape.new_active;
        if (demoted < 0 && shape.children == 4) {
          add_four(from_active + ids[i] * row_bytes, shape.features, out + i * row_bytes);
        } else {
          const char* row = demoted < 0 ? from_active + ids[i] * row_bytes
                                        : from_passive + demoted * row_bytes;
          std::copy_n(row, row_bytes, out + i * row_bytes);
        }
      }
    });
  }
  if (need_passive) {
    passive = empty_of(grad_active, {shape.passive, shape.features});
    auto* out = static_cast<char*>(passive.mutable_data_ptr());
    parallel_for(shape.passive, grain, [&](int64_t begin, int64_t end) {
      std::copy_n(from_passive + begin * row_bytes, (end - begin) * row_bytes, out + begin * row_bytes);
    });
  }
  return {active, passive};
}

}  // namespace
}  // namespace effops::rowconv

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, m) {
  m.impl("sps_refine", TORCH_BOX(&effops::rowconv::sps_refine));
  m.impl("sps_refine_backward", TORCH_BOX(&effops::rowconv::sps_refine_backward));
}
