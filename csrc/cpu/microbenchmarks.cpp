// What the parts of attention's forward pass cost apart, and the rates that they are compared with: for the bench
// module, on one thread.
#include <time.h>

#include "cpu/forward_unit.h"
#include "cpu/kernel_table.h"

namespace sightline::SIGHTLINE_ISA_NS {
namespace {

double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// Adds the time since the last call to a part.
class Stopwatch {
 public:
  void restart() { last_ = now(); }
  void add_to(double& part) {
    const double time = now();
    part += time - last_;
    last_ = time;
  }

 private:
  double last_ = now();
};

// Weights of a tile of products, as process_tile() and process_pair_tile() of attention_forward.cpp choose them for a
// plain call.
template <class Weight>
void weigh_products(const AttentionProblem& problem, AttentionForwardScratch& scratch, const KeyTile& keys, bool pairs,
                    RowState& state) {
  alignas(64) float largest[kRowTile];
  const auto finish = [&] {
    finish_tile(problem, state.rows, keys, scratch.bias, scratch.scores, largest);
    track_largest(state, largest);
    if (Weight::kShifted) raise_shift(state, largest, scratch.padded_width, pairs);
  };
  if (!pairs) {
    finish();
    weigh<Weight, true>(state, keys.count, scratch.scores);
  } else if (Weight::kShifted || has_masked_entries(state.rows, keys)) {
    finish();
    weigh_pairs<Weight, TileHolds::kScores, false>(state, keys, scratch.scores, scratch.weight_pairs, largest);
  } else if constexpr (!Weight::kShifted) {
    weigh_pairs<Weight, TileHolds::kProducts, false>(state, keys, scratch.scores, scratch.weight_pairs, largest);
  }
}

template <class Weight>
void time_parts(const AttentionProblem& problem, int repetitions, AttentionParts& parts) {
  const AttentionForwardPlan plan(problem, 1);
  AttentionForwardScratch scratch(plan);
  const AttentionForwardUnit unit{0, 0, 0, core::smaller(plan.unit_rows, plan.rows), true, plan.pairs, false};
  const int tiles = static_cast<int>((unit.end + kRowTile - 1) / kRowTile);
  Stopwatch watch;
  for (int repetition = 0; repetition < repetitions; ++repetition) {
    watch.restart();
    for (int tile = 0; tile < tiles; ++tile) {
      RowState& state = scratch.states[tile];
      const int64_t begin = tile * kRowTile;
      set_up_rows(problem, 0, 0, begin, static_cast<int>(core::smaller(kRowTile, unit.end - begin)), state.rows,
                  scratch.queries, problem.head_width, state.transposed_queries);
      if (plan.pairs)
        round_to_pairs(state.transposed_queries, problem.head_width, scratch.padded_depth, state.rows.lanes,
                       state.query_pairs);
      start_rows(problem, scratch, state);
    }
    watch.add_to(parts.packing);
    for (int64_t first = 0; first < problem.keys; first += kKeyTile) {
      KeyTile keys;
      load_key_tile(problem, unit, scratch, first, true, keys);
      watch.add_to(parts.packing);
      for (int tile = 0; tile < tiles; ++tile) {
        RowState& state = scratch.states[tile];
        const int lanes = state.rows.lanes;
        if (plan.pairs)
          pair_product<false>(keys.key_bits, keys.key_bits_stride, state.query_pairs, scratch.scores,
                              core::round_up(keys.count, kPairRows), lanes, scratch.padded_depth);
        else
          product<false>({keys.keys, keys.key_stride, 1}, state.transposed_queries, lanes, scratch.scores, lanes,
                         keys.count, lanes, problem.head_width);
        watch.add_to(parts.scores);
        weigh_products<Weight>(problem, scratch, keys, plan.pairs, state);
        watch.add_to(parts.weights);
        if (plan.pairs)
          pair_product<true>(keys.value_columns, kKeyTile, scratch.weight_pairs, state.chunk_values,
                             scratch.padded_width, lanes, core::round_up(keys.count, kPairDepth));
        else
          accumulate_product(true, {scratch.scores, 1, lanes}, keys.values, keys.value_stride, state.chunk_values,
                             scratch.padded_width, state.rows.rows, scratch.padded_width, keys.count);
        watch.add_to(parts.values);
      }
      if ((first / kKeyTile + 1) % (kChunkKeys / kKeyTile) == 0)
        finish_chunks(problem, scratch, scratch.states, tiles, plan.pairs);
      watch.add_to(parts.values);
    }
    finish_chunks(problem, scratch, scratch.states, tiles, plan.pairs);
    watch.add_to(parts.values);
    parts.entries += unit.end * problem.keys;
  }
}

constexpr int kChains = 12;  // sums that do not wait for each other: more than latency times width of any machine
constexpr int64_t kTurns = 1 << 16;

// Floating-point operations of `kTurns` turns of fused multiply-adds.
double multiply_vectors() {
  Vec sums[kChains];
  for (int chain = 0; chain < kChains; ++chain) sums[chain] = Vec::broadcast(static_cast<float>(chain));
  const Vec factor = Vec::broadcast(0.999f), term = Vec::broadcast(0.001f);
  for (int64_t turn = 0; turn < kTurns; ++turn)
#pragma GCC unroll 12
    for (int chain = 0; chain < kChains; ++chain) sums[chain] = fma(sums[chain], factor, term);
  alignas(64) float sink[Vec::kWidth];
  for (int chain = 0; chain < kChains; ++chain) {
    store(sink, sums[chain]);
    asm volatile("" : : "r"(sink) : "memory");
  }
  return 2.0 * kTurns * kChains * Vec::kWidth;
}

// The same of products of bfloat16: 0 where there is no instruction for them.
double multiply_pairs() {
#if defined(__AMX_BF16__)
  const TileUnit unit(true);
  alignas(64) float sink[16 * 16];
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t turn = 0; turn < kTurns; ++turn) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sink, 64);
  asm volatile("" : : "r"(sink) : "memory");
  return 2.0 * kTurns * 4 * 16 * 16 * 32;
#elif defined(__AVX512BF16__)
  __m512 sums[kChains];
  for (int chain = 0; chain < kChains; ++chain) sums[chain] = _mm512_setzero_ps();
  const __m512bh one = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1.0f), _mm512_set1_ps(1.0f));
  for (int64_t turn = 0; turn < kTurns; ++turn)
