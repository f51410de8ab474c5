// Eight floats, AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/half.h"
#include "core/macros.h"

namespace sightline::SIGHTLINE_ISA_NS {

constexpr const char* kIsaName = "avx2";
struct Mask {
  __m256 bits;
};

struct Vec {
  static constexpr int kWidth = 8;
  __m256 value;
  SIGHTLINE_INLINE_MEMBER Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
  SIGHTLINE_INLINE_MEMBER Vec load(const float* from) { return {_mm256_loadu_ps(from)}; }
};

struct IntVec {
  __m256i value;
  SIGHTLINE_INLINE_MEMBER IntVec broadcast(int32_t x) { return {_mm256_set1_epi32(x)}; }
  SIGHTLINE_INLINE_MEMBER IntVec load(const int32_t* from) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))};
  }
};

struct UintVec {
  __m256i value;
  SIGHTLINE_INLINE_MEMBER UintVec broadcast(uint32_t x) { return {_mm256_set1_epi32(static_cast<int32_t>(x))}; }
  SIGHTLINE_INLINE_MEMBER UintVec load(const uint32_t* from) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))};
  }
};

SIGHTLINE_INLINE void store(float* to, Vec x) { _mm256_storeu_ps(to, x.value); }
SIGHTLINE_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.value, b.value)}; }
SIGHTLINE_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.value, b.value)}; }
SIGHTLINE_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.value, b.value)}; }
SIGHTLINE_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.value, b.value)}; }
SIGHTLINE_INLINE Vec reciprocal(Vec x) { return Vec::broadcast(1.0f) / x; }
SIGHTLINE_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.value, b.value, c.value)}; }
SIGHTLINE_INLINE Vec select(Mask mask, Vec yes, Vec no) { return {_mm256_blendv_ps(no.value, yes.value, mask.bits)}; }
SIGHTLINE_INLINE Mask less(Vec a, Vec b) { return {_mm256_cmp_ps(a.value, b.value, _CMP_LT_OQ)}; }
SIGHTLINE_INLINE Mask equal(Vec a, Vec b) { return {_mm256_cmp_ps(a.value, b.value, _CMP_EQ_OQ)}; }
SIGHTLINE_INLINE Mask operator|(Mask a, Mask b) { return {_mm256_or_ps(a.bits, b.bits)}; }
SIGHTLINE_INLINE bool any(Mask mask) { return _mm256_movemask_ps(mask.bits) != 0; }
SIGHTLINE_INLINE bool all(Mask mask) { return _mm256_movemask_ps(mask.bits) == 0xff; }
// Where either is NaN this returns b.
SIGHTLINE_INLINE Vec maximum(Vec a, Vec b) { return {_mm256_max_ps(a.value, b.value)}; }
SIGHTLINE_INLINE Vec absolute(Vec x) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.value)}; }
SIGHTLINE_INLINE Vec square_root(Vec x) { return {_mm256_sqrt_ps(x.value)}; }
SIGHTLINE_INLINE Vec round_to_integer(Vec x) {
  return {_mm256_round_ps(x.value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
SIGHTLINE_INLINE Vec times_power_of_two(Vec factor, Vec whole, Vec x) {
  const __m256i exponent =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole.value), _mm256_set1_epi32(127)), 23);
  const __m256 keep = _mm256_cmp_ps(x.value, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ);
  return {_mm256_and_ps(keep, _mm256_mul_ps(factor.value, _mm256_castsi256_ps(exponent)))};
}
SIGHTLINE_INLINE Vec fraction(Vec x) { return {_mm256_sub_ps(x.value, _mm256_floor_ps(x.value))}; }
SIGHTLINE_INLINE Vec times_power_of_floor(Vec factor, Vec x) {
  return times_power_of_two(factor, {_mm256_floor_ps(x.value)}, x);
}
SIGHTLINE_INLINE Vec split_exponent(Vec x, Vec& mantissa) {
  const __m256i bits = _mm256_castps_si256(x.value);
  mantissa.value = _mm256_castsi256_ps(
      _mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi32(0x007fffff)), _mm256_set1_epi32(0x3f800000)));
  return {_mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srai_epi32(bits, 23), _mm256_set1_epi32(127)))};
}
SIGHTLINE_INLINE float sum_of_lanes(Vec x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x.value), _mm256_extractf128_ps(x.value, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
// Lane i: the sum of the lanes of sums[i].
SIGHTLINE_INLINE Vec sums_of_lanes(const Vec (&sums)[8]) {
  __m256 quads[2];
  SIGHTLINE_UNROLL
  for (int i = 0; i < 2; ++i)
    quads[i] = _mm256_hadd_ps(_mm256_hadd_ps(sums[4 * i].value, sums[4 * i + 1].value),
                              _mm256_hadd_ps(sums[4 * i + 2].value, sums[4 * i + 3].value));
  return {_mm256_add_ps(_mm256_permute2f128_ps(quads[0], quads[1], 0x20),
                        _mm256_permute2f128_ps(quads[0], quads[1], 0x31))};
}
// to (column, row) = from (row, column) on a block of kWidth x kWidth floats.
SIGHTLINE_INLINE void transpose_block(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m256 rows[8], pairs[8];
  SIGHTLINE_UNROLL
  for (int row = 0; row < 8; ++row) rows[row] = _mm256_loadu_ps(from + row * from_stride);
  SIGHTLINE_UNROLL
  for (int row = 0; row < 8; row += 2) {
    pairs[row] = _mm256_unpacklo_ps(rows[row], rows[row + 1]);
    pairs[row + 1] = _mm256_unpackhi_ps(rows[row], rows[row + 1]);
  }
  SIGHTLINE_UNROLL
  for (int row = 0; row < 8; row += 4) SIGHTLINE_UNROLL
  for (int half = 0; half < 2; ++half) {
    rows[row + 2 * half] = _mm256_shuffle_ps(pairs[row + half], pairs[row + 2 + half], 0x44);
    rows[row + 2 * half + 1] = _mm256_shuffle_ps(pairs[row + half], pairs[row + 2 + half], 0xee);
  }
  SIGHTLINE_UNROLL
  for (int row = 0; row < 4; ++row) {
    _mm256_storeu_ps(to + row * to_stride, _mm256_permute2f128_ps(rows[row], rows[row + 4], 0x20));
    _mm256_storeu_ps(to + (row + 4) * to_stride, _mm256_permute2f128_ps(rows[row], rows[row + 4], 0x31));
  }
}
SIGHTLINE_INLINE Mask between(IntVec first, IntVec last, int32_t key) {
  const __m256i position = _mm256_set1_epi32(key);
  const __m256i outside =
      _mm256_or_si256(_mm256_cmpgt_epi32(first.value, position), _mm256_cmpgt_epi32(position, last.value));
  return {_mm256_castsi256_ps(_mm256_xor_si256(outside, _mm256_set1_epi32(-1)))};
}
SIGHTLINE_INLINE Mask mask_of_bits(uint64_t bits, int lane) {
  const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i found = _mm256_and_si256(_mm256_set1_epi32(static_cast<int32_t>(bits >> lane)), each);
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(found, each))};
}
SIGHTLINE_INLINE uint64_t bits_of(Mask mask) { return static_cast<uint64_t>(_mm256_movemask_ps(mask.bits)); }
SIGHTLINE_INLINE Vec load_lanes(const float* from, Mask lanes) {
  return {_mm256_maskload_ps(from, _mm256_castps_si256(lanes.bits))};
}
SIGHTLINE_INLINE uint64_t nonzero_bits(const uint8_t* bytes) {
  uint32_t zeros[2];
  for (int half = 0; half < 2; ++half) {
    const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + 32 * half));
    zeros[half] = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(some, _mm256_setzero_si256())));
  }
  return ~(static_cast<uint64_t>(zeros[1]) << 32 | zeros[0]);
}
SIGHTLINE_INLINE Vec to_float(IntVec x) { return {_mm256_cvtepi32_ps(x.value)}; }
SIGHTLINE_INLINE IntVec operator-(IntVec a, IntVec b) { return {_mm256_sub_epi32(a.value, b.value)}; }

