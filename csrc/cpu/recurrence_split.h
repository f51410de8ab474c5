// The products of a chunk of the additive recurrence as products of pairs of bfloat16 (split_product.h).
//
// Values are what they are: bfloat16, or float16 in two parts. What meets them and what meets the queries is fp32 and
// takes part with sixteen bits, so that outputs and states are what other splits of the sequence give. Over a whole
// sequence the queries are exact too, and for bfloat16 the state is rounded once for all of them, as attention rounds
// its weights. A value that is not finite is kept out of these products and added apart: a row that does not see it
// keeps its bits.
//
// Sixteen bits pay on the tile unit. Dot products have twice the rate of fp32 and would multiply two parts of each:
// they are for the bfloat16 of whole sequences alone.
#pragma once

#include "cpu/recurrence_chunk.h"
#include "cpu/split_product.h"

namespace sightline::SIGHTLINE_ISA_NS {

// In how many parts of bfloat16 the factors of a product are taken.
struct Parts {
  int factors;  // whatever fp32 has computed; 0: products in fp32
  int values;
};
SIGHTLINE_INLINE Parts split_parts(const RecurrenceProblem& problem) {
  // fp32 would take three parts and six products each, and gain nothing.
  if (problem.dtype == DType::kFloat32) return {0, 0};
  if (kHasTileUnit) return {2, problem.dtype == DType::kBFloat16 ? 1 : 2};
  if (kHasPairProducts && problem.dtype == DType::kBFloat16 && !problem.causal) return {1, 1};
  return {0, 0};
}

// Calls run(factor parts, value parts) with numbers that the compiler knows.
template <class Run>
static void with_parts(Parts parts, Run run) {
  if constexpr (kHasTileUnit) {
    if (parts.values == 2) return run(std::integral_constant<int, 2>(), std::integral_constant<int, 2>());
    if (parts.values == 1) return run(std::integral_constant<int, 2>(), std::integral_constant<int, 1>());
  }
  run(std::integral_constant<int, 0>(), std::integral_constant<int, 0>());
}

// The same without order, where a weight of bfloat16 may have eight bits.
template <class Run>
static void with_unordered_parts(Parts parts, Run run) {
  if constexpr (kHasPairProducts)
    if (parts.factors == 1) return run(std::integral_constant<int, 1>(), std::integral_constant<int, 1>());
  with_parts(parts, run);
}

constexpr int64_t kValuePanel = kChunkRows / 2 * kPanelLanes;

struct SplitChunk {
  int64_t key_depth;  // Dk, padded for products of pairs
  uint16_t* queries;  // (parts, kChunkRows, key_depth)
  uint32_t* state;    // (parts, block / 16, key_depth / 2, 16)
  uint32_t* keys;     // (parts, kChunkRows / 16, key_depth / 2, 16): the keys' weights as the scores meet them
  uint16_t* weights;  // (parts, padded Dk, kChunkRows): as the state meets them
  uint32_t* values;   // (value parts, block / 16, kChunkRows / 2, 16)
  uint16_t* scores;   // (parts, kChunkRows, kChunkRows)

  int64_t panel() const { return key_depth / 2 * kPanelLanes; }

