// Q K^T and P V of 16-bit numbers on the matrix units.
//
// mma.m16n8k16 wants its operands spread over the lanes in 4-byte pieces, and memory wants 16-byte loads. Both are had
// by taking the sums over columns (Q K^T) and the columns of the result (P V) in another order: the sum does not care.
//   Q K^T: lane 4 g + t fetches columns 8 t .. 8 t + 7 of key g; its four words are the operands of two products. Q
//   lies
//          in shared memory in the same order, one 16-byte word per lane and product.
//   P V:   lane 4 g + t fetches columns 8 g .. 8 g + 7 of the four keys whose scores it owns, and a byte permutation
//          pairs neighbouring keys. Product e of 8 then yields the columns 8 n + e.
// So a lane fetches what it alone uses. Shared memory is only where its copies arrive while it works on others: no
// barrier, no bank conflict, and the registers are left to the sums.
#pragma once

#include "cuda/decode_rows.h"
#include "cuda/warp_tile.h"

namespace sightline::cuda {

template <class T, int kWidth, bool kVector>
struct Products16Bit {
  static constexpr bool kAsynchronous = true;
  static constexpr int kChunks = kWidth / 32;
  static constexpr int kSets = kWidth / kWidthStep;
  // A lane's words of a tile of keys, and as many of a tile of values.
  static constexpr int kWords = 2 * kChunks;

  using Buffer = Words4[kWords][kWarpThreads];

  struct Shared {
    Words4 queries[kWidth / 16][kWarpThreads];
    Buffer buffers[kWarps][2];
  };

  SIGHTLINE_DEVICE void set_up_queries(const AttentionProblem& problem, int64_t batch, int live_rows,
                                       const RowInfo* rows, Shared& shared) {
    for (int index = thread_index(); index < kWidth / 16 * kWarpThreads; index += kThreads) {
      const int lane = index % kWarpThreads, step = index / kWarpThreads;
      const int column = step / 2 * 32 + lane % 4 * 8 + step % 2 * 4;
      uint32_t words[2][2];
      SIGHTLINE_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int row = lane / 4 + r * 8;
        const char* data = query_row(problem, batch, rows[row], T::kBytes);
        const auto bits = [&](int at) -> uint32_t {
          return row < live_rows && at < problem.head_width ? reinterpret_cast<const uint16_t*>(data)[at] : 0u;
        };
        SIGHTLINE_UNROLL
        for (int half = 0; half < 2; ++half)
          words[r][half] = bits(column + half * 2) | bits(column + half * 2 + 1) << 16;
      }
      shared.queries[step][lane] = {words[0][0], words[1][0], words[0][1], words[1][1]};
    }
  }

