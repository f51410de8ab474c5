// C (+)= A B on bfloat16 numbers in pairs, summed in fp32: on the tile unit (AMX) where there is one (tile_product.h),
// else with AVX-512-BF16's dot products, else not at all.
//
// A is read as it lies, row after row along the depth; B holds pairs of its depth side by side, (depth / 2, lanes) of
// 32 bits, lower half first; paddings as in tile_product.h. So keys are used where they are, and weights stay in the
// lanes in which they were made: the second product gives the transposed output, (columns of V) x (lanes), from V
// transposed.
#pragma once

#include <type_traits>

#include "cpu/tile_product.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace sightline::SIGHTLINE_ISA_NS {

// Calls take(part, is last) for every part, largest first.
template <int kParts, class Take>
SIGHTLINE_INLINE void for_each_part(Take take) {
  if constexpr (kParts > 1) take(0, std::false_type());
  if constexpr (kParts > 2) take(1, std::false_type());
  take(kParts - 1, std::true_type());
}

#if defined(__AVX512BF16__)
constexpr bool kHasPairProducts = true;
#else
constexpr bool kHasPairProducts = false;
#endif

#if defined(__AVX512BF16__)

// 16 rows of 16 numbers of 32 bits, in place.
SIGHTLINE_INLINE void transpose_block(__m512i (&rows)[16]) {
  __m512i pairs[16];
  for (int row = 0; row < 16; row += 2) {
    pairs[row] = _mm512_unpacklo_epi32(rows[row], rows[row + 1]);
    pairs[row + 1] = _mm512_unpackhi_epi32(rows[row], rows[row + 1]);
  }
  for (int row = 0; row < 16; row += 4) {
    rows[row] = _mm512_unpacklo_epi64(pairs[row], pairs[row + 2]);
    rows[row + 1] = _mm512_unpackhi_epi64(pairs[row], pairs[row + 2]);
    rows[row + 2] = _mm512_unpacklo_epi64(pairs[row + 1], pairs[row + 3]);
    rows[row + 3] = _mm512_unpackhi_epi64(pairs[row + 1], pairs[row + 3]);
  }
  // Row 4 g + c now holds, in each quarter q, column 4 q + c of rows 4 g to 4 g + 3.
  for (int column = 0; column < 4; ++column) {
    const __m512i low_even = _mm512_shuffle_i32x4(rows[column], rows[4 + column], 0x88);
    const __m512i low_odd = _mm512_shuffle_i32x4(rows[column], rows[4 + column], 0xdd);
    const __m512i high_even = _mm512_shuffle_i32x4(rows[8 + column], rows[12 + column], 0x88);
    const __m512i high_odd = _mm512_shuffle_i32x4(rows[8 + column], rows[12 + column], 0xdd);
    pairs[column] = _mm512_shuffle_i32x4(low_even, high_even, 0x88);
    pairs[8 + column] = _mm512_shuffle_i32x4(low_even, high_even, 0xdd);
    pairs[4 + column] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
    pairs[12 + column] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
  }
  for (int row = 0; row < 16; ++row) rows[row] = pairs[row];
}

// The bits of bfloat16 `low` and `high` as pairs.
SIGHTLINE_INLINE __m512i interleave(__m256i low, __m256i high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// Vec::kWidth pairs of bfloat16.
struct Pairs {
  __m512i bits;
};

SIGHTLINE_INLINE Pairs load_pairs(const uint32_t* from) { return {_mm512_loadu_si512(from)}; }
SIGHTLINE_INLINE void store(uint32_t* to, Pairs pairs) { _mm512_storeu_si512(to, pairs.bits); }

SIGHTLINE_INLINE Pairs round_to_pairs(Vec low, Vec high) {
  const __m512bh halves = _mm512_cvtne2ps_pbh(high.value, low.value);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return {_mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(halves))};
}

// Twice as many numbers, of a row or as pairs.
struct Halves {
  __m512i bits;
};

SIGHTLINE_INLINE void store(uint16_t* to, Halves halves) { _mm512_storeu_si512(to, halves.bits); }
SIGHTLINE_INLINE void store(uint32_t* to, Halves halves) { _mm512_storeu_si512(to, halves.bits); }

