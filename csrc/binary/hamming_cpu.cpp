// Hamming ops on the CPU: checks, pieces for the threads, results. The kernels are in hamming_cpu_kernel.cpp.
#include <algorithm>
#include <tuple>

#include "../common/parallel.h"
#include "../common/scratch.h"
#include "hamming.h"
#include "hamming_cpu_kernel.h"

namespace effops::binary {
namespace {

// The AVX-512 kernels count with an instruction that not every AVX-512 processor has.
const HammingKernels& kernels() {
#if defined(EFFOPS_HAVE_X86_ISAS)
  static const bool counts_bytes = cpu_capability() == CpuCapability::kAvx512 &&
                                   __builtin_cpu_supports("avx512bitalg") &&
                                   __builtin_cpu_supports("avx512vpopcntdq");
  if (counts_bytes) return isa_avx512_popcount::hamming_kernels;
#endif
  return hamming_kernels();
}

// How the pairs of each member of the batch are split among threads: by rows of a, and by rows of b where
// there are few of a. Searches give the same result for any pieces.
struct Pieces {
  int64_t of_a = 1, of_b = 1, rows_a = 0, rows_b = 0;

  Pieces(const HammingShape& shape, int64_t least_rows_a) {
    constexpr double kLeastWork = 1 << 20;  // bytes compared
    const double work = static_cast<double>(shape.batch * shape.rows_a) * static_cast<double>(shape.rows_b) *
                        static_cast<double>(shape.bytes);
    const int64_t threads = num_threads();
    if (threads > 1 && work > kLeastWork) {
      const int64_t wanted = divide_up(2 * threads, shape.batch);
      of_a = std::clamp<int64_t>(shape.rows_a / least_rows_a, 1, wanted);
      of_b = std::clamp<int64_t>(shape.rows_b / kLeastRowsOfB, 1, divide_up(wanted, of_a));
    }
    rows_a = divide_up(shape.rows_a, of_a);
    rows_b = divide_up(shape.rows_b, of_b);
  }

  int64_t count() const { return of_a * of_b; }

  static constexpr int64_t kLeastRowsOfB = 4096;
};

// The bytes of both sets, and the task that a piece of a member of the batch is.
class Sets {
 public:
  Sets(const Tensor& a, const Tensor& b, const HammingShape& shape)
      : shape_(shape), a_(as_contiguous(a)), b_(as_contiguous(b)) {}

  // `rows_a`, `rows_b`: of this member.
  void fill(HammingTask& task, int64_t member, int64_t piece, const Pieces& pieces, int64_t rows_a,
            int64_t rows_b) const {
    const int64_t first_a = std::min(piece / pieces.of_b * pieces.rows_a, rows_a);
    const int64_t first_b = std::min(piece % pieces.of_b * pieces.rows_b, rows_b);
    task.bytes = shape_.bytes;
    task.a = data(a_) + (member * shape_.rows_a + first_a) * shape_.bytes;
    task.rows_a = std::min(pieces.rows_a, rows_a - first_a);
    task.b = data(b_) + member * shape_.rows_b * shape_.bytes;
    task.begin_b = first_b;
    task.end_b = std::min(first_b + pieces.rows_b, rows_b);
  }

 private:
  static const uint8_t* data(const Tensor& tensor) {
    return static_cast<const uint8_t*>(tensor.const_data_ptr());
  }

  HammingShape shape_;
  Tensor a_, b_;
};

// ---------------------------------------------------------------- distances

Tensor hamming_distance(const Tensor& a,  // [B, Na, W] or [Na, W]
                        const Tensor& b) {  // [B, Nb, W] or [Nb, W]
  const HammingShape shape = check_hamming("hamming_distance", a, b);
  Tensor output = empty_of(a, shape.sizes(shape.rows_b), ScalarType::Int);
  int32_t* out = static_cast<int32_t*>(output.mutable_data_ptr());
  const Sets sets(a, b, shape);
  constexpr int64_t least_rows_a = 64;
  const Pieces pieces(shape, least_rows_a);
  parallel_for(shape.batch * pieces.count(), 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(kernels().scratch_bytes(shape.bytes));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t member = i / pieces.count(), piece = i % pieces.count();
      HammingTask task;
      sets.fill(task, member, piece, pieces, shape.rows_a, shape.rows_b);
      const int64_t first = member * shape.rows_a + piece / pieces.of_b * pieces.rows_a;
      if (task.rows_a > 0) kernels().distances(task, out + first * shape.rows_b, shape.rows_b, scratch.at(0));
    }
  });
  return output;
}

