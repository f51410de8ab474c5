// A tile of query rows: who they are, what they see, and the per-row factors of their scores.
//
// The rows of all query heads that share a key head are numbered rho = g * M + i (g: head within the group), so a
// tile of one-row decoding holds the whole group, and keys are read once for it.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/dropout.h"
#include "core/visibility.h"
#include "cpu/row_math.h"

namespace sightline::SIGHTLINE_ISA_NS {

struct RowTile {
  int64_t batch;
  int rows;   // live rows
  int lanes;  // rows rounded up to vectors: the stride of every tile; the lanes past `rows` compute on zeros
  int64_t min_first, max_first, min_last, max_last;
  int64_t head[kRowTile];
  int64_t query[kRowTile];
  alignas(64) int32_t first[kRowTile];
  alignas(64) int32_t last[kRowTile];
  alignas(64) int32_t position[kRowTile];
  alignas(64) uint32_t dropout_key[kRowTile];
  alignas(64) float visible_keys[kRowTile];  // n_i
  alignas(64) float unit_factor[kRowTile];   // (ln n_i or 1) / |q_i|: the factor without the scale
  alignas(64) float factor[kRowTile];        // scale_h times that
  alignas(64) float inverse_norm[kRowTile];  // 1 / |q_i| with normalize_qk, else 1
  alignas(64) float slope[kRowTile];
  bool norm_floored[kRowTile];
};

SIGHTLINE_INLINE const char* mask_element(const MaskView& mask, int64_t batch, int64_t head, int64_t query,
                                          int64_t key) {
  const int64_t size = mask.kind == MaskKind::kBool ? 1 : mask.kind == MaskKind::kFloat32 ? 4 : 2;
  return static_cast<const char*>(mask.data) +
         size * (batch * mask.strides[0] + head * mask.strides[1] + query * mask.strides[2] + key * mask.strides[3]);
}

// A mask entry as a bias: what is invisible is -inf.
SIGHTLINE_INLINE float mask_bias(const char* element, MaskKind kind) {
  switch (kind) {
    case MaskKind::kBool:
      return *reinterpret_cast<const uint8_t*>(element) != 0 ? 0.0f : -INFINITY;
    case MaskKind::kFloat32:
      return *reinterpret_cast<const float*>(element);
    case MaskKind::kFloat16:
      return core::float16_to_float(*reinterpret_cast<const uint16_t*>(element));
    case MaskKind::kBFloat16:
      return core::bfloat16_to_float(*reinterpret_cast<const uint16_t*>(element));
    default:
      return 0.0f;
  }
}

// Asks for entries [first, first + count) of a row of the mask, which may lie beyond its end: nothing is read.
SIGHTLINE_INLINE void prefetch_mask(const MaskView& mask, int64_t batch, int64_t head, int64_t query, int64_t first,
                                    int64_t count) {
  const char* start = mask_element(mask, batch, head, query, first);
  const int64_t bytes = count * (mask.kind == MaskKind::kBool ? 1 : mask.kind == MaskKind::kFloat32 ? 4 : 2);
  for (int64_t offset = 0; offset < bytes; offset += 64) __builtin_prefetch(start + offset);
}

// Entries [first, first + count) of a row of the mask as biases.
[[maybe_unused]] static void load_mask_row(const MaskView& mask, int64_t batch, int64_t head, int64_t query,
                                           int64_t first, int64_t count, float* bias) {
  const char* start = mask_element(mask, batch, head, query, first);
  if (mask.strides[3] != 1) {
    for (int64_t j = 0; j < count; ++j)
      bias[j] = mask_bias(mask_element(mask, batch, head, query, first + j), mask.kind);
    return;
  }
  switch (mask.kind) {
    case MaskKind::kBool:
      for (int64_t j = 0; j < count; ++j) bias[j] = start[j] != 0 ? 0.0f : -INFINITY;
      return;
    case MaskKind::kFloat16:
      return widen(start, DType::kFloat16, bias, count);
    case MaskKind::kBFloat16:
      return widen(start, DType::kBFloat16, bias, count);
    default:
      return widen(start, DType::kFloat32, bias, count);
  }
}

// Whether attn_mask only hides keys, in bytes that lie side by side.
SIGHTLINE_INLINE bool masks_with_bytes(const AttentionProblem& problem) {
  return problem.attn_mask.kind == MaskKind::kBool && problem.attn_mask.strides[3] == 1;
}

// The tile of the packed mask with this query and key.
SIGHTLINE_INLINE int64_t mask_tile(const MaskTiles& tiles, int64_t batch, int64_t query, int64_t key) {
  return batch * tiles.batch_stride + query / kRowTile * tiles.row_stride + key / kKeyTile;
}

// Entries [first, first + count) of a row of attn_mask, count <= 64, as bits.
SIGHTLINE_INLINE uint64_t mask_bits(const AttentionProblem& problem, int64_t batch, int64_t head, int64_t query,
                                    int64_t first, int64_t count) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(mask_element(problem.attn_mask, batch, head, query, first));
  if (count == 64) return nonzero_bits(bytes);
  uint8_t padded[64] = {};
  __builtin_memcpy(padded, bytes, static_cast<size_t>(count));
  return nonzero_bits(padded);
}