// Takes the leading bits off two vectors: side by side as in a row, what is left in `first` and `second`.
template <bool kLast>
SIGHTLINE_INLINE Halves split_row(Vec& first, Vec& second) {
  const __m512bh rounded = _mm512_cvtne2ps_pbh(second.value, first.value);
  const __m512i bits = reinterpret_cast<__m512i>(rounded);
  if (!kLast) {
    first =
        first - Vec{_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(bits)), 16))};
    second = second -
             Vec{_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bits, 1)), 16))};
  }
  return {bits};
}

// The same as pairs of one number of `low` and one of `high`.
template <bool kLast>
SIGHTLINE_INLINE Pairs split_pairs(Vec& low, Vec& high) {
  const __m512i bits = round_to_pairs(low, high).bits;
  if (!kLast) {
    low = low - Vec{_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))};
    high = high - Vec{_mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  return {bits};
}

// sum + both numbers of each pair.
SIGHTLINE_INLINE Vec add_pairs(Vec sum, Pairs pairs) {
  const __m512bh ones = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3f803f80));
  return {_mm512_dpbf16_ps(sum.value, reinterpret_cast<__m512bh>(pairs.bits), ones)};
}

// (depth, lanes) of fp32 to pairs (padded_depth / 2, lanes), in parts `part` apart.
template <int kParts>
static void rows_to_pairs(const float* from, int64_t depth, int64_t padded_depth, int64_t lanes, uint32_t* pairs,
                          int64_t part = 0) {
  const Vec zeros = Vec::broadcast(0.0f);
  for (int64_t row = 0; row < padded_depth; row += 2)
    for (int64_t lane = 0; lane < lanes; lane += Vec::kWidth) {
      Vec low = row < depth ? Vec::load(from + row * lanes + lane) : zeros;
      Vec high = row + 1 < depth ? Vec::load(from + (row + 1) * lanes + lane) : zeros;
      uint32_t* to = pairs + row / 2 * lanes + lane;
      for_each_part<kParts>([&](int index, auto last) { store(to + index * part, split_pairs<last>(low, high)); });
    }
}

// Rows (count, width) of bfloat16 to (padded width, padded_count), zeros in the padding; both paddings are multiples of
// kPairRows and kPairDepth.
SIGHTLINE_INLINE void transpose_bfloat16(const uint16_t* from, int64_t row_stride, int64_t count, int64_t width,
                                         uint16_t* to, int64_t padded_count) {
  for (int64_t column = 0; column < width; column += 16) {
    const __mmask16 mask = static_cast<__mmask16>(width - column >= 16 ? 0xffff : (1 << (width - column)) - 1);
    for (int64_t row = 0; row < padded_count; row += 32) {
      __m512i block[16];
      for (int pair = 0; pair < 16; ++pair) {
        const int64_t low = row + 2 * pair;
        const uint16_t* source = from + low * row_stride + column;
        const __mmask16 low_mask = low < count ? mask : 0, high_mask = low + 1 < count ? mask : 0;
        block[pair] = interleave(_mm256_maskz_loadu_epi16(low_mask, source),
                                 _mm256_maskz_loadu_epi16(high_mask, source + row_stride));
      }
      transpose_block(block);
      for (int lane = 0; lane < 16; ++lane) _mm512_storeu_si512(to + (column + lane) * padded_count + row, block[lane]);
    }
  }
}

// Adds the transpose of `from` (columns, lanes) to the rows of `to` (lanes, columns), and clears it.
SIGHTLINE_INLINE void move_transposed(float* from, int64_t columns, int64_t lanes, float* to) {
  for (int64_t column = 0; column < columns; column += 16)
    for (int64_t lane = 0; lane < lanes; lane += 16) {
      __m512i block[16];
      for (int row = 0; row < 16; ++row) {
        float* source = from + (column + row) * lanes + lane;
        block[row] = _mm512_loadu_si512(source);
        store(source, Vec::broadcast(0.0f));
      }
      transpose_block(block);
      for (int row = 0; row < 16; ++row) {
        float* target = to + (lane + row) * columns + column;
        store(target, Vec::load(target) + Vec{_mm512_castsi512_ps(block[row])});
      }
    }
}

#if defined(__AMX_BF16__)

// C (rows, lanes) = the sum of `count` products of operands in parts, or += with kAccumulate; with kAll of all bits.
template <int kParts, bool kAccumulate, bool kAll = false>
static void pair_products(const TileFactors* factors, int count, float* c, int64_t rows, int64_t lanes) {
  Prefetches nothing;
  tile_product<kParts, kParts, kAccumulate, kAll>(factors, count, c, lanes, rows, lanes, nothing);
}

