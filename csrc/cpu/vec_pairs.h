// Pairs of bfloat16 in a vector, their dot products (AVX-512-BF16), and how fp32 numbers become them. Machines without
// have the same names, so that kernels read the same everywhere, and none of them is called: kHasPairProducts is false.
#pragma once

#include <type_traits>

#include "cpu/vec.h"

namespace sightline::SIGHTLINE_ISA_NS {

#if defined(__AVX512BF16__)

constexpr bool kHasPairProducts = true;

// Vec::kWidth pairs of bfloat16, the first number of a pair in its lower half; also twice as many numbers of a row.
struct Pairs {
  __m512i bits;
};

SIGHTLINE_INLINE Pairs load_pairs(const uint32_t* from) { return {_mm512_loadu_si512(from)}; }
SIGHTLINE_INLINE Pairs load_pairs(const uint16_t* from) { return {_mm512_loadu_si512(from)}; }
SIGHTLINE_INLINE void store(uint32_t* to, Pairs pairs) { _mm512_storeu_si512(to, pairs.bits); }
SIGHTLINE_INLINE void store(uint16_t* to, Pairs pairs) { _mm512_storeu_si512(to, pairs.bits); }

// Two numbers side by side in every lane.
SIGHTLINE_INLINE Pairs broadcast_pair(const uint16_t* from) {
  int32_t pair;
  __builtin_memcpy(&pair, from, sizeof pair);
  return {_mm512_set1_epi32(pair)};
}

// The bits of both numbers of a pair as those of one fp32 number.
SIGHTLINE_INLINE Vec as_floats(Pairs pairs) { return {_mm512_castsi512_ps(pairs.bits)}; }
SIGHTLINE_INLINE Pairs as_pairs(Vec floats) { return {_mm512_castps_si512(floats.value)}; }

// One number of each pair.
SIGHTLINE_INLINE Vec low_numbers(Pairs pairs) { return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs.bits, 16))}; }
SIGHTLINE_INLINE Vec high_numbers(Pairs pairs) {
  return {_mm512_castsi512_ps(_mm512_and_si512(pairs.bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}

// Numbers of two rows side by side, 0 where the row's mask has no lane: nothing is read there.
SIGHTLINE_INLINE Pairs pair_rows(const uint16_t* low, Mask low_lanes, const uint16_t* high, Mask high_lanes) {
  const __m256i first = _mm256_maskz_loadu_epi16(low_lanes.bits, low);
  const __m256i second = _mm256_maskz_loadu_epi16(high_lanes.bits, high);
  return {_mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16))};
}

// Numbers of a row, at most 2 Vec::kWidth, and 0 after the last.
SIGHTLINE_INLINE Pairs load_numbers(const uint16_t* from, int64_t count) {
  return {_mm512_maskz_loadu_epi16(count >= 32 ? ~uint32_t{0} : (uint32_t{1} << count) - 1, from)};
}

// A bit for each number that is infinite or NaN.
SIGHTLINE_INLINE uint32_t non_finite_bits(Pairs pairs) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  return _mm512_cmpeq_epi16_mask(_mm512_and_si512(pairs.bits, exponent), exponent);
}

// What split_row() puts side by side: apart, and as pairs of one number of each.
SIGHTLINE_INLINE void store_apart(uint16_t* first, uint16_t* second, Pairs row) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(first), _mm512_castsi512_si256(row.bits));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(second), _mm512_extracti64x4_epi64(row.bits, 1));
}
SIGHTLINE_INLINE Pairs interleave(Pairs row) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return {_mm512_permutexvar_epi16(order, row.bits)};
}

SIGHTLINE_INLINE Pairs round_to_pairs(Vec low, Vec high) {
  return interleave({reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.value, low.value))});
}

// Takes the leading bits off two vectors: side by side as in a row, what is left in `first` and `second`.
template <bool kLast>
SIGHTLINE_INLINE Pairs split_row(Vec& first, Vec& second) {
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
  const Pairs pairs = round_to_pairs(low, high);
  if (!kLast) {
    low = low - low_numbers(pairs);
    high = high - high_numbers(pairs);
  }
  return pairs;
}

