// From products to scores: factors, bias, ALiBi, softcap and visibility, on a tile of kKeyTile keys by `lanes` rows.
//
// An invisible entry becomes -inf, for which every weight function gives exactly 0; the mask thereby acts after phi
// (MATH.md section 1) and a NaN of an invisible key is selected away.
#pragma once

#include "core/polynomials.h"
#include "cpu/product.h"
#include "cpu/tile_visibility.h"

namespace sightline::SIGHTLINE_ISA_NS {

// What a tile holds: scores, products that still lack the factors of their row and key, such that ALiBi lowers too, or
// weights.
enum class TileHolds { kScores, kProducts, kSlopedProducts, kWeights };

constexpr bool holds_products(TileHolds holds) {
  return holds == TileHolds::kProducts || holds == TileHolds::kSlopedProducts;
}

struct KeyTile {
  int64_t first;  // index of the first key
  int count;
  const float* keys;  // widened where the dtype asks for it
  int64_t key_stride;
  const float* values;
  int64_t value_stride;
  // For products of pairs (pair_product.h) instead, in parts: keys, padded, and values transposed, (columns, kKeyTile).
  const uint16_t* key_bits;
  int64_t key_bits_stride;
  int64_t key_bits_part;
  const uint16_t* value_columns;
  bool all_take_part;  // no key of the tile is off in key_mask
  bool takes_part[kKeyTile];
  alignas(64) float factor[kKeyTile];  // 1 / |k_j| with normalize_qk, else 1
  bool norm_floored[kKeyTile];
};

// Everything of the tile that does not depend on the query rows. `keys` and `values` must be set.
SIGHTLINE_INLINE void set_up_key_factors(const AttentionProblem& problem, int64_t batch, KeyTile& tile) {
  tile.all_take_part = true;
  for (int j = 0; j < tile.count; ++j) {
    tile.norm_floored[j] = false;
    tile.factor[j] = problem.normalize_qk
                         ? inverse_of_norm(tile.keys + j * tile.key_stride, problem.head_width, &tile.norm_floored[j])
                         : 1.0f;
    tile.takes_part[j] =
        problem.key_mask == nullptr ||
        problem.key_mask[batch * problem.key_mask_strides[0] + (tile.first + j) * problem.key_mask_strides[1]] != 0;
    tile.all_take_part &= tile.takes_part[j];
  }
}

// attn_mask of the tile as a bias, transposed to (key, lane): kKeyTile keys, those past the tile's at 0.
[[maybe_unused]] static void load_bias(const AttentionProblem& problem, const RowTile& rows, const KeyTile& keys,
                                       float* bias) {
  alignas(64) float block[Vec::kWidth * kKeyTile];
  for (int lane = 0; lane < rows.lanes; lane += Vec::kWidth) {
    for (int offset = 0; offset < Vec::kWidth; ++offset) {
      float* row = block + offset * kKeyTile;
      load_mask_row(problem.attn_mask, rows.batch, rows.head[lane + offset], rows.query[lane + offset], keys.first,
                    keys.count, row);
      zero(row + keys.count, kKeyTile - keys.count);
      prefetch_mask(problem.attn_mask, rows.batch, rows.head[lane + offset], rows.query[lane + offset],
                    keys.first + kKeyTile, kKeyTile);
    }
    for (int column = 0; column < kKeyTile; column += Vec::kWidth)
      transpose_block(block + column, kKeyTile, bias + column * rows.lanes + lane, rows.lanes);
  }
}

template <bool kMasked, bool kExtras>
static void finish_scores(const AttentionProblem& problem, const RowTile& rows, const KeyTile& keys,
                          const TileVisibility& visible, const float* bias, float* tile, float* largest) {
  const Vec minus_infinity = Vec::broadcast(-INFINITY);
  const bool has_alibi = problem.alibi_slopes != nullptr;
  const bool has_softcap = problem.softcap > 0.0f;
  for (int lane = 0; lane < rows.lanes; lane += Vec::kWidth) {
    const Vec row_factor = Vec::load(rows.factor + lane);
    const IntVec position = IntVec::load(rows.position + lane);
    const Vec slope = Vec::load(rows.slope + lane);
    Vec top = minus_infinity;
    for (int j = 0; j < keys.count; ++j) {
      float* entry = tile + j * rows.lanes + lane;
      if (kMasked && visible.lanes[j] == 0) {
        store(entry, minus_infinity);
        continue;
      }
      const int32_t key = static_cast<int32_t>(keys.first) + j;
      Vec score = Vec::load(entry) * (row_factor * Vec::broadcast(keys.factor[j]));
      if (kExtras) {
        const Vec entry_bias = bias != nullptr ? Vec::load(bias + j * rows.lanes + lane) : Vec::broadcast(0.0f);
        if (bias != nullptr) score = score + entry_bias;
        if (has_alibi) score = score - slope * absolute(to_float(position - IntVec::broadcast(key)));
        if (has_softcap)
          score = Vec::broadcast(problem.softcap) * core::tanh(score * Vec::broadcast(1.0f / problem.softcap));
        score = select(equal(entry_bias, minus_infinity), minus_infinity, score);
      }
      if (kMasked) score = select(mask_of_bits(visible.lanes[j], lane), score, minus_infinity);
      store(entry, score);
      top = maximum(score, top);
    }
    store(largest + lane, top);
  }
}

SIGHTLINE_INLINE bool has_masked_entries(const AttentionProblem& problem, const RowTile& rows, const KeyTile& keys) {
  return !keys.all_take_part || keys.first < rows.max_first || keys.first + keys.count - 1 > rows.min_last ||
         tile_is_masked_with_bytes(problem, rows, keys.first);
}

// Whether attn_mask adds to scores, or hides keys in another way than masks_with_bytes().
SIGHTLINE_INLINE bool has_bias(const AttentionProblem& problem) {
  return problem.attn_mask.kind != MaskKind::kNone && !masks_with_bytes(problem);
}

// Whether a score is more than a product with its two factors, or minus infinity.
SIGHTLINE_INLINE bool has_extras(const AttentionProblem& problem) {
  return has_bias(problem) || problem.alibi_slopes != nullptr || problem.softcap > 0.0f;
}

// Products to scores, in place: factors, bias, masks. `largest` receives the largest score per lane.
[[maybe_unused]] static void finish_tile(const AttentionProblem& problem, const RowTile& rows, const KeyTile& keys,
                                         float* bias_scratch, float* tile, float* largest) {
  const float* bias = has_bias(problem) ? bias_scratch : nullptr;
  if (bias != nullptr) load_bias(problem, rows, keys, bias_scratch);
  TileVisibility visible;
  if (has_masked_entries(problem, rows, keys)) {
    find_visible(problem, rows, keys.first, keys.count, keys.takes_part, visible);
    if (has_extras(problem))
      finish_scores<true, true>(problem, rows, keys, visible, bias, tile, largest);
    else
      finish_scores<true, false>(problem, rows, keys, visible, bias, tile, largest);
  } else {
    if (has_extras(problem))
      finish_scores<false, true>(problem, rows, keys, visible, bias, tile, largest);
    else
      finish_scores<false, false>(problem, rows, keys, visible, bias, tile, largest);
  }
}

// The finished scores of one tile.
[[maybe_unused]] static void compute_scores(const AttentionProblem& problem, const RowTile& rows, const KeyTile& keys,
                                            const float* transposed_queries, float* bias_scratch, float* tile,
                                            float* largest) {
  product<false>({keys.keys, keys.key_stride, 1}, transposed_queries, rows.lanes, tile, rows.lanes, keys.count,
                 rows.lanes, problem.head_width);
  finish_tile(problem, rows, keys, bias_scratch, tile, largest);
}

constexpr float kUsualPower = 15.0f;  // that of LSSAR

// excess^(p - 1), with 0^0 = 0 at p = 1: a key at or below the mean has no response.
SIGHTLINE_INLINE Vec response_of(Vec excess, float power) {
  if (power == kUsualPower) {  // the loop over the bits of an exponent takes longer than the products
    const Vec square = excess * excess, fourth = square * square;
    return square * fourth * (fourth * fourth);
  }
  const Vec zeros = Vec::broadcast(0.0f);
  const Vec response = core::power(excess, power - 1.0f);
  return power == 1.0f ? select(equal(excess, zeros), zeros, response) : response;
}

// keep / (1 - p) of the entries (key, lane .. lane + width).
SIGHTLINE_INLINE Vec dropout_factor(const AttentionProblem& problem, UintVec row_key, uint32_t key_key) {
  const UintVec bits = core::mix_bits(row_key ^ UintVec::broadcast(key_key), UintVec::broadcast(core::kMixFirst),
                                      UintVec::broadcast(core::kMixSecond));
  return select(at_least(bits, UintVec::broadcast(problem.dropout_threshold)), Vec::broadcast(problem.dropout_scale),
                Vec::broadcast(0.0f));
}

// Multiplies a tile of weights by keep / (1 - p).
[[maybe_unused]] static void drop_weights(const AttentionProblem& problem, const RowTile& rows, const KeyTile& keys,
                                          float* tile) {
  for (int j = 0; j < keys.count; ++j) {
    const uint32_t key_key = core::dropout_key_key(static_cast<uint32_t>(keys.first + j));
    for (int lane = 0; lane < rows.lanes; lane += Vec::kWidth) {
      float* entry = tile + j * rows.lanes + lane;
      const Vec keep = dropout_factor(problem, UintVec::load(rows.dropout_key + lane), key_key);
      store(entry, select(equal(keep, Vec::broadcast(0.0f)), keep, Vec::load(entry) * keep));
    }
  }
}

}  // namespace sightline::SIGHTLINE_ISA_NS