// How many of the keys before `key` the packed mask leaves visible to a row, counted from the first packed tile.
SIGHTLINE_INLINE int64_t count_in_tiles(const AttentionProblem& problem, int64_t batch, int64_t head, int64_t query,
                                        int64_t key) {
  const int64_t tile = mask_tile(problem.mask_tiles, batch, query, key), first = key / kKeyTile * kKeyTile;
  return problem.mask_tiles.seen_before[tile * kRowTile + query % kRowTile] +
         __builtin_popcountll(mask_bits(problem, batch, head, query, first, key - first));
}

[[maybe_unused]] static int64_t count_visible(const AttentionProblem& problem, int64_t batch, int64_t head,
                                              int64_t query, int64_t first, int64_t last) {
  if (last < first) return 0;
  if (problem.mask_tiles.lanes != nullptr && problem.key_mask == nullptr)
    return count_in_tiles(problem, batch, head, query, last) - count_in_tiles(problem, batch, head, query, first) +
           static_cast<int64_t>(mask_bits(problem, batch, head, query, last, 1));
  if (masks_with_bytes(problem) && problem.key_mask == nullptr) {
    int64_t visible = 0;
    for (int64_t start = first; start <= last; start += 64)
      visible +=
          __builtin_popcountll(mask_bits(problem, batch, head, query, start, core::smaller(64, last + 1 - start)));
    return visible;
  }
  if (problem.attn_mask.kind != MaskKind::kNone) {
    constexpr int64_t kBlock = 256;
    alignas(64) float bias[kBlock];
    int64_t hidden = 0;
    for (int64_t start = first; start <= last; start += kBlock) {
      const int64_t count = core::smaller(kBlock, last + 1 - start);
      load_mask_row(problem.attn_mask, batch, head, query, start, count, bias);
      if (problem.key_mask != nullptr)
        for (int64_t j = 0; j < count; ++j)
          if (problem.key_mask[batch * problem.key_mask_strides[0] + (start + j) * problem.key_mask_strides[1]] == 0)
            bias[j] = -INFINITY;
      int32_t hidden_here = 0;
      for (int64_t j = 0; j < count; ++j) hidden_here += bias[j] == -INFINITY;
      hidden += hidden_here;
    }
    return last + 1 - first - hidden;
  }
  if (problem.visible_prefix != nullptr) {
    const int32_t* prefix = problem.visible_prefix + batch * (problem.keys + 1);
    return prefix[last + 1] - prefix[first];
  }
  return last - first + 1;
}

