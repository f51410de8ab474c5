// A chunk of keys of the additive recurrence, and the state that chunks hand on (MATH.md section 4).
//
// The state of a channel is kept unnormalised: with a shift, a key that the channel has met (or the log normaliser it
// started from), sum = Delta e^-shift >= 1 in fp64, and Delta e^-shift S. A chunk then needs one exponential and one
// division per key and channel:
//
//   e_s = exp(x_s - shift),  inverse_t = 1 / (Delta_t e^-shift),  exp(x_s - z_t) = e_s inverse_t,
//
// and every product of the chunk is a plain matrix product of q inverse, e and v. This is safe for any keys because a
// chunk ends before the first row that exceeds the shift of any channel by more than kLift; that row begins the next
// chunk and becomes the shift of the channels that it exceeds. So e <= e^kLift, sum >= 1, and what underflows has a
// weight below e^-87 against its row's normaliser. Ordinary keys make chunks of kChunkRows rows after the first few;
// keys that climb by 100 make short ones, and a chunk of one row is the recurrence itself.
#pragma once

#include <cmath>

#include "core/polynomials.h"
#include "core/recurrence.h"
#include "core/visibility.h"
#include "cpu/product.h"
#include "cpu/row_math.h"
#include "cpu/vec_pairs.h"
#include "cpu/workspace.h"

namespace sightline::SIGHTLINE_ISA_NS {

// A state is a sum of up to N values times e^kLift, which has to stay finite. With a lift of 10 instead, 4,096 normal
// keys of a standard deviation of 4 in 64 channels make 106 chunks, with this one 68 of at least 64.
constexpr float kLift = 20.0f;

SIGHTLINE_INLINE int64_t padded(int64_t width) { return core::round_up(width, Vec::kWidth); }

// The distance of rows of a state of `width` columns. Rows that lie a power of two apart fall on a part of the
// first-level cache's sets, and a panel of them does not stay there.
SIGHTLINE_INLINE int64_t state_stride(int64_t width) { return width + Vec::kWidth; }

// One batch entry or one packed document.
struct Sequence {
  int64_t index;  // which state is its own
  int64_t batch;
  int64_t begin, end;
};

SIGHTLINE_INLINE Sequence find_sequence(const RecurrenceProblem& problem, int64_t index) {
  if (problem.cuts == nullptr) return {index, index, 0, problem.length};
  return {index, 0, problem.cuts[index], problem.cuts[index + 1]};
}

// A function of the shape alone: the bits of a result depend on it.
struct Segments {
  int64_t count, rows;
};
SIGHTLINE_INLINE Segments unordered_segments(const RecurrenceProblem& problem) {
  if (problem.causal || problem.cuts != nullptr || problem.length == 0) return {1, problem.length};
  const int64_t heads = core::larger(problem.batch * problem.key_heads, 1);
  const int64_t most = core::larger(core::smaller(kSegmentUnits / heads, problem.length / kSegmentRows), 1);
  const int64_t rows = core::round_up((problem.length + most - 1) / most, kChunkRows);
  return {(problem.length + rows - 1) / rows, rows};
}

// `rows` rows of `width` numbers as fp32, the rest of each row `padding` zeros.
[[maybe_unused]] static void load_rows(const HeadsView& view, DType dtype, int64_t batch, int64_t head, int64_t first,
                                       int64_t column, int rows, int64_t width, float* to, int64_t stride) {
  for (int row = 0; row < rows; ++row) {
    float* target = to + row * stride;
    widen(advance(row_of(view, dtype, batch, head, first + row), column, dtype), dtype, target, width);
    zero(target + width, stride - width);
  }
}

// to (columns, rows) = from (rows, columns); both sizes are multiples of the vector width.
[[maybe_unused]] static void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride,
                                       int64_t rows, int64_t columns) {
  for (int64_t row = 0; row < rows; row += Vec::kWidth)
    for (int64_t column = 0; column < columns; column += Vec::kWidth)
      transpose_block(from + row * from_stride + column, from_stride, to + column * to_stride + row, to_stride);
}

