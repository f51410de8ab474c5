// C (+)= A B on the tile unit (AMX), with A and B each one matrix of bfloat16 or the sum of two: so many of the
// leading bits of their numbers take part. Products of parts whose sizes multiply to less than the last part counts are
// left out.
//
// A is read as it lies, row after row along the depth; B holds pairs of its depth side by side, lower half first, in
// panels of 16 lanes, (lanes / 16, depth / 2, 16) of 32 bits: rows of a tile far apart would fall on few sets of the
// first-level cache. Rows of A come in multiples of kPairRows and the depth in multiples of kPairDepth, both
// padded with zeros.
#pragma once

#include <type_traits>

#include "cpu/pair_product.h"

namespace sightline::SIGHTLINE_ISA_NS {

#if defined(__AMX_BF16__)
constexpr bool kHasTileUnit = true;
#else
constexpr bool kHasTileUnit = false;
#endif

// A matrix of bfloat16 in parts: rows `stride` apart, parts `part` apart, both in elements.
struct SplitRows {
  const uint16_t* data;
  int64_t stride;
  int64_t part;
};
// The same in panels of pairs, `panel` apart.
struct SplitPairs {
  const uint32_t* data;
  int64_t panel;
  int64_t part;
};
constexpr int64_t kPanelLanes = 16;

// Rows of memory that are asked for while the tile unit computes, so that their bytes need not be waited for.
class Prefetch {
 public:
  Prefetch() = default;
  Prefetch(const void* start, int64_t row_bytes, int64_t bytes_between, int64_t rows)
      : next_(static_cast<const char*>(start)), row_bytes_(row_bytes), bytes_between_(bytes_between), rows_(rows) {}

  template <bool kWrite>
  __attribute__((always_inline)) inline void ask(int64_t rows) {
    for (; rows > 0 && rows_ > 0; --rows, --rows_, next_ += bytes_between_)
      for (int64_t offset = 0; offset < row_bytes_; offset += 64) __builtin_prefetch(next_ + offset, kWrite, 2);
  }

 private:
  const char* next_ = nullptr;
  int64_t row_bytes_ = 0, bytes_between_ = 0, rows_ = 0;
};

// What is read and what is written next.
struct Prefetches {
  Prefetch reads[2];
  Prefetch writes;