#pragma GCC unroll 12
    for (int chain = 0; chain < kChains; ++chain) sums[chain] = _mm512_dpbf16_ps(sums[chain], one, one);
  alignas(64) float sink[16];
  for (int chain = 0; chain < kChains; ++chain) {
    _mm512_store_ps(sink, sums[chain]);
    asm volatile("" : : "r"(sink) : "memory");
  }
  return 2.0 * kTurns * kChains * 32;
#else
  return 0.0;
#endif
}

constexpr int kReadStreams = 4;  // places read in turns: one alone leaves the prefetchers of a core half idle
constexpr int kReadVectors = 4;

}  // namespace

void read_floats(const float* data, int64_t count) {
  const FlushDenormals mode;
  constexpr int64_t kStep = kReadVectors * Vec::kWidth;
  const int64_t length = count / kReadStreams / kStep * kStep;
  Vec sums[kReadStreams * kReadVectors];
  for (Vec& sum : sums) sum = Vec::broadcast(0.0f);
  for (int64_t first = 0; first < length; first += kStep)
#pragma GCC unroll 4
    for (int stream = 0; stream < kReadStreams; ++stream)
#pragma GCC unroll 4
      for (int vector = 0; vector < kReadVectors; ++vector) {
        Vec& sum = sums[stream * kReadVectors + vector];
        sum = sum + Vec::load(data + stream * length + first + vector * Vec::kWidth);
      }
  alignas(64) float sink[Vec::kWidth];
  for (const Vec& sum : sums) {
    store(sink, sum);
    asm volatile("" : : "r"(sink) : "memory");
  }
  float rest = 0.0f;
  for (int64_t index = kReadStreams * length; index < count; ++index) rest += data[index];
  sink[0] = rest;
  asm volatile("" : : "r"(sink) : "memory");
}

void attention_parts(const AttentionProblem& problem, int repetitions, AttentionParts& parts) {
  const FlushDenormals mode;
  if (problem.weight_function == WeightFunction::kSoftmax)
    time_parts<core::Exponential>(problem, repetitions, parts);
  else
    time_parts<core::SoftPlus>(problem, repetitions, parts);
}

double multiply_rate(bool pairs, double seconds) {
  double best = 0.0;
  for (const double end = now() + seconds; now() < end;) {
    const double start = now();
    const double operations = pairs ? multiply_pairs() : multiply_vectors();
    const double rate = operations / (now() - start);
    if (rate > best) best = rate;
  }
  return best;
}

}  // namespace sightline::SIGHTLINE_ISA_NS