  void carve(Arena& arena, Parts of, int64_t key_width, int64_t block) {
    const int64_t parts = of.factors;
    key_depth = core::round_up(key_width, kPairDepth);
    if (parts == 0) return;
    queries = arena.take<uint16_t>(parts * kChunkRows * key_depth);
    state = arena.take<uint32_t>(parts * key_depth / 2 * block);
    keys = arena.take<uint32_t>(parts * key_depth / 2 * kChunkRows);
    weights = arena.take<uint16_t>(parts * padded(key_width) * kChunkRows);
    values = arena.take<uint32_t>(of.values * kChunkRows / 2 * block);
    scores = arena.take<uint16_t>(parts * kChunkRows * kChunkRows);
  }
};

// Splits values (rows, stride). Those that have no leading bits in bfloat16 alone remain there, with zeros between
// them; whether there are none.
template <int kParts>
static bool split_values(float* values, int64_t stride, int rows, int64_t width, const SplitChunk& split) {
  constexpr float kLargest = 3.38e38f;  // rounds to a finite number
  const Vec nothing = Vec::broadcast(0.0f);
  const auto held = [](Vec value) { return less(absolute(value), Vec::broadcast(kLargest)); };
  const int64_t part = kChunkRows / 2 * width;
  bool finite = true;
  for (int row = 0; row < rows; ++row)
    for (int64_t column = 0; column < width; column += Vec::kWidth)
      finite &= all(held(Vec::load(values + row * stride + column)));
  if (finite) {
    split_to_pairs<kParts>(values, stride, nullptr, rows, width, split.values, kValuePanel, part);
    return true;
  }
  for (int64_t row = 0; row < core::round_up(rows, kPairDepth); row += 2)
    for (int64_t column = 0; column < width; column += Vec::kWidth) {
      Vec pair[2] = {nothing, nothing};
      for (int64_t index = 0; index < 2 && row + index < rows; ++index) {
        float* entry = values + (row + index) * stride + column;
        const Vec value = Vec::load(entry);
        const Mask splits = held(value);
        pair[index] = select(splits, value, nothing);
        store(entry, select(splits, nothing, value));
      }
      uint32_t* target = split.values + column / kPanelLanes * kValuePanel + row / 2 * kPanelLanes;
      for_each_part<kParts>(
          [&](int index, auto last) { store(target + index * part, split_pairs<last>(pair[0], pair[1])); });
    }
  return false;
}

// Rows of bfloat16 as they lie, (rows, columns), to pairs (padded rows / 2, width). Whether all are finite.
[[maybe_unused]] static bool pair_up_rows(const uint16_t* from, int64_t from_stride, int rows, int64_t columns,
                                          int64_t width, uint32_t* to) {
  uint32_t non_finite = 0;
  for (int64_t row = 0; row < core::round_up(rows, kPairDepth); row += 2)
    for (int64_t column = 0; column < width; column += 16) {
      const Mask live = first_lanes(columns - column), none = first_lanes(0);
      const uint16_t* source = from + row * from_stride + column;
      const Pairs pairs =
          pair_rows(source, row < rows ? live : none, source + from_stride, row + 1 < rows ? live : none);
      non_finite |= non_finite_bits(pairs);
      store(to + column / kPanelLanes * kValuePanel + row / 2 * kPanelLanes, pairs);
    }
  return non_finite == 0;
}

// The scores on and below the diagonal.
template <int kParts>
static void split_scores(const float* scores, int rows, uint16_t* to) {
  const int64_t depth = core::round_up(rows, kPairDepth);
  for (int64_t row = 0; row < core::round_up(rows, kPairRows); ++row)
    for (int64_t column = 0; column < depth; column += 32) {
      const int64_t live = row < rows ? row + 1 - column : 0;
      const float* from = scores + row * kChunkRows + column;
      Vec first = load_lanes(from, first_lanes(live)), second = load_lanes(from + 16, first_lanes(live - 16));
      for_each_part<kParts>([&](int index, auto last) {
        store(to + (index * kChunkRows + row) * kChunkRows + column, split_row<last>(first, second));
      });
    }
}

// outputs (rows, width) = queries S, rows of the queries `query_stride` apart.
template <int kParts>
static void read_state(const SplitChunk& split, int64_t query_stride, int rows, int64_t width, float* outputs,
                       int64_t stride, Prefetches& prefetches) {
  pair_product<kParts, kParts, false>({split.queries, query_stride, kChunkRows * split.key_depth},
                                      {split.state, split.panel(), split.key_depth / 2 * width}, outputs, stride,
                                      core::round_up(rows, kPairRows), width, split.key_depth, prefetches);
}

// outputs += what the rows of the chunk read of it; the scores remain as fp32.
template <int kParts, int kValueParts>
static void read_chunk(const SplitChunk& split, int rows, int64_t width, float* scores, float* outputs, int64_t stride,
                       Prefetches& prefetches) {
  const int64_t padded_rows = core::round_up(rows, kPairRows);
  pair_product<kParts, kParts, false>({split.queries, split.key_depth, kChunkRows * split.key_depth},
                                      {split.keys, split.panel(), split.key_depth / 2 * kChunkRows}, scores, kChunkRows,
                                      padded_rows, padded_rows, split.key_depth, prefetches);
  split_scores<kParts>(scores, rows, split.scores);
  pair_product<kParts, kValueParts, true>({split.scores, kChunkRows, kChunkRows * kChunkRows},
                                          {split.values, kValuePanel, kChunkRows / 2 * width}, outputs, stride,
                                          padded_rows, width, core::round_up(rows, kPairDepth), prefetches);
}

// Weights of bfloat16 as the state meets them, from the keys as they lie, and their sums: weigh_keys() and
// transpose_to_rows() at once, bit by bit. False where a key exceeds the shift by more than kLift; `sums` and `to` are
// then of no use.
[[maybe_unused]] static bool weigh_transposed(const uint16_t* keys, int64_t key_stride, int rows, int64_t width,
                                              const float* shifts, float* sums, uint16_t* to) {
  const Vec none = Vec::broadcast(-INFINITY), log2e = Vec::broadcast(core::kLog2E);
  const int64_t depth = core::round_up(rows, kPairDepth);
  for (int64_t d = 0; d < width; d += Vec::kWidth) {
    const Vec own = Vec::load(shifts + d), limit = own + Vec::broadcast(kLift);
    const Vec shift = select(equal(own, none), Vec::broadcast(0.0f), own);
    Mask above = first_lanes(0);
    Vec sum = Vec::broadcast(0.0f);
    for (int64_t row = 0; row < depth; row += kPairDepth) {
      Pairs block[16];
      for (int pair = 0; pair < 16; ++pair) {
        const int64_t at = row + 2 * pair;
        const uint16_t* source = keys + at * key_stride + d;
        const Vec low = at < rows ? load_bfloat16(source) : none;
        const Vec high = at + 1 < rows ? load_bfloat16(source + key_stride) : none;
        above = above | less(limit, low) | less(limit, high);
        block[pair] = round_to_pairs(core::exp2((low - shift) * log2e), core::exp2((high - shift) * log2e));
        sum = sum + low_numbers(block[pair]);
        sum = sum + high_numbers(block[pair]);
      }
      transpose_block(block);
      for (int lane = 0; lane < 16; ++lane) store(to + (d + lane) * kChunkRows + row, block[lane]);
    }
    if (any(above)) return false;
    store(sums + d, sum);
  }
  return true;
}

// state (padded Dk, width) += weights^T values, the rows of these channels, of weights that are transposed.
template <int kParts, int kValueParts>
static void join_state_transposed(const KeyChunk& chunk, const SplitChunk& split, Channels channels, int64_t width,
                                  float* state, int64_t stride, Prefetches prefetches) {
  const int64_t count = channels.end - channels.begin;
  pair_product<kParts, kValueParts, true>(
      {split.weights, kChunkRows, chunk.stride * kChunkRows}, {split.values, kValuePanel, kChunkRows / 2 * width},
      state + channels.begin * stride, stride, count, width, core::round_up(chunk.rows, kPairDepth), prefetches);
}

// The same of the weights of the chunk.
template <int kParts, int kValueParts>
static void join_state(const KeyChunk& chunk, const SplitChunk& split, Channels channels, int64_t width, float* state,
                       int64_t stride, Prefetches prefetches) {
  transpose_to_rows<kParts>(chunk.gained + channels.begin, chunk.stride, chunk.rows, channels.end - channels.begin,
                            split.weights, kChunkRows, chunk.stride * kChunkRows);
  join_state_transposed<kParts, kValueParts>(chunk, split, channels, width, state, stride, prefetches);
}

template <int kParts>
static void split_state(const float* state, int64_t stride, const float* factors, int64_t key_width, int64_t width,
                        const SplitChunk& split) {
  split_to_pairs<kParts>(state, stride, factors, key_width, width, split.state, split.panel(),
                         split.key_depth / 2 * width);
}

}  // namespace sightline::SIGHTLINE_ISA_NS