  __attribute__((always_inline)) inline void ask(int64_t rows) {
    reads[0].ask<false>(rows);
    reads[1].ask<false>(rows);
    writes.ask<true>(rows);
  }
};

#if defined(__AMX_BF16__)

// Sixteen rows and lanes, or twice as many of either: sums in tiles 0 to 3, A in 4 and 5, B in 6 and 7.
template <int kPartsA, int kPartsB, int kRowTiles, int kLaneTiles, bool kAccumulate>
SIGHTLINE_INLINE void split_block(SplitRows a, SplitPairs b, float* c, int64_t c_stride, int64_t depth) {
  constexpr int kTerms = kPartsA > kPartsB ? kPartsA : kPartsB;
  const int64_t a_bytes = a.stride * 2, c_bytes = c_stride * 4;
  start_sums<kRowTiles, kLaneTiles, kAccumulate>(c, c_bytes);
  for (int64_t k = 0; k < depth; k += 32) {
    int held = -1;  // the part of A in its tiles: the next part of B begins with it
    for (int part_b = 0; part_b < kPartsB; ++part_b) {
      const uint32_t* from_b = b.data + part_b * b.part + k / 2 * kPanelLanes;
      _tile_loadd(6, from_b, 64);
      if (kLaneTiles == 2) _tile_loadd(7, from_b + b.panel, 64);
      const int terms = kPartsA < kTerms - part_b ? kPartsA : kTerms - part_b;
      for (int term = 0; term < terms; ++term) {
        const int part_a = part_b % 2 == 0 ? terms - 1 - term : term;
        const uint16_t* from_a = a.data + part_a * a.part + k;
        if (part_a != held) {
          _tile_loadd(4, from_a, a_bytes);
          if (kRowTiles == 2) _tile_loadd(5, from_a + 16 * a.stride, a_bytes);
        }
        held = part_a;
        _tile_dpbf16ps(0, 4, 6);
        if (kLaneTiles == 2) _tile_dpbf16ps(1, 4, 7);
        if (kRowTiles == 2) _tile_dpbf16ps(2, 5, 6);
        if (kRowTiles == 2 && kLaneTiles == 2) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  store_sums<kRowTiles, kLaneTiles>(c, c_bytes);
}

// C (rows, lanes) = A B, or += with kAccumulate; asks for a few rows of `prefetches` with every block.
template <int kPartsA, int kPartsB, bool kAccumulate>
static void split_product(SplitRows a, SplitPairs b, float* c, int64_t c_stride, int64_t rows, int64_t lanes,
                          int64_t depth, Prefetches prefetches) {
  constexpr int64_t kRowsPerBlock = 2;
  for (int64_t row = 0; row < rows; row += 32)
    for (int64_t lane = 0; lane < lanes; lane += 32) {
      prefetches.ask(kRowsPerBlock);
      const SplitRows from_a{a.data + row * a.stride, a.stride, a.part};
      const SplitPairs from_b{b.data + lane / kPanelLanes * b.panel, b.panel, b.part};
      float* target = c + row * c_stride + lane;
      const bool two_rows = row + 16 < rows, two_lanes = lane + 16 < lanes;
      if (two_rows && two_lanes)
        split_block<kPartsA, kPartsB, 2, 2, kAccumulate>(from_a, from_b, target, c_stride, depth);
      else if (two_rows)
        split_block<kPartsA, kPartsB, 2, 1, kAccumulate>(from_a, from_b, target, c_stride, depth);
      else if (two_lanes)
        split_block<kPartsA, kPartsB, 1, 2, kAccumulate>(from_a, from_b, target, c_stride, depth);
      else
        split_block<kPartsA, kPartsB, 1, 1, kAccumulate>(from_a, from_b, target, c_stride, depth);
    }
}

// Thirty-two numbers of bfloat16, or sixteen pairs.
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
SIGHTLINE_INLINE Halves split_pairs(Vec& low, Vec& high) {
  const __m512i bits = round_to_pairs(low, high).bits;
  if (!kLast) {
    low = low - Vec{_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))};
    high = high - Vec{_mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  return {bits};
}

// Calls take(part, is last) for every part.
template <int kParts, class Take>
SIGHTLINE_INLINE void for_each_part(Take take) {
  if constexpr (kParts > 1) take(0, std::false_type());
  take(kParts - 1, std::true_type());
}

// Rows (rows, width) to pairs of their columns, which become the depth, (padded width / 2); the rows become lanes.
template <int kParts>
static void transpose_to_pairs(const float* from, int64_t from_stride, int64_t width, uint32_t* to, int64_t panel,
                               int64_t part, int64_t rows) {
  for (int64_t lane = 0; lane < rows; lane += 16)
    for (int64_t column = 0; column < width; column += 32) {
      __m512i block[kParts][16];
      for (int row = 0; row < 16; ++row) {
        const float* source = from + (lane + row) * from_stride + column;
        const bool live = lane + row < rows;
        Vec first = live ? Vec::load(source) : Vec::broadcast(0.0f);
        Vec second = live && column + 16 < width ? Vec::load(source + 16) : Vec::broadcast(0.0f);
        for_each_part<kParts>([&](int index, auto last) { block[index][row] = split_row<last>(first, second).bits; });
      }
      uint32_t* target = to + lane / kPanelLanes * panel + column / 2 * kPanelLanes;
      for (int index = 0; index < kParts; ++index) {
        transpose_block(block[index]);
        for (int pair = 0; pair < 16; ++pair)
          _mm512_storeu_si512(target + index * part + pair * kPanelLanes, block[index][pair]);
      }
    }
}

// Rows (rows, width) to their transpose (width, depth), the depth padded with zeros. `width` is a multiple of 16.
template <int kParts>
static void transpose_to_rows(const float* from, int64_t from_stride, int64_t rows, int64_t width, uint16_t* to,
                              int64_t to_stride, int64_t part) {
  for (int64_t column = 0; column < width; column += 16)
    for (int64_t row = 0; row < rows; row += 32) {
      __m512i block[kParts][16];
      for (int pair = 0; pair < 16; ++pair) {
        const int64_t at = row + 2 * pair;
        const float* source = from + at * from_stride + column;
        Vec low = at < rows ? Vec::load(source) : Vec::broadcast(0.0f);
        Vec high = at + 1 < rows ? Vec::load(source + from_stride) : Vec::broadcast(0.0f);
        for_each_part<kParts>([&](int index, auto last) { block[index][pair] = split_pairs<last>(low, high).bits; });
      }
      for (int index = 0; index < kParts; ++index) {
        transpose_block(block[index]);
        for (int lane = 0; lane < 16; ++lane)
          _mm512_storeu_si512(to + index * part + (column + lane) * to_stride + row, block[index][lane]);
      }
    }
}

// Rows (depth, lanes) to pairs; each row times its factor where there are some. `depth` is padded with zeros to a
// multiple of kPairDepth.
template <int kParts>
static void split_to_pairs(const float* from, int64_t from_stride, const float* factors, int64_t depth, int64_t lanes,
                           uint32_t* to, int64_t panel, int64_t part) {
  const int64_t padded_depth = core::round_up(depth, kPairDepth);
  for (int64_t row = 0; row < padded_depth; row += 2) {
    const Vec low_factor = Vec::broadcast(factors != nullptr && row < depth ? factors[row] : 1.0f);
    const Vec high_factor = Vec::broadcast(factors != nullptr && row + 1 < depth ? factors[row + 1] : 1.0f);
    for (int64_t lane = 0; lane < lanes; lane += 16) {
      Vec low = Vec::broadcast(0.0f), high = low;
      if (row < depth) low = Vec::load(from + row * from_stride + lane);
      if (row + 1 < depth) high = Vec::load(from + (row + 1) * from_stride + lane);
      if (factors != nullptr) low = low * low_factor, high = high * high_factor;
      uint32_t* target = to + lane / kPanelLanes * panel + row / 2 * kPanelLanes;
      for_each_part<kParts>([&](int index, auto last) { store(target + index * part, split_pairs<last>(low, high)); });
    }
  }
}

#endif

}  // namespace sightline::SIGHTLINE_ISA_NS