// To bfloat16 and back.
SIGHTLINE_INLINE Vec rounded_to_bfloat16(Vec x) { return {_mm512_cvtpbh_ps(_mm512_cvtneps_pbh(x.value))}; }

// sum + the products of the two numbers of each pair.
SIGHTLINE_INLINE Vec add_products(Vec sum, Pairs a, Pairs b) {
  return {_mm512_dpbf16_ps(sum.value, reinterpret_cast<__m512bh>(a.bits), reinterpret_cast<__m512bh>(b.bits))};
}

// sum + both numbers of each pair.
SIGHTLINE_INLINE Vec add_pairs(Vec sum, Pairs pairs) {
  return add_products(sum, pairs, {_mm512_set1_epi32(0x3f803f80)});
}

// 16 rows of 16 pairs, in place.
SIGHTLINE_INLINE void transpose_block(Pairs (&block)[16]) {
  __m512i rows[16], pairs[16];
  for (int row = 0; row < 16; ++row) rows[row] = block[row].bits;
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
    block[column] = {_mm512_shuffle_i32x4(low_even, high_even, 0x88)};
    block[8 + column] = {_mm512_shuffle_i32x4(low_even, high_even, 0xdd)};
    block[4 + column] = {_mm512_shuffle_i32x4(low_odd, high_odd, 0x88)};
    block[12 + column] = {_mm512_shuffle_i32x4(low_odd, high_odd, 0xdd)};
  }
}

#else

constexpr bool kHasPairProducts = false;

struct Pairs {};
SIGHTLINE_INLINE Pairs load_pairs(const uint32_t*) { return {}; }
SIGHTLINE_INLINE Pairs load_pairs(const uint16_t*) { return {}; }
SIGHTLINE_INLINE void store(uint32_t*, Pairs) {}
SIGHTLINE_INLINE void store(uint16_t*, Pairs) {}
SIGHTLINE_INLINE Pairs broadcast_pair(const uint16_t*) { return {}; }
SIGHTLINE_INLINE Vec as_floats(Pairs) { return Vec::broadcast(0.0f); }
SIGHTLINE_INLINE Pairs as_pairs(Vec) { return {}; }
SIGHTLINE_INLINE Vec low_numbers(Pairs) { return Vec::broadcast(0.0f); }
SIGHTLINE_INLINE Vec high_numbers(Pairs) { return Vec::broadcast(0.0f); }
SIGHTLINE_INLINE Pairs pair_rows(const uint16_t*, Mask, const uint16_t*, Mask) { return {}; }
SIGHTLINE_INLINE Pairs load_numbers(const uint16_t*, int64_t) { return {}; }
SIGHTLINE_INLINE uint32_t non_finite_bits(Pairs) { return 0; }
SIGHTLINE_INLINE void store_apart(uint16_t*, uint16_t*, Pairs) {}
SIGHTLINE_INLINE Pairs interleave(Pairs row) { return row; }
SIGHTLINE_INLINE Pairs round_to_pairs(Vec, Vec) { return {}; }
template <bool kLast>
SIGHTLINE_INLINE Pairs split_row(Vec&, Vec&) {
  return {};
}
template <bool kLast>
SIGHTLINE_INLINE Pairs split_pairs(Vec&, Vec&) {
  return {};
}
SIGHTLINE_INLINE Vec rounded_to_bfloat16(Vec x) { return x; }
SIGHTLINE_INLINE Vec add_products(Vec sum, Pairs, Pairs) { return sum; }
SIGHTLINE_INLINE Vec add_pairs(Vec sum, Pairs) { return sum; }
SIGHTLINE_INLINE void transpose_block(Pairs (&)[16]) {}

#endif

// Calls take(part, is last) for every part that a number is split into, largest first.
template <int kParts, class Take>
SIGHTLINE_INLINE void for_each_part(Take take) {
  if constexpr (kParts > 1) take(0, std::false_type());
  if constexpr (kParts > 2) take(1, std::false_type());
  take(kParts - 1, std::true_type());
}

}  // namespace sightline::SIGHTLINE_ISA_NS