// ---------------------------------------------------------------- search

struct Wanted {
  int64_t k;
  bool columns;  // the nearest row of a for each row of b
};

// How many rows of each member exist.
class Lengths {
 public:
  Lengths(const char* argument, const std::optional<Tensor>& lengths, int64_t batch, int64_t rows)
      : lengths_(batch, rows) {
    if (!lengths.has_value()) return;
    const Tensor contiguous = as_contiguous(*lengths);
    std::copy_n(contiguous.const_data_ptr<int64_t>(), batch, lengths_.begin());
    for (const int64_t length : lengths_) {
      if (length < 0 || length > rows) {
        fail("hamming_knn: expected ", argument, " in [0, ", rows, "], got ", length);
      }
    }
  }
  int64_t operator[](int64_t member) const { return lengths_[member]; }

 private:
  std::vector<int64_t> lengths_;
};

// Nearest neighbours of all members of a batch.
class Search {
 public:
  Search(const Tensor& a, const Tensor& b, const HammingShape& shape, const Wanted& wanted,
         const Lengths& lengths_a, const Lengths& lengths_b, const std::optional<Tensor>& mask)
      : shape_(shape), k_(std::min(wanted.k, shape.rows_b)), pieces_(shape, kLeastRowsOfA) {
    if (mask.has_value()) mask_ = as_contiguous(*mask);
    const int64_t batch = shape.batch;
    neighbours_.resize(pieces_.of_b * batch * shape.rows_a * k_, kNoNeighbour);
    if (wanted.columns) columns_.resize(pieces_.of_a * batch * shape.rows_b, kNoNeighbour);
    if (k_ == 0 || shape.rows_a == 0) return;
    const Sets sets(a, b, shape);
    parallel_for(batch * pieces_.count(), 1, [&](int64_t begin, int64_t end) {
      const Scratch scratch(kernels().scratch_bytes(shape.bytes));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t member = i / pieces_.count(), piece = i % pieces_.count();
        SearchTask task = make_task(member, piece);
        sets.fill(task, member, piece, pieces_, lengths_a[member], lengths_b[member]);
        if (task.rows_a > 0) kernels().search(task, scratch.at(0));
      }
    });
    merge();
  }

  // The neighbour at place n < k of row i; k may be more than there are.
  NeighbourKey neighbour(int64_t member, int64_t i, int64_t n) const {
    return n < k_ ? neighbours_[(member * shape_.rows_a + i) * k_ + n] : kNoNeighbour;
  }

  // Row i and its nearest neighbour are each other's nearest.
  bool is_mutual(int64_t member, int64_t i) const {
    const int64_t nearest = index_of(neighbour(member, i, 0));
    return nearest != kNoIndex && index_of(columns_[member * shape_.rows_b + nearest]) == i;
  }

 private:
  static constexpr int64_t kLeastRowsOfA = 128;  // for which packing the rows of b pays

  SearchTask make_task(int64_t member, int64_t piece) {
    const int64_t of_a = piece / pieces_.of_b, of_b = piece % pieces_.of_b;
    SearchTask task{};
    task.first_a = of_a * pieces_.rows_a;
    task.k = k_;
    const int64_t row = member * shape_.rows_a + task.first_a;
    task.neighbours = neighbours_.data() + (of_b * shape_.batch * shape_.rows_a + row) * k_;
    if (!columns_.empty()) {
      task.columns = columns_.data() + (of_a * shape_.batch + member) * shape_.rows_b;
    }
    if (mask_.has_value()) {
      const int64_t first = mask_->dim() == 2 ? task.first_a : row;
      task.mask = static_cast<const uint8_t*>(mask_->const_data_ptr()) + first * shape_.rows_b;
      task.mask_stride = shape_.rows_b;
    }
    return task;
  }

  // Joins what the pieces found. Keys are unique and ordered, so the order of the pieces doesn't matter.
  void merge() {
    const int64_t rows = shape_.batch * shape_.rows_a, columns = shape_.batch * shape_.rows_b;
    std::vector<NeighbourKey> joined(k_);
    for (int64_t piece = 1; piece < pieces_.of_b; ++piece) {
      for (int64_t row = 0; row < rows; ++row) {
        NeighbourKey* first = neighbours_.data() + row * k_;
        const NeighbourKey* second = first + piece * rows * k_;
        for (NeighbourKey& key : joined) key = *first < *second ? *first++ : *second++;
        std::copy(joined.begin(), joined.end(), neighbours_.begin() + row * k_);
      }
    }
    for (size_t i = columns; i < columns_.size(); ++i) {
      NeighbourKey& best = columns_[i % columns];
      best = std::min(best, columns_[i]);
    }
  }

  HammingShape shape_;
  int64_t k_;
  Pieces pieces_;
  std::optional<Tensor> mask_;
  std::vector<NeighbourKey> neighbours_;  // [pieces of b, B, Na, k]
  std::vector<NeighbourKey> columns_;  // [pieces of a, B, Nb]
};