// Shift and sum of the channels of one head.
struct Normalizer {
  float* shift;  // -inf: the channel has met no key
  double* sum;

  void start(const float* log_normalizer, int64_t width) const {
    for (int64_t d = 0; d < padded(width); ++d) {
      shift[d] = log_normalizer != nullptr && d < width ? log_normalizer[d] : -INFINITY;
      // Beside an infinite key no other has a weight that is a number, nor has it one itself.
      sum[d] = shift[d] == -INFINITY ? 0.0 : shift[d] == INFINITY ? NAN : 1.0;
    }
  }
  void copy_from(const Normalizer& other, int64_t width) const {
    for (int64_t d = 0; d < padded(width); ++d) {
      shift[d] = other.shift[d];
      sum[d] = other.sum[d];
    }
  }
  float inverse(int64_t d) const { return sum[d] == 0.0 ? 0.0f : static_cast<float>(1.0 / sum[d]); }
  float log_normalizer(int64_t d) const {
    return sum[d] == 0.0 ? -INFINITY : static_cast<float>(shift[d] + std::log(sum[d]));
  }
};

// What multiplies a quantity in units of e^-`before` to bring it to units of e^-`after`. An infinite key has no weight
// that is a number, nor do the keys before it.
SIGHTLINE_INLINE float change_of_unit(float before, float after) {
  if (after == INFINITY) return NAN;
  return before == after ? 1.0f : static_cast<float>(std::exp(static_cast<double>(before) - after));
}

// What brings the states of earlier and of later rows to the unit of both.
struct Merge {
  float kept, added;
};

// The normaliser of a channel after the rows of both, in place of the first.
SIGHTLINE_INLINE Merge merge_channel(const Normalizer& all, const Normalizer& more, int64_t d) {
  const float before = all.shift[d], other = more.shift[d];
  const float shift = before < other ? other : before;
  // A channel whose only keys are NaN has a sum, and no shift.
  const auto factor = [shift](double sum, float own) {
    if (sum == 0.0) return 0.0f;
    return own == -INFINITY ? NAN : change_of_unit(own, shift);
  };
  const Merge merge{factor(all.sum[d], before), factor(more.sum[d], other)};
  all.shift[d] = shift;
  all.sum[d] = merge.kept == 0.0f ? 0.0 : all.sum[d] * merge.kept;
  if (merge.added != 0.0f) all.sum[d] += more.sum[d] * merge.added;
  return merge;
}

struct KeyChunk {
  int rows;
  int64_t first;
  int64_t stride;  // padded Dk, of the arrays below
  float* keys;     // (rows, stride)
  float* weights;  // (rows, stride): e, in the place of the keys unless windows share it
  float* gained;   // e * key_gain; `weights` itself where there is no gain
  float* inverse;  // of the normaliser up to and with the row; 0 where there is none
  float* factors;  // (stride): what a lift of the shift does to the state
  bool takes_part[kChunkRows];
  bool has_gain;

  void carve(Arena& arena, const RecurrenceProblem& problem) {
    stride = padded(problem.key_width);
    has_gain = problem.key_gain.data != nullptr;
    keys = weights = arena.take<float>(kChunkRows * stride);
    inverse = arena.take<float>(kChunkRows * stride);
    factors = arena.take<float>(stride);
    gained = has_gain ? arena.take<float>(kChunkRows * stride) : weights;
  }
};

// The raw keys of up to `rows` rows from `first` on, -inf where masked or padded.
[[maybe_unused]] static void load_keys(const RecurrenceProblem& problem, int64_t batch, int64_t key_head, int64_t first,
                                       int rows, KeyChunk& chunk) {
  chunk.first = first;
  chunk.rows = rows;
  for (int row = 0; row < rows; ++row) {
    float* keys = chunk.keys + row * chunk.stride;
    chunk.takes_part[row] =
        problem.key_mask == nullptr ||
        problem.key_mask[batch * problem.key_mask_strides[0] + (first + row) * problem.key_mask_strides[1]] != 0;
    int64_t live = 0;
    if (chunk.takes_part[row]) {
      widen(row_of(problem.key, problem.dtype, batch, key_head, first + row), problem.dtype, keys, problem.key_width);
      live = problem.key_width;
    }
    for (int64_t d = live; d < chunk.stride; ++d) keys[d] = -INFINITY;
  }
}

