// The vector type of the instruction set that this translation unit is compiled for.
//
// Each header under it offers the same few names: Vec (floats), IntVec, UintVec, Mask, loads and stores of the three
// dtypes, and the arithmetic that csrc/core/polynomials.h asks for. Everything lives in a namespace of the instruction
// set's name and is force-inlined, so that no code compiled for a wide machine can be linked into a narrow one.
#pragma once

#define SIGHTLINE_INLINE_MEMBER static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#include "cpu/vec_avx512.h"
#elif defined(__AVX2__)
#include "cpu/vec_avx2.h"
#else
#include "cpu/vec_generic.h"
#endif

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "core/problem.h"

namespace sightline::SIGHTLINE_ISA_NS {

// The first `count` lanes; none or all where it lies beyond their number.
SIGHTLINE_INLINE Mask first_lanes(int64_t count) {
  return mask_of_bits(count <= 0 ? 0 : count >= Vec::kWidth ? ~uint64_t{0} : (uint64_t{1} << count) - 1, 0);
}

// Results too small for a normal float become 0: powers of re-weighting underflow all the time, and a denormal costs
// a hundred cycles.
class FlushDenormals {
 public:
#if defined(__SSE2__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8000u); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned int saved_;
#else
  FlushDenormals() {}
#endif
};

SIGHTLINE_INLINE int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

SIGHTLINE_INLINE const void* advance(const void* data, int64_t elements, DType dtype) {
  return static_cast<const char*>(data) + elements * element_size(dtype);
}

SIGHTLINE_INLINE void* advance(void* data, int64_t elements, DType dtype) {
  return static_cast<char*>(data) + elements * element_size(dtype);
}

// A vector of numbers from `index` on, widened to fp32.
SIGHTLINE_INLINE Vec load_widened(const void* from, DType dtype, int64_t index) {
  if (dtype == DType::kFloat32) return Vec::load(static_cast<const float*>(from) + index);
  const uint16_t* bits = static_cast<const uint16_t*>(from) + index;
  return dtype == DType::kFloat16 ? load_float16(bits) : load_bfloat16(bits);
}

// Widen `count` numbers to fp32.
SIGHTLINE_INLINE void widen(const void* from, DType dtype, float* to, int64_t count) {
  if (dtype == DType::kFloat32) {
    __builtin_memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  const auto* bits = static_cast<const uint16_t*>(from);
  const bool half = dtype == DType::kFloat16;
  int64_t index = 0;
  for (; index + Vec::kWidth <= count; index += Vec::kWidth)
    store(to + index, half ? load_float16(bits + index) : load_bfloat16(bits + index));
  for (; index < count; ++index)
    to[index] = half ? core::float16_to_float(bits[index]) : core::bfloat16_to_float(bits[index]);
}

// Round `count` fp32 numbers to the dtype, to nearest even; with kPastCaches to whole aligned lines.
template <bool kPastCaches = false>
SIGHTLINE_INLINE void narrow(const float* from, void* to, DType dtype, int64_t count) {
  if (dtype == DType::kFloat32) {
    if (!kPastCaches) {
      __builtin_memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
      return;
    }
    for (int64_t index = 0; index < count; index += Vec::kWidth)
      stream(static_cast<float*>(to) + index, Vec::load(from + index));
    return;
  }
  auto* bits = static_cast<uint16_t*>(to);
  const bool half = dtype == DType::kFloat16;
  int64_t index = 0;
  for (; index + Vec::kWidth <= count; index += Vec::kWidth) {
    const Vec value = Vec::load(from + index);
    if (half)
      kPastCaches ? stream_float16(bits + index, value) : store_float16(bits + index, value);
    else
      kPastCaches ? stream_bfloat16(bits + index, value) : store_bfloat16(bits + index, value);
  }
  for (; index < count; ++index)
    bits[index] = half ? core::float_to_float16(from[index]) : core::float_to_bfloat16(from[index]);
}

}  // namespace sightline::SIGHTLINE_ISA_NS
