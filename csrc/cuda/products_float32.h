// Q K^T and P V in true fp32: no matrix unit does that, so every product is a fused multiply-add.
//
// A warp brings 16 keys by 64 columns at a time into its part of shared memory, 256 bytes of a key by 16 lanes, and its
// lanes read from there the rows, keys and columns they own (warp_tile.h). Rows are padded so that no two lanes of a
// quarter warp meet in a bank.
#pragma once

#include "cuda/decode_rows.h"
#include "cuda/warp_tile.h"

namespace sightline::cuda {

struct alignas(16) Floats4 {
  float x, y, z, w;
};

template <int kWidth, bool kVector, bool kHoldsSums>
struct ProductsFloat32 {
  static constexpr bool kAsynchronous = false;
  static constexpr int kQueryStride = kWidth + 4;
  static constexpr int kTileStride = 72;
  static constexpr int kKeyStride = 68;
  static constexpr int kWeightStride = 20;
  // 16-byte loads of a lane for one staged tile: all at once where the sums leave registers for them.
  static constexpr int kLoads = kKeyTile * kWidthStep / 4 / kWarpThreads;
  static constexpr bool kFewRegisters = kHoldsSums && kWidth == 256;
  static constexpr int kLoadsAtOnce = kFewRegisters ? 2 : kLoads;

  struct Shared {
    alignas(16) float queries[kRowBlock * kQueryStride];
    alignas(16) float tile[kWarps][kKeyTile * kTileStride];
    alignas(16) float weights[kWarps][kRowBlock * kWeightStride];
  };

  SIGHTLINE_DEVICE void set_up_queries(const AttentionProblem& problem, int64_t batch, int live_rows,
                                       const RowInfo* rows, Shared& shared) {
    for (int index = thread_index(); index < kRowBlock * kWidth; index += kThreads) {
      const int row = index / kWidth, column = index % kWidth;
      const bool inside = row < live_rows && column < problem.head_width;
      shared.queries[row * kQueryStride + column] =
          inside ? load_element<Float32>(query_row(problem, batch, rows[row], 4), column) : 0.0f;
    }
  }

  SIGHTLINE_DEVICE void fetch_keys(Shared&, const Lane&, const HeadRows&, int32_t, int) {}
  SIGHTLINE_DEVICE void fetch_values(Shared&, const Lane&, const HeadRows&, int32_t, const OfKeys<bool>&, int) {}

  SIGHTLINE_DEVICE void key_products(Shared& shared, const Lane& lane, const HeadRows& keys, int32_t tile, int,
                                     bool normalize, ScoreTile& products, OfKeys<float>& inverse_norms) {
    products = {};
    float squares[2][2] = {};
    const float* staged = shared.tile[lane.warp] + lane.t * 2 * kKeyStride;
    for (int begin = 0; begin < keys.width; begin += kWidthStep) {
      stage<kKeyStride, false>(shared, lane, [&](int in_tile) {
        const int32_t key = tile + in_tile;
        return load_words<Float32, kVector>(HeadRows::row(keys, key), begin + lane.index % 16 * 4, keys.width,
                                            key < keys.end);
      });
      const float* query = shared.queries + lane.g * kQueryStride + begin;
      SIGHTLINE_UNROLL_BY(kFewRegisters ? 1 : 2)
      for (int column = 0; column < kWidthStep; column += 4) {
        const Floats4 upper = read(query + column), lower = read(query + 8 * kQueryStride + column);
        SIGHTLINE_UNROLL
        for (int n = 0; n < 2; ++n) {
          SIGHTLINE_UNROLL
          for (int h = 0; h < 2; ++h) {
            const Floats4 key = read(staged + (n * 8 + h) * kKeyStride + column);
            products.entries[n][h] = add_dot(products.entries[n][h], upper, key);
            products.entries[n][2 + h] = add_dot(products.entries[n][2 + h], lower, key);
          }
        }
      }
      if (!normalize) continue;
      // The eight lanes that own the same keys share the columns.
      SIGHTLINE_UNROLL_BY(1)
      for (int column = lane.g * 4; column < kWidthStep; column += 32) {
        SIGHTLINE_UNROLL
        for (int n = 0; n < 2; ++n) {
          SIGHTLINE_UNROLL
          for (int h = 0; h < 2; ++h) {
            const Floats4 key = read(staged + (n * 8 + h) * kKeyStride + column);
            squares[n][h] = add_dot(squares[n][h], key, key);
          }
        }
      }
    }
    if (!normalize) return;
    SIGHTLINE_UNROLL
    for (int n = 0; n < 2; ++n) {
      SIGHTLINE_UNROLL
      for (int h = 0; h < 2; ++h) {
        float sum = squares[n][h];
        for (int mask = 4; mask < kWarpThreads; mask *= 2) sum += shuffle_xor(sum, mask);
        inverse_norms.of[n][h] = inverse_of_norm(sum);
      }
    }
  }

  SIGHTLINE_DEVICE Words4 pack_weights(ScoreTile&) { return {}; }

