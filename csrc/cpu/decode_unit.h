// What decoding works with: how keys are cut into chunks, a thread's scratch memory, the sums that chunks leave to be
// added up, and the start of a chunk.
#pragma once

#include "cpu/decode_tiles.h"
#include "cpu/weigh_tile.h"
#include "cpu/workspace.h"

namespace sightline::SIGHTLINE_ISA_NS {

// What a row has gathered in one chunk.
struct ChunkSums {
  float largest;       // score
  double normalizer;   // of weights, for softmax relative to `largest`
  double weight_sum;   // of re-weighted ones
  float visible_keys;  // n_i, of all chunks
};

// And in all chunks.
struct RowSums {
  float shift, largest;
  double normalizer;
  Peak peak;
};

struct DecodePlan {
  const AttentionProblem* problem;
  int rows;  // per key head
  int64_t chunks, units, stride;
  bool by_pairs;  // products with keys: of pairs of bfloat16
  bool by_tiles;  // and these on the tile unit

  explicit DecodePlan(const AttentionProblem& of)
      : problem(&of),
        rows(static_cast<int>(of.heads / of.key_heads * of.queries)),
        chunks((of.keys + kDecodeChunk - 1) / kDecodeChunk),
        units(of.batch * of.key_heads * chunks),
        stride(core::smaller(kDecodeChunk, core::round_up(of.keys, Vec::kWidth))),
        by_pairs(kHasPairProducts && of.dtype == DType::kBFloat16),
        by_tiles(kHasTileUnit && by_pairs) {}
};

// Shared by the threads; every unit writes its own part.
struct DecodeResults {
  explicit DecodeResults(const DecodePlan& plan) : memory(layout(plan, nullptr)) { layout(plan, memory.get()); }

  int64_t layout(const DecodePlan& plan, char* base) {
    const AttentionProblem& problem = *plan.problem;
    const bool reweighted = problem.reweight.power > 0.0f;
    const int64_t head_rows = problem.batch * problem.key_heads * plan.rows;
    Arena arena(base);
    sums = arena.take<ChunkSums>(plan.units * plan.rows);
    values = arena.take<float>(plan.units * plan.rows * problem.value_width);
    rows = arena.take<RowSums>(head_rows);
    row_values = arena.take<float>(2 * problem.value_width);
    kept = arena.take<float>(reweighted ? plan.units * plan.rows * plan.stride : 0);
    return arena.used();
  }

  Allocation memory;
  ChunkSums* sums = nullptr;    // (unit, row)
  float* values = nullptr;      // (unit, row, Dv), columns in the order of arranged_place
  RowSums* rows = nullptr;      // (batch, key head, row)
  float* row_values = nullptr;  // (2, Dv)
  float* kept = nullptr;        // (unit, row, stride)
};

struct DecodeScratch {
  explicit DecodeScratch(const DecodePlan& plan) : memory(layout(plan, nullptr)) { layout(plan, memory.get()); }

  int64_t layout(const DecodePlan& plan, char* base) {
    const AttentionProblem& problem = *plan.problem;
    Arena arena(base);
    rows = arena.take<RowTile>(1);
    query = arena.take<float>(problem.head_width);
    queries = arena.take<float>(plan.by_pairs ? 0 : plan.rows * problem.head_width);
    query_bits = arena.take<uint16_t>(plan.by_pairs ? plan.rows * problem.head_width : 0);
    scores = arena.take<float>(problem.reweight.power > 0.0f ? 0 : plan.rows * plan.stride);
    key_factors = arena.take<float>(problem.normalize_qk ? plan.stride : 0);
    hidden = arena.take<float>(problem.key_mask != nullptr ? plan.stride : 0);
    query_pairs =
        arena.take<uint32_t>(plan.by_tiles ? core::round_up(plan.rows, kRowGroup) * problem.head_width / 2 : 0);
    return arena.used();
  }

  Allocation memory;
  RowTile* rows = nullptr;
  float *query = nullptr, *queries = nullptr, *scores = nullptr, *key_factors = nullptr, *hidden = nullptr;
  uint16_t* query_bits = nullptr;   // in place of `queries` where products are of pairs
  uint32_t* query_pairs = nullptr;  // pack_queries
};

// The keys of a chunk that any row sees: [first, first + count).
struct DecodeUnit {
  int64_t index, batch, key_head, first, count;
};

// Who the rows are, and the queries in the order in which keys are read.
[[maybe_unused]] static DecodeUnit start_unit(const DecodePlan& plan, int64_t index, DecodeScratch& scratch) {
  const AttentionProblem& problem = *plan.problem;
  const int64_t head_index = index / plan.chunks;
  const int64_t group = problem.heads / problem.key_heads;
  DecodeUnit unit{index, head_index / problem.key_heads, head_index % problem.key_heads, 0, 0};
  RowTile& rows = *scratch.rows;
  set_up_tile(unit.batch, plan.rows, rows);
  for (int row = 0; row < plan.rows; ++row) {
    const int64_t head = unit.key_head * group + row / problem.queries;
    const int64_t query = row % problem.queries;
    const void* from = row_of(problem.query, problem.dtype, unit.batch, head, query);
    widen(from, problem.dtype, scratch.query, problem.head_width);
    set_up_row(problem, head, query, scratch.query, row, rows);
    if (plan.by_pairs) {
      __builtin_memcpy(scratch.query_bits + row * problem.head_width, from, problem.head_width * sizeof(uint16_t));
      continue;
    }
    float* arranged = scratch.queries + row * problem.head_width;
    for (int64_t column = 0; column < problem.head_width; ++column)
      arranged[arranged_place(problem.dtype, column)] = scratch.query[column];
  }
  if (plan.by_tiles) pack_queries(scratch.query_bits, problem.head_width, plan.rows, scratch.query_pairs);
  const int64_t begin = index % plan.chunks * kDecodeChunk;
  const int64_t first = core::larger(begin, rows.min_first);
  const int64_t end = core::smaller(core::smaller(begin + kDecodeChunk, problem.keys), rows.max_last + 1);
  unit.first = first < end ? first : begin;
  unit.count = core::larger(0, end - first);
  return unit;
}

[[maybe_unused]] static WideRows rows_of(const AttentionProblem& problem, const HeadsView& view, int64_t width,
                                         const DecodeUnit& unit) {
  return {row_of(view, problem.dtype, unit.batch, unit.key_head, unit.first), view.row_stride, width};
}

}  // namespace sightline::SIGHTLINE_ISA_NS