  SIGHTLINE_DEVICE void fetch_keys(Shared& shared, const Lane& lane, const HeadRows& keys, int32_t tile, int buffer) {
    SIGHTLINE_UNROLL
    for (int n = 0; n < 2; ++n) {
      const int32_t key = tile + n * 8 + lane.g;
      const char* row = HeadRows::row(keys, key);
      SIGHTLINE_UNROLL_BY(kVector ? 8 : 1)
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        if (chunk * 32 >= keys.width) continue;
        copy_words<T, kVector>(&shared.buffers[lane.warp][buffer][n * kChunks + chunk][lane.index], row,
                               chunk * 32 + lane.t * 8, keys.width, key < keys.end);
      }
    }
  }

  SIGHTLINE_DEVICE void fetch_values(Shared& shared, const Lane& lane, const HeadRows& values, int32_t tile,
                                     const OfKeys<bool>& live, int buffer) {
    SIGHTLINE_UNROLL
    for (int slot = 0; slot < 4; ++slot) {
      const char* row = HeadRows::row(values, tile + key_in_tile(lane, slot / 2, slot % 2));
      SIGHTLINE_UNROLL_BY(kVector ? 8 : 1)
      for (int set = 0; set < kSets; ++set) {
        if (set * kWidthStep >= values.width) continue;
        copy_words<T, kVector>(&shared.buffers[lane.warp][buffer][set * 4 + slot][lane.index], row,
                               set * kWidthStep + lane.g * 8, values.width, live.of[slot / 2][slot % 2]);
      }
    }
  }

  // Products of the rows with the fetched keys; `inverse_norms` only where `normalize`.
  SIGHTLINE_DEVICE void key_products(Shared& shared, const Lane& lane, const HeadRows& keys, int32_t, int buffer,
                                     bool normalize, ScoreTile& products, OfKeys<float>& inverse_norms) {
    const Buffer& words = shared.buffers[lane.warp][buffer];
    products = {};
    SIGHTLINE_UNROLL
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (chunk * 32 >= keys.width) continue;
      const Words4 first = shared.queries[chunk * 2][lane.index], second = shared.queries[chunk * 2 + 1][lane.index];
      SIGHTLINE_UNROLL
      for (int n = 0; n < 2; ++n) {
        const Words4 key = words[n * kChunks + chunk][lane.index];
        T::multiply_add(products.entries[n], first, key.x, key.y);
        T::multiply_add(products.entries[n], second, key.z, key.w);
      }
    }
    if (!normalize) return;
    SIGHTLINE_UNROLL
    for (int n = 0; n < 2; ++n) {
      float squares = 0.0f;
      SIGHTLINE_UNROLL
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        if (chunk * 32 >= keys.width) continue;
        const Words4 key = words[n * kChunks + chunk][lane.index];
        squares = add_squares(add_squares(squares, key.x), key.y);
        squares = add_squares(add_squares(squares, key.z), key.w);
      }
      const float inverse = inverse_of_norm(sum_over_row(squares));  // of key 8 n + g
      SIGHTLINE_UNROLL
      for (int h = 0; h < 2; ++h) inverse_norms.of[n][h] = shuffle(inverse, (lane.t * 2 + h) * 4);
    }
  }

  // The weights as they enter the product, and `weights` replaced by what they were rounded to.
  SIGHTLINE_DEVICE Words4 pack_weights(ScoreTile& weights) {
    uint32_t packed[2][2];
    SIGHTLINE_UNROLL
    for (int n = 0; n < 2; ++n) {
      SIGHTLINE_UNROLL
      for (int r = 0; r < 2; ++r) {
        float& low = weights.entries[n][r * 2];
        float& high = weights.entries[n][r * 2 + 1];
        packed[n][r] = T::pack(low, high);
        widen_pair<T>(packed[n][r], low, high);
      }
    }
    return {packed[0][0], packed[0][1], packed[1][0], packed[1][1]};
  }

  SIGHTLINE_DEVICE void value_products(Shared& shared, const Lane& lane, const HeadRows& values, int32_t,
                                       const OfKeys<bool>&, int buffer, const Words4& packed, const ScoreTile&,
                                       bool finite_only, ValueSums<kWidth>& sums) {
    const Buffer& words = shared.buffers[lane.warp][buffer];
    SIGHTLINE_UNROLL
    for (int set = 0; set < kSets; ++set) {
      if (set * kWidthStep >= values.width) continue;
      Words4 rows[4];
      SIGHTLINE_UNROLL
      for (int slot = 0; slot < 4; ++slot) {
        rows[slot] = words[set * 4 + slot][lane.index];
        if (finite_only)
          rows[slot] = {finite_or_zero<T>(rows[slot].x), finite_or_zero<T>(rows[slot].y),
                        finite_or_zero<T>(rows[slot].z), finite_or_zero<T>(rows[slot].w)};
      }
      auto& set_sums = sums.sums[set];
      multiply_columns(packed, rows[0].x, rows[1].x, rows[2].x, rows[3].x, set_sums[0], set_sums[1]);
      multiply_columns(packed, rows[0].y, rows[1].y, rows[2].y, rows[3].y, set_sums[2], set_sums[3]);
      multiply_columns(packed, rows[0].z, rows[1].z, rows[2].z, rows[3].z, set_sums[4], set_sums[5]);
      multiply_columns(packed, rows[0].w, rows[1].w, rows[2].w, rows[3].w, set_sums[6], set_sums[7]);
    }
  }

 private:
  SIGHTLINE_DEVICE float add_squares(float sum, uint32_t word) {
    float low, high;
    widen_pair<T>(word, low, high);
    return fmaf(high, high, fmaf(low, low, sum));
  }

  // Two columns of four keys each.
  SIGHTLINE_DEVICE void multiply_columns(const Words4& weights, uint32_t a, uint32_t b, uint32_t c, uint32_t d,
                                         float (&first)[4], float (&second)[4]) {
    T::multiply_add(first, weights, low_halves(a, b), low_halves(c, d));
    T::multiply_add(second, weights, high_halves(a, b), high_halves(c, d));
  }
};

}  // namespace sightline::cuda