  SIGHTLINE_DEVICE void value_products(Shared& shared, const Lane& lane, const HeadRows& values, int32_t tile,
                                       const OfKeys<bool>& live, int, const Words4&, const ScoreTile& weights,
                                       bool finite_only, ValueSums<kWidth>& sums) {
    float* own_weights = shared.weights[lane.warp];
    sync_warp();  // the weights of the last tile have been read
    SIGHTLINE_UNROLL
    for (int n = 0; n < 2; ++n) {
      SIGHTLINE_UNROLL
      for (int entry = 0; entry < 4; ++entry)
        own_weights[(lane.g + entry / 2 * 8) * kWeightStride + key_in_tile(lane, n, entry % 2)] =
            weights.entries[n][entry];
    }
    // Which keys are live is known to the lanes that own them; key 2 i + x is loaded by the lanes of half x.
    const uint32_t live_keys = live_bits(lane, live);
    const float* staged = shared.tile[lane.warp];
    SIGHTLINE_UNROLL
    for (int set = 0; set < kWidth / kWidthStep; ++set) {
      if (set * kWidthStep >= values.width) continue;
      stage<kTileStride, true>(shared, lane, [&](int in_tile) {
        const Words4 words =
            load_words<Float32, kVector>(HeadRows::row(values, tile + in_tile), set * kWidthStep + lane.index % 16 * 4,
                                         values.width, (live_keys >> in_tile & 1) != 0);
        return finite_only ? Words4{finite(words.x), finite(words.y), finite(words.z), finite(words.w)} : words;
      });
      SIGHTLINE_UNROLL_BY(kFewRegisters ? 1 : 2)
      for (int key = 0; key < kKeyTile; ++key)
        add_columns(sums.sums[set], staged, lane, key, own_weights[lane.g * kWeightStride + key],
                    own_weights[(lane.g + 8) * kWeightStride + key]);
    }
  }

 private:
  SIGHTLINE_DEVICE Floats4 read(const float* from) { return *reinterpret_cast<const Floats4*>(from); }

  // Four products by themselves, then the sum: a quarter of the rounding errors of one long chain.
  SIGHTLINE_DEVICE float add_dot(float sum, const Floats4& a, const Floats4& b) {
    return sum + fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, a.x * b.x)));
  }

  SIGHTLINE_DEVICE uint32_t finite(uint32_t bits) { return is_finite(core::float_from_bits(bits)) ? bits : 0u; }

  // Columns from 32 on move up by 4, so that lanes whose columns lie 32 apart read other banks.
  SIGHTLINE_DEVICE int spread(int column) { return column + column / 32 * 4; }

  // Brings 64 columns of the tile's keys into the warp's shared memory; `load` fetches the lane's 16 bytes of a key.
  template <int kStride, bool kSpread, class Load>
  SIGHTLINE_DEVICE void stage(Shared& shared, const Lane& lane, const Load& load) {
    const int column = lane.index % 16 * 4, half = lane.index / 16;
    float* to = shared.tile[lane.warp] + half * kStride + (kSpread ? spread(column) : column);
    SIGHTLINE_UNROLL_BY(kFewRegisters ? 1 : 8)
    for (int begin = 0; begin < kLoads; begin += kLoadsAtOnce) {
      Words4 words[kLoadsAtOnce];
      SIGHTLINE_UNROLL
      for (int index = 0; index < kLoadsAtOnce; ++index) words[index] = load((begin + index) * 2 + half);
      if (begin == 0) sync_warp();  // the tile before has been read
      SIGHTLINE_UNROLL
      for (int index = 0; index < kLoadsAtOnce; ++index)
        *reinterpret_cast<Floats4*>(to + (begin + index) * 2 * kStride) = {
            core::float_from_bits(words[index].x), core::float_from_bits(words[index].y),
            core::float_from_bits(words[index].z), core::float_from_bits(words[index].w)};
    }
    sync_warp();
  }

  SIGHTLINE_DEVICE uint32_t live_bits(const Lane& lane, const OfKeys<bool>& live) {
    int32_t bits = 0;
    SIGHTLINE_UNROLL
    for (int n = 0; n < 2; ++n) {
      SIGHTLINE_UNROLL
      for (int h = 0; h < 2; ++h) bits |= (live.of[n][h] ? 1 : 0) << key_in_tile(lane, n, h);
    }
    bits |= shuffle_xor(bits, 1);
    return static_cast<uint32_t>(bits | shuffle_xor(bits, 2));
  }

  SIGHTLINE_DEVICE void add_columns(float (&sums)[8][4], const float* staged, const Lane& lane, int key, float upper,
                                    float lower) {
    SIGHTLINE_UNROLL
    for (int h = 0; h < 2; ++h) {
      const float* row = staged + key * kTileStride + spread(column_in_set(lane, h, 0));
      const Floats4 parts[2] = {read(row), read(row + 4)};
      SIGHTLINE_UNROLL
      for (int part = 0; part < 2; ++part) {
        const float columns[4] = {parts[part].x, parts[part].y, parts[part].z, parts[part].w};
        SIGHTLINE_UNROLL
        for (int index = 0; index < 4; ++index) {
          float (&sum)[4] = sums[part * 4 + index];
          sum[h] = fmaf(upper, columns[index], sum[h]);
          sum[2 + h] = fmaf(lower, columns[index], sum[2 + h]);
        }
      }
    }
  }
};

}  // namespace sightline::cuda
