// Sixteen floats, AVX-512 (F, BW, DQ, VL); with AVX-512-BF16 the bf16 stores use its conversion.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/half.h"
#include "core/macros.h"

namespace sightline::SIGHTLINE_ISA_NS {

#if defined(__AMX_BF16__)
constexpr const char* kIsaName = "amx_bf16";
#elif defined(__AVX512BF16__)
constexpr const char* kIsaName = "avx512_bf16";
#else
constexpr const char* kIsaName = "avx512";
#endif
struct Mask {
  __mmask16 bits;
};

struct Vec {
  static constexpr int kWidth = 16;
  __m512 value;
  SIGHTLINE_INLINE_MEMBER Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
  SIGHTLINE_INLINE_MEMBER Vec load(const float* from) { return {_mm512_loadu_ps(from)}; }
};

struct IntVec {
  __m512i value;
  SIGHTLINE_INLINE_MEMBER IntVec broadcast(int32_t x) { return {_mm512_set1_epi32(x)}; }
  SIGHTLINE_INLINE_MEMBER IntVec load(const int32_t* from) { return {_mm512_loadu_si512(from)}; }
};

struct UintVec {
  __m512i value;
  SIGHTLINE_INLINE_MEMBER UintVec broadcast(uint32_t x) { return {_mm512_set1_epi32(static_cast<int32_t>(x))}; }
  SIGHTLINE_INLINE_MEMBER UintVec load(const uint32_t* from) { return {_mm512_loadu_si512(from)}; }
};

SIGHTLINE_INLINE void store(float* to, Vec x) { _mm512_storeu_ps(to, x.value); }
SIGHTLINE_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.value, b.value)}; }
SIGHTLINE_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.value, b.value)}; }
SIGHTLINE_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.value, b.value)}; }
SIGHTLINE_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.value, b.value)}; }
// 1 / x within 2 ulp, for x far from the ends of the range.
SIGHTLINE_INLINE Vec reciprocal(Vec x) {
  const __m512 first = _mm512_rcp14_ps(x.value);
  return {_mm512_fmadd_ps(_mm512_fnmadd_ps(x.value, first, _mm512_set1_ps(1.0f)), first, first)};
}
SIGHTLINE_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.value, b.value, c.value)}; }
SIGHTLINE_INLINE Vec select(Mask mask, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(mask.bits, no.value, yes.value)};
}
SIGHTLINE_INLINE Mask less(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.value, b.value, _CMP_LT_OQ)}; }
SIGHTLINE_INLINE Mask equal(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.value, b.value, _CMP_EQ_OQ)}; }
SIGHTLINE_INLINE Mask operator|(Mask a, Mask b) { return {static_cast<__mmask16>(a.bits | b.bits)}; }
SIGHTLINE_INLINE bool any(Mask mask) { return mask.bits != 0; }
SIGHTLINE_INLINE bool all(Mask mask) { return mask.bits == 0xffff; }
// Where either is NaN this returns b.
SIGHTLINE_INLINE Vec maximum(Vec a, Vec b) { return {_mm512_max_ps(a.value, b.value)}; }
SIGHTLINE_INLINE Vec absolute(Vec x) { return {_mm512_abs_ps(x.value)}; }
SIGHTLINE_INLINE Vec square_root(Vec x) { return {_mm512_sqrt_ps(x.value)}; }
SIGHTLINE_INLINE Vec round_to_integer(Vec x) {
  return {_mm512_roundscale_ps(x.value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
SIGHTLINE_INLINE Vec times_power_of_two(Vec factor, Vec whole, Vec x) {
  const __mmask16 keep = _mm512_cmp_ps_mask(x.value, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return {_mm512_maskz_scalef_ps(keep, factor.value, whole.value)};
}
// x less the largest integer below it; 0 for infinities.
SIGHTLINE_INLINE Vec fraction(Vec x) { return {_mm512_reduce_ps(x.value, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
// factor 2^floor(x). Results below the normal numbers become 0 by FlushDenormals (vec.h), not by a comparison.
SIGHTLINE_INLINE Vec times_power_of_floor(Vec factor, Vec x) { return {_mm512_scalef_ps(factor.value, x.value)}; }
SIGHTLINE_INLINE Vec split_exponent(Vec x, Vec& mantissa) {
  mantissa.value = _mm512_getmant_ps(x.value, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
  return {_mm512_getexp_ps(x.value)};
}
SIGHTLINE_INLINE float sum_of_lanes(Vec x) { return _mm512_reduce_add_ps(x.value); }
// Lane i: the sum of the lanes of sums[i].
SIGHTLINE_INLINE Vec sums_of_lanes(const Vec (&sums)[16]) {
  __m512 pairs[8], quads[4];
  SIGHTLINE_UNROLL
  for (int i = 0; i < 8; ++i)
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(sums[2 * i].value, sums[2 * i + 1].value),
                             _mm512_unpackhi_ps(sums[2 * i].value, sums[2 * i + 1].value));
  SIGHTLINE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m512d low = _mm512_castps_pd(pairs[2 * i]), high = _mm512_castps_pd(pairs[2 * i + 1]);
    quads[i] =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  }
  // Each quarter of quads[i] has the sums of a quarter of sums[4 * i] to sums[4 * i + 3].
  const __m512 first =
      _mm512_add_ps(_mm512_shuffle_f32x4(quads[0], quads[1], 0x44), _mm512_shuffle_f32x4(quads[0], quads[1], 0xee));
  const __m512 second =
      _mm512_add_ps(_mm512_shuffle_f32x4(quads[2], quads[3], 0x44), _mm512_shuffle_f32x4(quads[2], quads[3], 0xee));
  return {_mm512_add_ps(_mm512_shuffle_f32x4(first, second, 0x88), _mm512_shuffle_f32x4(first, second, 0xdd))};
}
// to (column, row) = from (row, column) on a block of kWidth x kWidth floats.
SIGHTLINE_INLINE void transpose_block(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m512 rows[16], pairs[16];
  SIGHTLINE_UNROLL
  for (int row = 0; row < 16; ++row) rows[row] = _mm512_loadu_ps(from + row * from_stride);
  SIGHTLINE_UNROLL
  for (int row = 0; row < 16; row += 2) {
    pairs[row] = _mm512_unpacklo_ps(rows[row], rows[row + 1]);
    pairs[row + 1] = _mm512_unpackhi_ps(rows[row], rows[row + 1]);
  }
  SIGHTLINE_UNROLL
  for (int row = 0; row < 16; row += 4) SIGHTLINE_UNROLL
  for (int half = 0; half < 2; ++half) {
    const __m512d low = _mm512_castps_pd(pairs[row + half]), high = _mm512_castps_pd(pairs[row + 2 + half]);
    rows[row + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
    rows[row + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
  }
  SIGHTLINE_UNROLL
  for (int row = 0; row < 4; ++row) SIGHTLINE_UNROLL
  for (int half = 0; half < 2; ++half) {
    pairs[8 * half + row] = _mm512_shuffle_f32x4(rows[8 * half + row], rows[8 * half + row + 4], 0x88);
    pairs[8 * half + row + 4] = _mm512_shuffle_f32x4(rows[8 * half + row], rows[8 * half + row + 4], 0xdd);
  }
  SIGHTLINE_UNROLL
  for (int row = 0; row < 8; ++row) {
    _mm512_storeu_ps(to + row * to_stride, _mm512_shuffle_f32x4(pairs[row], pairs[row + 8], 0x88));
    _mm512_storeu_ps(to + (row + 8) * to_stride, _mm512_shuffle_f32x4(pairs[row], pairs[row + 8], 0xdd));
  }
}
SIGHTLINE_INLINE Mask between(IntVec first, IntVec last, int32_t key) {
  const __m512i position = _mm512_set1_epi32(key);
  return {static_cast<__mmask16>(_mm512_cmple_epi32_mask(first.value, position) &
                                 _mm512_cmple_epi32_mask(position, last.value))};
}
// Bits lane, lane + 1, ... as a mask of the lanes.
SIGHTLINE_INLINE Mask mask_of_bits(uint64_t bits, int lane) { return {static_cast<__mmask16>(bits >> lane)}; }
// Bit i: lane i of the mask.
SIGHTLINE_INLINE uint64_t bits_of(Mask mask) { return mask.bits; }
// Numbers of the mask's lanes, 0 in the others: nothing is read there.
SIGHTLINE_INLINE Vec load_lanes(const float* from, Mask lanes) { return {_mm512_maskz_loadu_ps(lanes.bits, from)}; }
// Bit i: whether byte i of 64 is not 0.
SIGHTLINE_INLINE uint64_t nonzero_bits(const uint8_t* bytes) {
  const __m512i all = _mm512_loadu_si512(bytes);
  return _mm512_test_epi8_mask(all, all);
}
SIGHTLINE_INLINE Vec to_float(IntVec x) { return {_mm512_cvtepi32_ps(x.value)}; }
SIGHTLINE_INLINE IntVec operator-(IntVec a, IntVec b) { return {_mm512_sub_epi32(a.value, b.value)}; }

SIGHTLINE_INLINE UintVec operator^(UintVec a, UintVec b) { return {_mm512_xor_si512(a.value, b.value)}; }
SIGHTLINE_INLINE UintVec operator*(UintVec a, UintVec b) { return {_mm512_mullo_epi32(a.value, b.value)}; }
SIGHTLINE_INLINE UintVec shift_right(UintVec x, int bits) { return {_mm512_srli_epi32(x.value, bits)}; }
SIGHTLINE_INLINE Mask at_least(UintVec a, UintVec b) { return {_mm512_cmpge_epu32_mask(a.value, b.value)}; }

SIGHTLINE_INLINE Vec load_float16(const uint16_t* from) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
}
SIGHTLINE_INLINE Vec load_bfloat16(const uint16_t* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
// Columns 0, 2, 4, ... and 1, 3, 5, ... of twice as many.
SIGHTLINE_INLINE void load_bfloat16_pairs(const uint16_t* from, Vec& even, Vec& odd) {
  const __m512i bits = _mm512_loadu_si512(from);
  even = {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))};
  odd = {_mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000))))};
}
SIGHTLINE_INLINE __m256i float16_bits(Vec x) {
  return _mm512_cvtps_ph(x.value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
SIGHTLINE_INLINE __m256i bfloat16_bits(Vec x) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.value));
#else
  const __m512i bits = _mm512_castps_si512(x.value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x.value, x.value, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x00400000));
  const __m512i result = _mm512_srli_epi32(_mm512_mask_blend_epi32(is_nan, rounded, quiet), 16);
  return _mm512_cvtepi32_epi16(result);
#endif
}
SIGHTLINE_INLINE void store_float16(uint16_t* to, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), float16_bits(x));
}
SIGHTLINE_INLINE void store_bfloat16(uint16_t* to, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bfloat16_bits(x));
}

// Stores past the caches, as one after the other fills a line; `to` is aligned to what is stored.
constexpr bool kHasStreams = true;
SIGHTLINE_INLINE void stream(float* to, Vec x) { _mm512_stream_ps(to, x.value); }
SIGHTLINE_INLINE void stream_float16(uint16_t* to, Vec x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), float16_bits(x));
}
SIGHTLINE_INLINE void stream_bfloat16(uint16_t* to, Vec x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bfloat16_bits(x));
}
// Other threads see what was streamed before this.
SIGHTLINE_INLINE void finish_streams() { _mm_sfence(); }

}  // namespace sightline::SIGHTLINE_ISA_NS
