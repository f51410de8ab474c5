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

// What process_tile() and find_pair_weights() of attention_forward.cpp do for a plain call in which all keys are
// visible, for one tile of rows and the key tiles that it meets at a time.
template <class Weight, int kParts>
void time_rows(const AttentionProblem& problem, AttentionForwardScratch& scratch, int64_t key_tiles, RowState& state,
               Stopwatch& watch, AttentionParts& parts) {
  alignas(64) float largest[kRowTile];
  const TileVisibility all_visible = {};  // never read
  const int64_t lanes = state.rows.lanes, part = scratch.weight_part, width = scratch.padded_width;
  TileFactors weighted[kPairKeyTiles];
  for (int64_t slot = 0; slot < key_tiles; ++slot) {
    const KeyTile& keys = scratch.key_tiles[slot];
    const int64_t depth = core::round_up(keys.count, kPairDepth);
    if constexpr (kParts == 0) {
      product<false>({keys.keys, keys.key_stride, 1}, state.transposed_queries, lanes, scratch.scores, lanes,
                     keys.count, lanes, problem.head_width);
      watch.add_to(parts.scores);
      finish_tile(problem, state.rows, keys, scratch.bias, scratch.scores, largest);
      track_largest(state, largest);
      if (Weight::kShifted && shift_rises(state, largest)) raise_shift(state, largest, width, false);
      weigh<Weight, true>(state, keys.count, scratch.scores);
      watch.add_to(parts.weights);
      accumulate_product(true, {scratch.scores, 1, lanes}, keys.values, keys.value_stride, state.chunk_values, width,
                         state.rows.rows, width, keys.count);
      watch.add_to(parts.values);
    } else {
      const TileFactors factors{{keys.key_bits, keys.key_bits_stride, keys.key_bits_part},
                                {state.query_pairs, kPanelLanes, scratch.query_part, lanes},
                                scratch.padded_depth};
      pair_products<kParts, kParts, false, true>(&factors, 1, scratch.scores, lanes,
                                                 core::round_up(keys.count, kPairRows), lanes);
      watch.add_to(parts.scores);
      uint32_t* pairs = scratch.weight_pairs + slot * kParts * part;
      const auto weigh = [&](auto factors) {
        if (Weight::kShifted) {
          find_largest_scores<false, factors>(state.rows, keys, all_visible, scratch.scores, largest);
          track_largest(state, largest);
          if (shift_rises(state, largest)) raise_shift(state, largest, width, true);
        }
        weigh_pairs<Weight, kParts, TileHolds::kProducts, false, factors, false>(state, keys, all_visible,
                                                                                 scratch.scores, pairs, part, largest);
      };
      if (problem.normalize_qk)
        weigh(std::true_type());
      else
        weigh(std::false_type());
      weighted[slot] = {{keys.value_columns, kKeyTile, scratch.column_part}, {pairs, kPanelLanes, part, lanes}, depth};
      watch.add_to(parts.weights);
    }
  }
  if constexpr (kParts > 0) {
    pair_products<kParts, kParts, true>(weighted, static_cast<int>(key_tiles), state.chunk_values, lanes, width, lanes);
    watch.add_to(parts.values);
  }
}

template <class Weight, int kParts>
void time_parts(const AttentionProblem& problem, int repetitions, AttentionParts& parts) {
  const AttentionForwardPlan plan(problem, 1);
  AttentionForwardScratch scratch(plan);
  const AttentionForwardUnit unit{0,     0,       0,    core::smaller(plan.unit_rows, plan.rows), true, plan.parts,
                                  false, nullptr, false};
  const int tiles = static_cast<int>((unit.end + kRowTile - 1) / kRowTile);
  const int64_t together = plan.key_tiles() * kKeyTile;
  Stopwatch watch;
  for (int repetition = 0; repetition < repetitions; ++repetition) {
    watch.restart();
    for (int tile = 0; tile < tiles; ++tile) {
      RowState& state = scratch.states[tile];
      const int64_t begin = tile * kRowTile;
      set_up_rows(problem, 0, 0, begin, static_cast<int>(core::smaller(kRowTile, unit.end - begin)), state.rows,
                  scratch.queries, problem.head_width, state.transposed_queries);
      if constexpr (kParts > 0)
        rows_to_pairs<kParts>(state.transposed_queries, problem.head_width, scratch.padded_depth, state.rows.lanes,
                              state.query_pairs, scratch.query_part);
      start_rows(problem, scratch, state);
    }
    watch.add_to(parts.packing);
    for (int64_t begin = 0; begin < problem.keys; begin += together) {
      const int64_t end = core::smaller(problem.keys, begin + together);
      const int64_t key_tiles = (end - begin + kKeyTile - 1) / kKeyTile;
      for (int64_t slot = 0; slot < key_tiles; ++slot) {
        const KeyTileMemory memory = scratch.key_memory(kParts, slot);
        KeyTile& keys = scratch.key_tiles[slot];
        load_keys<kParts>(problem, scratch, 0, 0, begin + slot * kKeyTile, false, nullptr, memory, keys);
        load_values<kParts>(problem, scratch, 0, 0, memory, keys);
      }
      watch.add_to(parts.packing);
      for (int tile = 0; tile < tiles; ++tile)
        time_rows<Weight, kParts>(problem, scratch, key_tiles, scratch.states[tile], watch, parts);
      if (end % kChunkKeys == 0) finish_chunks(problem, scratch, scratch.states, tiles, kParts > 0);
      watch.add_to(parts.values);
    }
    finish_chunks(problem, scratch, scratch.states, tiles, kParts > 0);
    watch.add_to(parts.values);
    parts.entries += unit.end * problem.keys;
  }
}