// Lifts the shift to the first row where that exceeds it by more than kLift, and ends the chunk before the next row
// that does. Whether it lifted anything: then the state's channels are to be multiplied by `factors`.
[[maybe_unused]] static bool lift_and_cut(KeyChunk& chunk, const Normalizer& normalizer) {
  const Vec lift = Vec::broadcast(kLift);
  bool lifted = false;
  for (int64_t d = 0; d < chunk.stride; d += Vec::kWidth)
    lifted |= any(less(Vec::load(normalizer.shift + d) + lift, Vec::load(chunk.keys + d)));
  if (lifted) {
    for (int64_t d = 0; d < chunk.stride; ++d) {
      const float before = normalizer.shift[d], key = chunk.keys[d];
      chunk.factors[d] = 1.0f;
      if (!(before + kLift < key)) continue;
      normalizer.shift[d] = key;
      chunk.factors[d] = before == -INFINITY ? 0.0f : change_of_unit(before, key);
      normalizer.sum[d] *= before == -INFINITY ? 0.0 : std::exp(static_cast<double>(before) - key);
    }
  }
  for (int row = 1; row < chunk.rows; ++row) {
    const float* keys = chunk.keys + row * chunk.stride;
    Mask above = less(Vec::load(normalizer.shift) + lift, Vec::load(keys));
    for (int64_t d = Vec::kWidth; d < chunk.stride; d += Vec::kWidth)
      above = above | less(Vec::load(normalizer.shift + d) + lift, Vec::load(keys + d));
    if (any(above)) chunk.rows = row;
  }
  return lifted;
}

// Channels of a key head that a thread works on, a multiple of the vectors.
struct Channels {
  int64_t begin, end;
};

// Keys to weights; with kRows the inverse normaliser of every row too, with kRounded the weights rounded to bfloat16.
// Adds the chunk to the sum.
template <bool kRows, bool kRounded = false>
static void weigh_keys(const RecurrenceProblem& problem, int64_t batch, int64_t key_head, KeyChunk& chunk,
                       const Normalizer& normalizer, Channels channels) {
  const Vec nothing = Vec::broadcast(0.0f), one = Vec::broadcast(1.0f);
  for (int64_t d = channels.begin; d < channels.end; d += Vec::kWidth) {
    alignas(64) float lanes[Vec::kWidth];
    for (int lane = 0; lane < Vec::kWidth; ++lane) lanes[lane] = static_cast<float>(normalizer.sum[d + lane]);
    const Vec before = Vec::load(lanes);
    Vec shift = Vec::load(normalizer.shift + d);
    shift = select(equal(shift, Vec::broadcast(-INFINITY)), nothing, shift);
    Vec sum = nothing;  // of the chunk alone: as exact as fp32 can, whatever has been before
    for (int row = 0; row < chunk.rows; ++row) {
      const int64_t entry = row * chunk.stride + d;
      Vec weight = core::exp2((Vec::load(chunk.keys + entry) - shift) * Vec::broadcast(core::kLog2E));
      if (kRounded) weight = rounded_to_bfloat16(weight);
      store(chunk.weights + entry, weight);
      sum = sum + weight;
      if (kRows) {
        const Vec total = before + sum;
        store(chunk.inverse + entry, select(equal(total, nothing), nothing, one / total));
      }
    }
    store(lanes, sum);
    for (int lane = 0; lane < Vec::kWidth; ++lane) normalizer.sum[d + lane] += static_cast<double>(lanes[lane]);
  }
  if (!chunk.has_gain) return;
  const int64_t width = channels.end - channels.begin;
  const int64_t live = core::larger(core::smaller(channels.end, problem.key_width) - channels.begin, 0);
  for (int row = 0; row < chunk.rows; ++row) {
    float* target = chunk.gained + row * chunk.stride + channels.begin;
    if (!chunk.takes_part[row]) {
      zero(target, width);
      continue;
    }
    const void* gain = row_of(problem.key_gain, problem.gain_dtype, batch, key_head, chunk.first + row);
    widen(advance(gain, channels.begin, problem.gain_dtype), problem.gain_dtype, target, live);
    zero(target + live, width - live);
    const float* weights = chunk.weights + row * chunk.stride + channels.begin;
    for (int64_t d = 0; d < width; d += Vec::kWidth) store(target + d, Vec::load(target + d) * Vec::load(weights + d));
  }
}

