// C (+)= A B on bfloat16 numbers in pairs, summed in fp32: on the tile unit (AMX) where there is one, else with
// AVX-512-BF16's dot products, else not at all.
//
// A is read as it lies, row after row along the depth; B holds pairs of its depth side by side, (depth / 2, lanes) of
// 32 bits, lower half first. So keys are used where they are, and weights stay in the lanes in which they were made:
// the second product gives the transposed output, (columns of V) x (lanes), from V transposed.
#pragma once

#include "cpu/sanitizer.h"
#include "cpu/vec.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace sightline::SIGHTLINE_ISA_NS {

#if defined(__AVX512BF16__)
constexpr bool kHasPairProducts = true;
#else
constexpr bool kHasPairProducts = false;
#endif
// Rows of A and C come in multiples of kPairRows and the depth in multiples of kPairDepth, both padded with zeros.
constexpr int64_t kPairRows = 16;
constexpr int64_t kPairDepth = 32;

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

// sum + both numbers of each pair.
SIGHTLINE_INLINE Vec add_pairs(Vec sum, Pairs pairs) {
  const __m512bh ones = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3f803f80));
  return {_mm512_dpbf16_ps(sum.value, reinterpret_cast<__m512bh>(pairs.bits), ones)};
}

// (depth, lanes) of fp32 to pairs (padded_depth / 2, lanes), rounding.
SIGHTLINE_INLINE void round_to_pairs(const float* from, int64_t depth, int64_t padded_depth, int64_t lanes,
                                     uint32_t* pairs) {
  const Vec zeros = Vec::broadcast(0.0f);
  for (int64_t row = 0; row < padded_depth; row += 2)
    for (int64_t lane = 0; lane < lanes; lane += Vec::kWidth) {
      const Vec low = row < depth ? Vec::load(from + row * lanes + lane) : zeros;
      const Vec high = row + 1 < depth ? Vec::load(from + (row + 1) * lanes + lane) : zeros;
      store(pairs + row / 2 * lanes + lane, round_to_pairs(low, high));
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

// The intrinsics that load tiles do not tell the compiler which memory they read: what was stored before stays before.
SIGHTLINE_INLINE void tell_memory() { asm volatile("" : : : "memory"); }

// The configuration of this thread's tile unit, for as long as it is wanted.
class TileUnit {
 public:
  explicit TileUnit(bool wanted) : wanted_(wanted) {
    if (!wanted) return;
    struct __attribute__((packed)) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } configuration;
    tell_memory();
    _tile_loadconfig(&configuration);
  }
  ~TileUnit() {
    if (wanted_) _tile_release();
  }
  TileUnit(const TileUnit&) = delete;
  TileUnit& operator=(const TileUnit&) = delete;

 private:
  bool wanted_;
};

// Tiles 0 to 3 as the sums of one or two tiles of rows by one or two of lanes: from C or from 0, and back.
template <int kRowTiles, int kLaneTiles, bool kAccumulate>
SIGHTLINE_INLINE void start_sums(const float* c, int64_t c_bytes) {
  tell_memory();
  const float* below = c + 16 * (c_bytes / 4);
  if (kAccumulate) {
    _tile_loadd(0, c, c_bytes);
    if (kLaneTiles == 2) _tile_loadd(1, c + 16, c_bytes);
    if (kRowTiles == 2) _tile_loadd(2, below, c_bytes);
    if (kRowTiles == 2 && kLaneTiles == 2) _tile_loadd(3, below + 16, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
}

template <int kRowTiles, int kLaneTiles>
SIGHTLINE_INLINE void store_sums(float* c, int64_t c_bytes) {
  float* below = c + 16 * (c_bytes / 4);
  _tile_stored(0, c, c_bytes);
  if (kLaneTiles == 2) _tile_stored(1, c + 16, c_bytes);
  if (kRowTiles == 2) _tile_stored(2, below, c_bytes);
  if (kRowTiles == 2 && kLaneTiles == 2) _tile_stored(3, below + 16, c_bytes);
}

// One or two tiles of rows by one or two of lanes: sums in tiles 0 to 3, A in 4 and 5, B in 6 and 7.
template <int kRowTiles, int kLaneTiles, bool kAccumulate>
SIGHTLINE_INLINE void pair_block(const uint16_t* a, int64_t a_stride, const uint32_t* b, float* c, int64_t lanes,
                                 int64_t depth) {
  const int64_t c_bytes = lanes * 4;
  check_tile(a, a_stride * 2, 16 * kRowTiles, depth * 2);
  check_tile(b, c_bytes, depth / 2, 64 * kLaneTiles);
  check_tile(c, c_bytes, 16 * kRowTiles, 64 * kLaneTiles);
  start_sums<kRowTiles, kLaneTiles, kAccumulate>(c, c_bytes);
  for (int64_t k = 0; k < depth; k += 32) {
    _tile_loadd(4, a + k, a_stride * 2);
    _tile_loadd(6, b + k / 2 * lanes, c_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (kLaneTiles == 2) {
      _tile_loadd(7, b + k / 2 * lanes + 16, c_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kRowTiles == 2) {
      _tile_loadd(5, a + 16 * a_stride + k, a_stride * 2);
      _tile_dpbf16ps(2, 5, 6);
      if (kLaneTiles == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  store_sums<kRowTiles, kLaneTiles>(c, c_bytes);
}

// C (rows, lanes) = A B, or += with kAccumulate.
template <bool kAccumulate>
static void pair_product(const uint16_t* a, int64_t a_stride, const uint32_t* b, float* c, int64_t rows, int64_t lanes,
                         int64_t depth) {
  for (int64_t row = 0; row < rows; row += 32)
    for (int64_t lane = 0; lane < lanes; lane += 32) {
      const uint16_t* a_rows = a + row * a_stride;
      const uint32_t* b_lanes = b + lane;
      float* target = c + row * lanes + lane;
      const bool two_rows = row + 16 < rows, two_lanes = lane + 16 < lanes;
      if (two_rows && two_lanes)
        pair_block<2, 2, kAccumulate>(a_rows, a_stride, b_lanes, target, lanes, depth);
      else if (two_rows)
        pair_block<2, 1, kAccumulate>(a_rows, a_stride, b_lanes, target, lanes, depth);
      else if (two_lanes)
        pair_block<1, 2, kAccumulate>(a_rows, a_stride, b_lanes, target, lanes, depth);
      else
        pair_block<1, 1, kAccumulate>(a_rows, a_stride, b_lanes, target, lanes, depth);
    }
}

#else

class TileUnit {
 public:
  explicit TileUnit(bool) {}
};

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

// C (rows, lanes) = A B, or += with kAccumulate.
template <bool kAccumulate>
static void pair_product(const uint16_t* a, int64_t a_stride, const uint32_t* b, float* c, int64_t rows, int64_t lanes,
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

#endif
#else

// Never called: kHasPairProducts is false.
struct TileUnit {
  explicit TileUnit(bool) {}
};
struct Pairs {};
SIGHTLINE_INLINE Pairs load_pairs(const uint32_t*) { return {}; }
SIGHTLINE_INLINE void store(uint32_t*, Pairs) {}
SIGHTLINE_INLINE Pairs round_to_pairs(Vec, Vec) { return {}; }
SIGHTLINE_INLINE Vec add_pairs(Vec sum, Pairs) { return sum; }
SIGHTLINE_INLINE void round_to_pairs(const float*, int64_t, int64_t, int64_t, uint32_t*) {}
SIGHTLINE_INLINE void transpose_bfloat16(const uint16_t*, int64_t, int64_t, int64_t, uint16_t*, int64_t) {}
SIGHTLINE_INLINE void move_transposed(float*, int64_t, int64_t, float*) {}
template <bool kAccumulate>
static void pair_product(const uint16_t*, int64_t, const uint32_t*, float*, int64_t, int64_t, int64_t) {}

#endif

}  // namespace sightline::SIGHTLINE_ISA_NS