#else

template <int kRows, int kVectors, bool kAccumulate>
SIGHTLINE_INLINE void pair_block(const uint16_t* a, int64_t a_stride, const uint32_t* b, float* c, int64_t lanes,
                                 int64_t depth) {
  __m512 sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 8
    for (int vector = 0; vector < kVectors; ++vector)
      sums[row][vector] = kAccumulate ? _mm512_loadu_ps(c + row * lanes + vector * 16) : _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; k += 2) {
    __m512bh columns[kVectors];
#pragma GCC unroll 8
    for (int vector = 0; vector < kVectors; ++vector)
      columns[vector] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + k / 2 * lanes + vector * 16));
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      int32_t pair;
      __builtin_memcpy(&pair, a + row * a_stride + k, sizeof pair);
      const __m512bh scalar = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 8
      for (int vector = 0; vector < kVectors; ++vector)
        sums[row][vector] = _mm512_dpbf16_ps(sums[row][vector], scalar, columns[vector]);
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 8
    for (int vector = 0; vector < kVectors; ++vector)
      _mm512_storeu_ps(c + row * lanes + vector * 16, sums[row][vector]);
}

template <bool kAccumulate>
static void pair_blocks(const uint16_t* a, int64_t a_stride, const uint32_t* b, float* c, int64_t rows, int64_t lanes,
                        int64_t depth) {
  for (int64_t lane = 0; lane < lanes;) {
    const bool wide = lanes - lane >= 64;
    for (int64_t row = 0; row < rows; row += 4) {
      const uint16_t* a_rows = a + row * a_stride;
      float* target = c + row * lanes + lane;
      if (wide)
        pair_block<4, 4, kAccumulate>(a_rows, a_stride, b + lane, target, lanes, depth);
      else
        pair_block<4, 1, kAccumulate>(a_rows, a_stride, b + lane, target, lanes, depth);
    }
    lane += wide ? 64 : 16;
  }
}

template <int kParts, bool kAccumulate, bool kAll = false>
static void pair_products(const TileFactors* factors, int count, float* c, int64_t rows, int64_t lanes) {
  static_assert(kParts == 1);
  for (int index = 0; index < count; ++index) {
    const auto& [a, b, depth] = factors[index];
    if (kAccumulate || index > 0)
      pair_blocks<true>(a.data, a.stride, b.data, c, rows, lanes, depth);
    else
      pair_blocks<false>(a.data, a.stride, b.data, c, rows, lanes, depth);
  }
}

#endif

// C (rows, lanes) = A B, or += with kAccumulate, of one part each.
template <bool kAccumulate>
static void pair_product(const uint16_t* a, int64_t a_stride, const uint32_t* b, float* c, int64_t rows, int64_t lanes,
                         int64_t depth) {
  const TileFactors factors{{a, a_stride, 0}, {b, kPanelLanes, 0, lanes}, depth};
  pair_products<1, kAccumulate>(&factors, 1, c, rows, lanes);
}

#else

// Never called: kHasPairProducts is false.
struct Pairs {};
SIGHTLINE_INLINE Pairs load_pairs(const uint32_t*) { return {}; }
SIGHTLINE_INLINE void store(uint32_t*, Pairs) {}
SIGHTLINE_INLINE Pairs round_to_pairs(Vec, Vec) { return {}; }
SIGHTLINE_INLINE Vec add_pairs(Vec sum, Pairs) { return sum; }
template <int kParts>
static void rows_to_pairs(const float*, int64_t, int64_t, int64_t, uint32_t*, int64_t = 0) {}
SIGHTLINE_INLINE void transpose_bfloat16(const uint16_t*, int64_t, int64_t, int64_t, uint16_t*, int64_t) {}
SIGHTLINE_INLINE void move_transposed(float*, int64_t, int64_t, float*) {}
template <bool kLast>
SIGHTLINE_INLINE Pairs split_pairs(Vec&, Vec&) {
  return {};
}
template <int kParts, bool kAccumulate, bool kAll = false>
static void pair_products(const TileFactors*, int, float*, int64_t, int64_t) {}
template <bool kAccumulate>
static void pair_product(const uint16_t*, int64_t, const uint32_t*, float*, int64_t, int64_t, int64_t) {}

#endif

}  // namespace sightline::SIGHTLINE_ISA_NS