std::tuple<Tensor, Tensor> hamming_knn(const Tensor& a,  // [B, Na, W] or [Na, W]
                                       const Tensor& b,  // [B, Nb, W] or [Nb, W]
                                       int64_t k,
                                       const std::optional<Tensor>& lengths_a,  // [B]
                                       const std::optional<Tensor>& lengths_b,  // [B]
                                       const std::optional<Tensor>& mask,  // [B, Na, Nb] or [Na, Nb]
                                       bool mutual) {
  const HammingShape shape = check_hamming_knn(a, b, k, lengths_a, lengths_b, mask);
  const Search search(a, b, shape, {k, mutual}, Lengths("lengths_a", lengths_a, shape.batch, shape.rows_a),
                      Lengths("lengths_b", lengths_b, shape.batch, shape.rows_b), mask);
  Tensor distances = empty_of(a, shape.sizes(k), ScalarType::Int);
  Tensor indices = empty_of(a, shape.sizes(k), ScalarType::Long);
  int32_t* distance = static_cast<int32_t*>(distances.mutable_data_ptr());
  int64_t* index = static_cast<int64_t*>(indices.mutable_data_ptr());
  for (int64_t row = 0; row < (k > 0 ? shape.batch * shape.rows_a : 0); ++row) {
    const int64_t member = row / shape.rows_a, i = row % shape.rows_a;
    const bool found = !mutual || search.is_mutual(member, i);
    for (int64_t n = 0; n < k; ++n) {
      const NeighbourKey key = found ? search.neighbour(member, i, n) : kNoNeighbour;
      *distance++ = distance_of(key);
      *index++ = index_of(key);
    }
  }
  return {distances, indices};
}

std::tuple<Tensor, Tensor> hamming_match(const Tensor& a,  // [Na, W]
                                         const Tensor& b,  // [Nb, W]
                                         std::optional<double> ratio, std::optional<int64_t> max_distance,
                                         bool mutual,
                                         const std::optional<Tensor>& mask) {  // [Na, Nb]
  const HammingShape shape = check_hamming_match(a, b, ratio, max_distance, mask);
  const MatchRule rule = make_match_rule(ratio, max_distance);
  const Search search(a, b, shape, {rule.has_ratio ? 2 : 1, mutual}, Lengths("", {}, 1, shape.rows_a),
                      Lengths("", {}, 1, shape.rows_b), mask);
  std::vector<int64_t> matched;
  for (int64_t i = 0; i < shape.rows_a; ++i) {
    const int32_t best = distance_of(search.neighbour(0, i, 0)),
                  second = distance_of(search.neighbour(0, i, 1));
    if (rule.accepts(best, second) && (!mutual || search.is_mutual(0, i))) matched.push_back(i);
  }
  const int64_t count = static_cast<int64_t>(matched.size());
  Tensor matches = empty_of(a, {count, 2}, ScalarType::Long),
         distances = empty_of(a, {count}, ScalarType::Int);
  int64_t* pair = static_cast<int64_t*>(matches.mutable_data_ptr());
  int32_t* distance = static_cast<int32_t*>(distances.mutable_data_ptr());
  for (const int64_t i : matched) {
    const NeighbourKey key = search.neighbour(0, i, 0);
    *pair++ = i;
    *pair++ = index_of(key);
    *distance++ = distance_of(key);
  }
  return {matches, distances};
}

}  // namespace
}  // namespace effops::binary

STABLE_TORCH_LIBRARY_IMPL(effops, CPU, m) {
  m.impl("hamming_distance", TORCH_BOX(&effops::binary::hamming_distance));
  m.impl("hamming_knn", TORCH_BOX(&effops::binary::hamming_knn));
  m.impl("hamming_match", TORCH_BOX(&effops::binary::hamming_match));
}