template <class Weight>
void time_parts(const AttentionProblem& problem, int repetitions, AttentionParts& parts) {
  with_pair_parts(pair_parts(problem.dtype),
                  [&](auto pairs) { time_parts<Weight, pairs>(problem, repetitions, parts); });
}

// The four products of a step of tile_product.h, of operands that stay where they are.
SIGHTLINE_INLINE void multiply_all_tiles() {
  multiply_tiles<0>();
  multiply_tiles<1>();
  multiply_tiles<2>();
  multiply_tiles<3>();
}

constexpr int kChains = 12;  // sums that do not wait for each other: more than latency times width of any machine
constexpr int64_t kTurns = 1 << 16;

// Floating-point operations of so many turns of fused multiply-adds.
double multiply_vectors(int64_t turns) {
  Vec sums[kChains];
  for (int chain = 0; chain < kChains; ++chain) sums[chain] = Vec::broadcast(static_cast<float>(chain));
  const Vec factor = Vec::broadcast(0.999f), term = Vec::broadcast(0.001f);
  for (int64_t turn = 0; turn < turns; ++turn)
#pragma GCC unroll 12
    for (int chain = 0; chain < kChains; ++chain) sums[chain] = fma(sums[chain], factor, term);
  alignas(64) float sink[Vec::kWidth];
  for (int chain = 0; chain < kChains; ++chain) {
    store(sink, sums[chain]);
    asm volatile("" : : "r"(sink) : "memory");
  }
  return 2.0 * static_cast<double>(turns) * kChains * Vec::kWidth;
}

// As many of `kTurns` turns of products of bfloat16: 0 where there is no instruction for them.
double multiply_pairs() {
  if constexpr (!kHasPairProducts) return 0.0;
  if constexpr (kHasTileUnit) {
    const TileUnit unit(true);
    alignas(64) float sink[kPairRows * kPanelLanes];
    clear_all_tiles();
    for (int64_t turn = 0; turn < kTurns; ++turn) multiply_all_tiles();
    store_tile<0>(sink, kPanelLanes * 4);
    asm volatile("" : : "r"(sink) : "memory");
    return 2.0 * kTurns * 4 * kPairRows * kPanelLanes * kPairDepth;
  }
  Vec sums[kChains];
  for (Vec& sum : sums) sum = Vec::broadcast(0.0f);
  const Pairs one = round_to_pairs(Vec::broadcast(1.0f), Vec::broadcast(1.0f));
  for (int64_t turn = 0; turn < kTurns; ++turn)
#pragma GCC unroll 12
    for (int chain = 0; chain < kChains; ++chain) sums[chain] = add_products(sums[chain], one, one);
  alignas(64) float sink[Vec::kWidth];
  for (const Vec& sum : sums) {
    store(sink, sum);
    asm volatile("" : : "r"(sink) : "memory");
  }
  return 2.0 * kTurns * kChains * 2 * Vec::kWidth;
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
  core::with_weight(problem.weight_function,
                    [&](auto weight) { time_parts<decltype(weight)>(problem, repetitions, parts); });
}

double multiply_rate(bool pairs, double seconds) {
  double best = 0.0;
  for (const double end = now() + seconds; now() < end;) {
    const double start = now();
    const double operations = pairs ? multiply_pairs() : multiply_vectors(kTurns);
    const double rate = operations / (now() - start);
    if (rate > best) best = rate;
  }
  return best;
}

double vector_seconds(int64_t turns, bool after_products, double seconds) {
  if (after_products && !kHasTileUnit) return 0.0;
  constexpr int kRepetitions = 100;  // between two looks at the clock
  const TileUnit unit(after_products);
  if (after_products) clear_all_tiles();
  double fastest = INFINITY;
  for (const double end = now() + seconds; now() < end;) {
    const double start = now();
    for (int repetition = 0; repetition < kRepetitions; ++repetition) {
      if (after_products) multiply_all_tiles();
      multiply_vectors(turns);
    }
    const double time = (now() - start) / kRepetitions;
    if (time < fastest) fastest = time;
  }
  return fastest;
}

}  // namespace sightline::SIGHTLINE_ISA_NS