SIGHTLINE_INLINE UintVec operator^(UintVec a, UintVec b) { return {_mm256_xor_si256(a.value, b.value)}; }
SIGHTLINE_INLINE UintVec operator*(UintVec a, UintVec b) { return {_mm256_mullo_epi32(a.value, b.value)}; }
SIGHTLINE_INLINE UintVec shift_right(UintVec x, int bits) { return {_mm256_srli_epi32(x.value, bits)}; }
SIGHTLINE_INLINE Mask at_least(UintVec a, UintVec b) {
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_max_epu32(a.value, b.value), a.value))};
}

SIGHTLINE_INLINE Vec load_float16(const uint16_t* from) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
}
SIGHTLINE_INLINE Vec load_bfloat16(const uint16_t* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
// Columns 0, 2, 4, ... and 1, 3, 5, ... of twice as many.
SIGHTLINE_INLINE void load_bfloat16_pairs(const uint16_t* from, Vec& even, Vec& odd) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  even = {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))};
  odd = {_mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000))))};
}
SIGHTLINE_INLINE void store_float16(uint16_t* to, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph(x.value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
SIGHTLINE_INLINE void store_bfloat16(uint16_t* to, Vec x) {
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, x.value);
  for (int lane = 0; lane < 8; ++lane) to[lane] = core::float_to_bfloat16(lanes[lane]);
}

// Stores past the caches, as one after the other fills a line; `to` is aligned to what is stored.
constexpr bool kHasStreams = true;
SIGHTLINE_INLINE void stream(float* to, Vec x) { _mm256_stream_ps(to, x.value); }
SIGHTLINE_INLINE void stream_float16(uint16_t* to, Vec x) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph(x.value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
SIGHTLINE_INLINE void stream_bfloat16(uint16_t* to, Vec x) {
  alignas(16) uint16_t rounded[8];
  store_bfloat16(rounded, x);
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm_load_si128(reinterpret_cast<const __m128i*>(rounded)));
}
// Other threads see what was streamed before this.
SIGHTLINE_INLINE void finish_streams() { _mm_sfence(); }

}  // namespace sightline::SIGHTLINE_ISA_NS