// The same for all channels.
template <bool kRows, bool kRounded = false>
static void weigh_keys(const RecurrenceProblem& problem, int64_t batch, int64_t key_head, KeyChunk& chunk,
                       const Normalizer& normalizer) {
  weigh_keys<kRows, kRounded>(problem, batch, key_head, chunk, normalizer, {0, chunk.stride});
}

// C (+)= A B where row r of A (rows, rows) has its entries up to column r alone, the others set to 0 here. B is
// (rows, columns) and may hold non-finite numbers: those of later rows do not reach a row.
[[maybe_unused]] static void lower_triangle_product(float* a, const float* b, int64_t b_stride, float* c,
                                                    int64_t c_stride, int rows, int64_t columns, bool finite) {
  for (int begin = 0; begin < rows; begin += kTriangleRows) {
    const int end = begin + kTriangleRows < rows ? begin + kTriangleRows : rows;
    for (int row = begin; row < end; ++row) zero(a + row * kChunkRows + row + 1, end - row - 1);
    accumulate_product(finite, {a + begin * kChunkRows, kChunkRows, 1}, b, b_stride, c + begin * c_stride, c_stride,
                       end - begin, columns, end);
  }
}

// Queries (rows, padded Dk) times `factors`, one row for all (stride 0) or one for each, times the scale.
[[maybe_unused]] static void load_scaled_queries(const RecurrenceProblem& problem, int64_t batch, int64_t head,
                                                 int64_t first, int rows, const float* factors, int64_t factor_stride,
                                                 float* queries) {
  const int64_t width = problem.key_width, stride = padded(width);
  const Vec scale = Vec::broadcast(problem.scale), nothing = Vec::broadcast(0.0f);
  const bool whole = width == stride;
  for (int row = 0; row < rows; ++row) {
    const void* source = row_of(problem.query, problem.dtype, batch, head, first + row);
    float* target = queries + row * stride;
    if (!whole) {
      widen(source, problem.dtype, target, width);
      zero(target + width, stride - width);
    }
    for (int64_t d = 0; d < stride; d += Vec::kWidth) {
      const Vec query = whole ? load_widened(source, problem.dtype, d) : Vec::load(target + d);
      // Before the first key the output is 0, whatever the query.
      const Vec factor = Vec::load(factors + row * factor_stride + d);
      store(target + d, select(equal(factor, nothing), factor, query * factor * scale));
    }
  }
}

// scores (row, column) = <a_row, b_column> for column <= row, `b_transposed` is (depth, kChunkRows). What stands to
// the right of the diagonal is of no use.
[[maybe_unused]] static void lower_triangle_scores(const float* a, int64_t a_stride, const float* b_transposed,
                                                   float* scores, int rows, int64_t depth) {
  for (int begin = 0; begin < rows; begin += kTriangleRows) {
    const int end = begin + kTriangleRows < rows ? begin + kTriangleRows : rows;
    product<false, kScoreDepth>({a + begin * a_stride, a_stride, 1}, b_transposed, kChunkRows,
                                scores + begin * kChunkRows, kChunkRows, end - begin, begin + kTriangleRows, depth);
  }
}

}  // namespace sightline::SIGHTLINE_ISA_NS
