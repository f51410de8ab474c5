// Weighted attention of few query rows per key head, forward only (MATH.md sections 1 and 2).
//
// What limits decoding is reading K and V. Work: one unit is a chunk of the keys of one key head, for all its query
// rows; units are handed to the threads. A unit leaves the partial sums of its chunk, and these are added up in the
// order of the chunks: results do not depend on the number of threads. Lanes are keys here.
//
// Re-weighting needs Z before the first weight: the first pass keeps the scores (softmax) or weights (softplus) of all
// rows, O(N) numbers, so that K is read once, and a second pass reads V.
//
// Non-finite numbers: a chunk whose sums are not finite is added up again with products that skip zero weights.
#include "cpu/attention_decode.h"

#include <cmath>

#include "cpu/decode_unit.h"

namespace sightline::SIGHTLINE_ISA_NS {
namespace {

// Products to scores of one row, in place; returns the largest.
template <bool kMasked, bool kExtras>
float finish_row_scores(const AttentionProblem& problem, const DecodeScratch& scratch, const DecodeUnit& unit, int row,
                        float* scores, RowsAhead& ahead) {
  alignas(64) static constexpr int32_t kLanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const RowTile& rows = *scratch.rows;
  const Vec minus_infinity = Vec::broadcast(-INFINITY);
  const Vec row_factor = Vec::broadcast(rows.factor[row]);
  const Vec slope = Vec::broadcast(rows.slope[row]);
  const IntVec lanes = IntVec::load(kLanes);
  // Lane l is key + l: it is seen where key lies between first - l and last - l.
  const IntVec first = IntVec::broadcast(rows.first[row]) - lanes;
  // The rest of the last vector stands for keys of the next chunk.
  const int32_t end = static_cast<int32_t>(unit.first + unit.count - 1);
  const IntVec last = IntVec::broadcast(rows.last[row] < end ? rows.last[row] : end) - lanes;
  const IntVec position = IntVec::broadcast(rows.position[row]) - lanes;
  Vec top = minus_infinity;
  for (int64_t j = 0; j < unit.count; j += Vec::kWidth) {
    ahead.ask();
    const int32_t key = static_cast<int32_t>(unit.first + j);
    const Vec factor = problem.normalize_qk ? row_factor * Vec::load(scratch.key_factors + j) : row_factor;
    Vec score = Vec::load(scores + j) * factor;
    if (kExtras) {
      if (problem.alibi_slopes != nullptr)
        score = score - slope * absolute(to_float(position - IntVec::broadcast(key)));
      if (problem.softcap > 0.0f)
        score = Vec::broadcast(problem.softcap) * core::tanh(score * Vec::broadcast(1.0f / problem.softcap));
    }
    if (kMasked) {
      score = select(between(first, last, key), score, minus_infinity);
      if (problem.key_mask != nullptr)
        score = select(equal(Vec::load(scratch.hidden + j), Vec::broadcast(0.0f)), score, minus_infinity);
    }
    store(scores + j, score);
    top = maximum(score, top);
  }
  alignas(64) float tops[Vec::kWidth];
  store(tops, top);
  float largest = tops[0];
  for (int lane = 1; lane < Vec::kWidth; ++lane) largest = tops[lane] > largest ? tops[lane] : largest;
  return largest;
}

// Scores of the unit's keys, (row, key), with -inf for what is hidden and for the rest of the last vector.
template <DType kType>
void compute_chunk_scores(const DecodePlan& plan, const DecodeUnit& unit, DecodeScratch& scratch, float* scores,
                          ChunkSums* sums) {
  const AttentionProblem& problem = *plan.problem;
  const RowTile& rows = *scratch.rows;
  const WideRows keys = rows_of(problem, problem.key, problem.head_width, unit);
  const QueryNumber<kType>* queries;
  if constexpr (kByPairs<kType>)
    queries = scratch.query_bits;
  else
    queries = scratch.queries;
  if constexpr (kHasTileUnit && kByPairs<kType>)
    key_products_by_tiles(keys, unit.count, queries, problem.head_width, scratch.query_pairs, plan.rows, scores,
                          plan.stride, scratch.key_factors);
  else
    key_products<kType>(keys, unit.count, queries, problem.head_width, plan.rows, scores, plan.stride,
                        scratch.key_factors);
  if (problem.normalize_qk)
    for (int64_t j = 0; j < unit.count; j += Vec::kWidth) {
      const Vec norm = square_root(Vec::load(scratch.key_factors + j));
      store(scratch.key_factors + j,
            Vec::broadcast(1.0f) / maximum(Vec::broadcast(core::kNormFloor), norm));  // NaN stays
    }
  bool all_take_part = true;
  if (problem.key_mask != nullptr)
    for (int64_t j = 0; j < unit.count; ++j) {
      const bool takes_part =
          problem.key_mask[unit.batch * problem.key_mask_strides[0] + (unit.first + j) * problem.key_mask_strides[1]] !=
          0;
      scratch.hidden[j] = takes_part ? 0.0f : 1.0f;
      all_take_part &= takes_part;
    }
  const bool masked = !all_take_part || unit.count % Vec::kWidth != 0 || unit.first < rows.max_first ||
                      unit.first + unit.count - 1 > rows.min_last;
  const bool extras = problem.alibi_slopes != nullptr || problem.softcap > 0.0f;
  const auto finish = masked ? (extras ? finish_row_scores<true, true> : finish_row_scores<true, false>)
                             : (extras ? finish_row_scores<false, true> : finish_row_scores<false, false>);
  RowsAhead ahead(rows_of(problem, problem.value, problem.value_width, unit), kBytesOf<kType>, unit.count);
  for (int row = 0; row < plan.rows; ++row) {
    sums[row].largest = finish(problem, scratch, unit, row, scores + row * plan.stride, ahead);
    sums[row].visible_keys = rows.visible_keys[row];
  }
}

// Sums of so many vectors are formed apart and added up: one long chain would lose more.
constexpr int64_t kSumVectors = 8;

// Each entry of `row` to of(entry), in place with kStore; returns the sum of the results.
template <bool kStore, class Function>
SIGHTLINE_INLINE double replace_and_sum(float* row, int64_t count, Function of) {
  Vec total = Vec::broadcast(0.0f);
  for (int64_t start = 0; start < count; start += kSumVectors * Vec::kWidth) {
    const int64_t end = core::smaller(count, start + kSumVectors * Vec::kWidth);
    Vec sum = Vec::broadcast(0.0f);
    for (int64_t j = start; j < end; j += Vec::kWidth) {
      const Vec entry = of(Vec::load(row + j));
      if (kStore) store(row + j, entry);
      sum = sum + entry;
    }
    total = total + sum;
  }
  return sum_of_lanes(total);
}

// Scores to weights; with kStore false the scores stay.
template <class Weight, bool kStore>
double weigh_row(float* scores, int64_t count, float largest) {
  const Vec shift = Vec::broadcast(largest == -INFINITY ? 0.0f : largest);
  return replace_and_sum<kStore>(
      scores, count, [shift](Vec score) { return Weight::forward(Weight::kShifted ? score - shift : score); });
}

// What the first pass kept to re-weighted weights.
template <class Weight>
double reweigh_row(float power, const RowSums& row, float* kept, int64_t count) {
  const Vec shift = Vec::broadcast(row.shift == -INFINITY ? 0.0f : row.shift);
  const Vec mean = Vec::broadcast(row.peak.mean), inverse_peak = Vec::broadcast(row.peak.inverse_peak);
  const auto weight_of = [shift](Vec entry) { return Weight::kShifted ? Weight::forward(entry - shift) : entry; };
  if (row.peak.flat) return replace_and_sum<true>(kept, count, weight_of);
  return replace_and_sum<true>(kept, count, [=](Vec entry) {
    const Vec excess = maximum(Vec::broadcast(0.0f), weight_of(entry) - mean) * inverse_peak;
    return response_of(excess, power) * excess;
  });
}

// The unit's weighted values.
template <DType kType>
void gather_values(const DecodePlan& plan, const DecodeUnit& unit, const float* weights, const DecodeResults& results) {
  const int64_t width = plan.problem->value_width;
  const WideRows values = rows_of(*plan.problem, plan.problem->value, width, unit);
  float* sums = results.values + unit.index * plan.rows * width;
  zero(sums, plan.rows * width);
  add_values<kType>(values, unit.count, weights, plan.stride, plan.rows, true, sums, width);
  if (is_finite(sums, plan.rows * width)) return;
  zero(sums, plan.rows * width);
  add_values<kType>(values, unit.count, weights, plan.stride, plan.rows, false, sums, width);
}

// The only pass of plain attention, the first of re-weighting.
template <class Weight, DType kType>
void attend_chunk(const DecodePlan& plan, int64_t index, DecodeScratch& scratch, const DecodeResults& results) {
  const DecodeUnit unit = start_unit(plan, index, scratch);
  const bool reweighted = plan.problem->reweight.power > 0.0f;
  ChunkSums* sums = results.sums + index * plan.rows;
  float* scores = reweighted ? results.kept + index * plan.rows * plan.stride : scratch.scores;
  compute_chunk_scores<kType>(plan, unit, scratch, scores, sums);
  for (int row = 0; row < plan.rows; ++row) {
    float* entries = scores + row * plan.stride;
    // The second pass takes softmax scores as they are: their shift is not known yet.
    sums[row].normalizer = Weight::kShifted && reweighted
                               ? weigh_row<Weight, false>(entries, unit.count, sums[row].largest)
                               : weigh_row<Weight, true>(entries, unit.count, sums[row].largest);
  }
  if (!reweighted) gather_values<kType>(plan, unit, scores, results);
}

template <class Weight, DType kType>
void reweigh_chunk(const DecodePlan& plan, int64_t index, DecodeScratch& scratch, const DecodeResults& results) {
  const DecodeUnit unit = start_unit(plan, index, scratch);
  float* kept = results.kept + index * plan.rows * plan.stride;
  const RowSums* rows = results.rows + index / plan.chunks * plan.rows;
  for (int row = 0; row < plan.rows; ++row)
    results.sums[index * plan.rows + row].weight_sum =
        reweigh_row<Weight>(plan.problem->reweight.power, rows[row], kept + row * plan.stride, unit.count);
  gather_values<kType>(plan, unit, kept, results);
}

// What the row's shift makes of the weights of a chunk.
template <class Weight>
double decay_of(const ChunkSums& chunk, const RowSums& row) {
  if (!Weight::kShifted || chunk.largest == row.shift) return 1.0;
  return chunk.largest == -INFINITY ? 0.0 : std::exp(static_cast<double>(chunk.largest) - row.shift);
}

// Largest score, shift and normaliser of every row, its sink included.
template <class Weight>
void add_up_chunks(const DecodePlan& plan, const DecodeResults& results) {
  const AttentionProblem& problem = *plan.problem;
  const int64_t group = problem.heads / problem.key_heads;
  for (int64_t head = 0; head < problem.batch * problem.key_heads; ++head)
    for (int64_t r = 0; r < plan.rows; ++r) {
      RowSums& row = results.rows[head * plan.rows + r];
      const ChunkSums* chunks = results.sums + head * plan.chunks * plan.rows + r;
      const float sink =
          problem.sinks != nullptr ? problem.sinks[head % problem.key_heads * group + r / problem.queries] : -INFINITY;
      row.largest = -INFINITY;
      for (int64_t chunk = 0; chunk < plan.chunks; ++chunk)
        row.largest = std::fmax(chunks[chunk * plan.rows].largest, row.largest);
      row.shift = Weight::kShifted ? std::fmax(sink, row.largest) : 0.0f;
      row.normalizer = sink == -INFINITY   ? 0.0
                       : sink == row.shift ? 1.0
                                           : std::exp(static_cast<double>(sink) - row.shift);
      for (int64_t chunk = 0; chunk < plan.chunks; ++chunk)
        row.normalizer += chunks[chunk * plan.rows].normalizer * decay_of<Weight>(chunks[chunk * plan.rows], row);
      if (problem.reweight.power > 0.0f)
        row.peak = find_peak<Weight>(problem, chunks[0].visible_keys, row.shift, row.largest, row.normalizer, false);
    }
}

// Outputs and log normalisers.
template <class Weight>
void write_rows(const DecodePlan& plan, const DecodeResults& results) {
  const AttentionProblem& problem = *plan.problem;
  const bool reweighted = problem.reweight.power > 0.0f;
  const int64_t group = problem.heads / problem.key_heads, width = problem.value_width;
  float* values = results.row_values;
  float* ordered = values + width;
  for (int64_t head_row = 0; head_row < problem.batch * problem.key_heads * plan.rows; ++head_row) {
    const RowSums& row = results.rows[head_row];
    const int64_t key_head = head_row / plan.rows, r = head_row % plan.rows;
    double weight_sum = 0.0;
    zero(values, width);
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      const int64_t place = (key_head * plan.chunks + chunk) * plan.rows + r;
      if (reweighted) weight_sum += results.sums[place].weight_sum;
      const float decay = reweighted ? 1.0f : static_cast<float>(decay_of<Weight>(results.sums[place], row));
      // A decay of 0 forgets the chunk, NaN included.
      if (decay == 0.0f) continue;
      const float* added = results.values + place * width;
      for (int64_t column = 0; column < width; column += Vec::kWidth)
        store(values + column, fma(Vec::broadcast(decay), Vec::load(added + column), Vec::load(values + column)));
    }
    const double divisor = reweighted ? weight_sum : row.normalizer;
    divide_row(values, divisor, width);
    for (int64_t column = 0; column < width; ++column) ordered[column] = values[arranged_place(problem.dtype, column)];
    const int64_t batch = key_head / problem.key_heads;
    const int64_t head = key_head % problem.key_heads * group + r / problem.queries;
    const int64_t query = r % problem.queries;
    narrow(ordered, writable_row_of(problem.output, problem.dtype, batch, head, query), problem.dtype, width);
    problem.log_normalizer[(batch * problem.heads + head) * problem.queries + query] =
        row.normalizer == 0.0 ? -INFINITY : static_cast<float>(row.shift + std::log(row.normalizer) + Weight::kLogUnit);
  }
}

template <class Weight, DType kType>
void decode(const DecodePlan& plan, const Parallel& parallel) {
  struct Shared {
    const DecodePlan& plan;
    DecodeResults results;
  } shared{plan, DecodeResults(plan)};
  for_each_unit<DecodeScratch>(parallel, plan.units, plan, [&shared](int64_t index, DecodeScratch& scratch) {
    attend_chunk<Weight, kType>(shared.plan, index, scratch, shared.results);
  });
  add_up_chunks<Weight>(plan, shared.results);
  if (plan.problem->reweight.power > 0.0f)
    for_each_unit<DecodeScratch>(parallel, plan.units, plan, [&shared](int64_t index, DecodeScratch& scratch) {
      reweigh_chunk<Weight, kType>(shared.plan, index, scratch, shared.results);
    });
  write_rows<Weight>(plan, shared.results);
}

template <class Weight>
void decode_typed(const DecodePlan& plan, const Parallel& parallel) {
  switch (plan.problem->dtype) {
    case DType::kFloat32:
      return decode<Weight, DType::kFloat32>(plan, parallel);
    case DType::kFloat16:
      return decode<Weight, DType::kFloat16>(plan, parallel);
    case DType::kBFloat16:
      return decode<Weight, DType::kBFloat16>(plan, parallel);
  }
}

}  // namespace

bool is_decoding(const AttentionProblem& problem) {
  return problem.heads / problem.key_heads * problem.queries <= kMaxDecodeRows && problem.queries > 0 &&
         problem.keys > 0 && problem.head_width > 0 && problem.head_width % kColumnGroup == 0 &&
         problem.value_width > 0 && problem.value_width % kColumnGroup == 0 && problem.saved_rows == nullptr &&
         problem.attn_mask.kind == MaskKind::kNone && !problem.dropout;
}

void attention_decode(const AttentionProblem& problem, const Parallel& parallel) {
  if (problem.batch == 0) return;
  const DecodePlan plan(problem);
  core::with_weight(problem.weight_function, [&](auto weight) { decode_typed<decltype(weight)>(plan, parallel); });
}

}  // namespace sightline::SIGHTLINE_ISA_NS