// Row `query` of head `head` as lane `lane` of the tile; `row` is the query, widened. Needs what set_up_tile sets.
SIGHTLINE_INLINE void set_up_row(const AttentionProblem& problem, int64_t head, int64_t query, const float* row,
                                 int lane, RowTile& tile) {
  const core::KeyInterval interval = core::visible_interval(problem, tile.batch, query);
  tile.head[lane] = head;
  tile.query[lane] = query;
  const int64_t first = core::larger(interval.first, 0);
  const bool empty = interval.last < first;
  tile.first[lane] = static_cast<int32_t>(empty ? 0 : first);
  tile.last[lane] = static_cast<int32_t>(empty ? -1 : interval.last);
  tile.position[lane] = static_cast<int32_t>(interval.position);
  if (!empty) {  // a row that sees nothing must not widen the walk over the keys
    tile.min_first = core::smaller(tile.min_first, tile.first[lane]);
    tile.max_last = core::larger(tile.max_last, tile.last[lane]);
  }
  tile.max_first = core::larger(tile.max_first, tile.first[lane]);
  tile.min_last = core::smaller(tile.min_last, tile.last[lane]);
  tile.dropout_key[lane] =
      problem.dropout
          ? core::dropout_row_key(problem.dropout_seed, static_cast<uint32_t>(tile.batch * problem.heads + head),
                                  static_cast<uint32_t>(query))
          : 0;
  const bool needs_count = problem.length_scale || problem.reweight.power > 0.0f;
  const int64_t visible =
      needs_count ? count_visible(problem, tile.batch, head, query, tile.first[lane], tile.last[lane]) : 0;
  tile.visible_keys[lane] = static_cast<float>(visible);
  tile.norm_floored[lane] = false;
  tile.inverse_norm[lane] =
      problem.normalize_qk ? inverse_of_norm(row, problem.head_width, &tile.norm_floored[lane]) : 1.0f;
  const float length =
      problem.length_scale ? (visible > 0 ? static_cast<float>(std::log(static_cast<double>(visible))) : 0.0f) : 1.0f;
  tile.unit_factor[lane] = length * tile.inverse_norm[lane];
  tile.factor[lane] = problem.scales[head] * tile.unit_factor[lane];
  tile.slope[lane] = problem.alibi_slopes != nullptr ? problem.alibi_slopes[head] : 0.0f;
}

SIGHTLINE_INLINE void set_up_tile(int64_t batch, int rows, RowTile& tile) {
  tile.batch = batch;
  tile.rows = rows;
  tile.lanes = static_cast<int>(core::round_up(rows, Vec::kWidth));
  tile.min_first = tile.min_last = INT32_MAX;
  tile.max_first = tile.max_last = INT32_MIN;
}

// Rows [begin, begin + rows) of one key head. `queries` receives them widened, row after row with this stride (the
// padding of the stride and of the lanes zeroed), `transposed` the same as (D, lanes).
[[maybe_unused]] static void set_up_rows(const AttentionProblem& problem, int64_t batch, int64_t key_head,
                                         int64_t begin, int rows, RowTile& tile, float* queries, int64_t query_stride,
                                         float* transposed) {
  const int64_t group = problem.heads / problem.key_heads;
  set_up_tile(batch, rows, tile);
  for (int lane = 0; lane < tile.lanes; ++lane) {
    float* row = queries + lane * query_stride;
    const int64_t source = lane < rows ? begin + lane : begin;
    const int64_t head = key_head * group + source / problem.queries;
    const int64_t query = source % problem.queries;
    const int64_t live = lane < rows ? problem.head_width : 0;
    if (lane < rows) widen(row_of(problem.query, problem.dtype, batch, head, query), problem.dtype, row, live);
    for (int64_t d = live; d < query_stride; ++d) row[d] = 0.0f;
    set_up_row(problem, head, query, row, lane, tile);
  }
  transpose_rows(queries, query_stride, tile.lanes, problem.head_width, transposed);
}

}  // namespace sightline::SIGHTLINE_ISA_NS
