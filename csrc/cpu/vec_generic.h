// The vectors of any machine: four floats in the compiler's own vector type (SSE2 on x86-64, NEON on ARM).
#pragma once

#include <cstdint>

#include "core/half.h"
#include "core/macros.h"

namespace sightline::SIGHTLINE_ISA_NS {

using Float4 = float __attribute__((vector_size(16)));
using Int4 = int32_t __attribute__((vector_size(16)));
using Uint4 = uint32_t __attribute__((vector_size(16)));

constexpr const char* kIsaName = "generic";
struct Mask {
  Int4 bits;
};

struct Vec {
  static constexpr int kWidth = 4;
  Float4 value;
  SIGHTLINE_INLINE_MEMBER Vec broadcast(float x) { return {Float4{x, x, x, x}}; }
  SIGHTLINE_INLINE_MEMBER Vec load(const float* from) {
    Vec result;
    __builtin_memcpy(&result.value, from, sizeof result.value);
    return result;
  }
};

struct IntVec {
  Int4 value;
  SIGHTLINE_INLINE_MEMBER IntVec broadcast(int32_t x) { return {Int4{x, x, x, x}}; }
  SIGHTLINE_INLINE_MEMBER IntVec load(const int32_t* from) {
    IntVec result;
    __builtin_memcpy(&result.value, from, sizeof result.value);
    return result;
  }
};

struct UintVec {
  Uint4 value;
  SIGHTLINE_INLINE_MEMBER UintVec broadcast(uint32_t x) { return {Uint4{x, x, x, x}}; }
  SIGHTLINE_INLINE_MEMBER UintVec load(const uint32_t* from) {
    UintVec result;
    __builtin_memcpy(&result.value, from, sizeof result.value);
    return result;
  }
};

SIGHTLINE_INLINE void store(float* to, Vec x) { __builtin_memcpy(to, &x.value, sizeof x.value); }
SIGHTLINE_INLINE Vec operator+(Vec a, Vec b) { return {a.value + b.value}; }
SIGHTLINE_INLINE Vec operator-(Vec a, Vec b) { return {a.value - b.value}; }
SIGHTLINE_INLINE Vec operator*(Vec a, Vec b) { return {a.value * b.value}; }
SIGHTLINE_INLINE Vec operator/(Vec a, Vec b) { return {a.value / b.value}; }
SIGHTLINE_INLINE Vec reciprocal(Vec x) { return Vec::broadcast(1.0f) / x; }
SIGHTLINE_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.value * b.value + c.value}; }
SIGHTLINE_INLINE Vec select(Mask mask, Vec yes, Vec no) {
  return {reinterpret_cast<Float4>((mask.bits & reinterpret_cast<Int4>(yes.value)) |
                                   (~mask.bits & reinterpret_cast<Int4>(no.value)))};
}
SIGHTLINE_INLINE Mask less(Vec a, Vec b) { return {a.value < b.value}; }
SIGHTLINE_INLINE Mask equal(Vec a, Vec b) { return {a.value == b.value}; }
SIGHTLINE_INLINE Mask operator|(Mask a, Mask b) { return {a.bits | b.bits}; }
SIGHTLINE_INLINE bool any(Mask mask) { return (mask.bits[0] | mask.bits[1] | mask.bits[2] | mask.bits[3]) != 0; }
SIGHTLINE_INLINE bool all(Mask mask) { return (mask.bits[0] & mask.bits[1] & mask.bits[2] & mask.bits[3]) != 0; }
// Where either is NaN these return b, as the x86 instructions do.
SIGHTLINE_INLINE Vec maximum(Vec a, Vec b) { return select({a.value > b.value}, a, b); }
SIGHTLINE_INLINE Vec absolute(Vec x) {
  return {reinterpret_cast<Float4>(reinterpret_cast<Int4>(x.value) & 0x7fffffff)};
}
SIGHTLINE_INLINE Vec square_root(Vec x) {
  Vec result;
  for (int lane = 0; lane < 4; ++lane) result.value[lane] = __builtin_sqrtf(x.value[lane]);
  return result;
}
// Exact for |x| < 2^22: the scores that reach it are bounded by the comparison in times_power_of_two.
SIGHTLINE_INLINE Vec round_to_integer(Vec x) {
  const Float4 magic = Float4{1, 1, 1, 1} * 12582912.0f;  // 1.5 * 2^23
  return {(x.value + magic) - magic};
}
SIGHTLINE_INLINE Vec times_power_of_two(Vec factor, Vec whole, Vec x) {
  const Int4 tiny = x.value < -126.0f;
  const Float4 bounded = select({tiny}, Vec::broadcast(0.0f), whole).value;
  const Int4 exponent = (__builtin_convertvector(bounded, Int4) + 127) << 23;
  return select({tiny}, Vec::broadcast(0.0f), {factor.value * reinterpret_cast<Float4>(exponent)});
}
SIGHTLINE_INLINE Vec floor_of(Vec x) {
  Vec result;
  for (int lane = 0; lane < 4; ++lane) result.value[lane] = __builtin_floorf(x.value[lane]);
  return result;
}
SIGHTLINE_INLINE Vec fraction(Vec x) { return x - floor_of(x); }
SIGHTLINE_INLINE Vec times_power_of_floor(Vec factor, Vec x) { return times_power_of_two(factor, floor_of(x), x); }
SIGHTLINE_INLINE Vec split_exponent(Vec x, Vec& mantissa) {
  const Int4 bits = reinterpret_cast<Int4>(x.value);
  mantissa.value = reinterpret_cast<Float4>((bits & 0x007fffff) | 0x3f800000);
  return {__builtin_convertvector((bits >> 23) - 127, Float4)};
}
SIGHTLINE_INLINE float sum_of_lanes(Vec x) { return (x.value[0] + x.value[1]) + (x.value[2] + x.value[3]); }
// Lane i: the sum of the lanes of sums[i].
SIGHTLINE_INLINE Vec sums_of_lanes(const Vec (&sums)[4]) {
  return {Float4{sum_of_lanes(sums[0]), sum_of_lanes(sums[1]), sum_of_lanes(sums[2]), sum_of_lanes(sums[3])}};
}
// to (column, row) = from (row, column) on a block of kWidth x kWidth floats.
SIGHTLINE_INLINE void transpose_block(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  for (int column = 0; column < 4; ++column)
    store(to + column * to_stride, {Float4{from[column], from[from_stride + column], from[2 * from_stride + column],
                                           from[3 * from_stride + column]}});
}
SIGHTLINE_INLINE Mask between(IntVec first, IntVec last, int32_t key) {
  return {(first.value <= key) & (last.value >= key)};
}
SIGHTLINE_INLINE Mask mask_of_bits(uint64_t bits, int lane) {
  const Int4 each = {1, 2, 4, 8};
  const auto here = static_cast<int32_t>(bits >> lane & 15);
  return {(Int4{here, here, here, here} & each) == each};
}
SIGHTLINE_INLINE uint64_t bits_of(Mask mask) {
  return (mask.bits[0] & 1) | (mask.bits[1] & 2) | (mask.bits[2] & 4) | (mask.bits[3] & 8);
}
SIGHTLINE_INLINE Vec load_lanes(const float* from, Mask lanes) {
  Vec result = Vec::broadcast(0.0f);
  for (int lane = 0; lane < 4; ++lane)
    if (lanes.bits[lane] != 0) result.value[lane] = from[lane];
  return result;
}
SIGHTLINE_INLINE uint64_t nonzero_bits(const uint8_t* bytes) {
  uint64_t bits = 0;
  for (int index = 0; index < 64; ++index) bits |= static_cast<uint64_t>(bytes[index] != 0) << index;
  return bits;
}
SIGHTLINE_INLINE Vec to_float(IntVec x) { return {__builtin_convertvector(x.value, Float4)}; }
SIGHTLINE_INLINE IntVec operator-(IntVec a, IntVec b) { return {a.value - b.value}; }

SIGHTLINE_INLINE UintVec operator^(UintVec a, UintVec b) { return {a.value ^ b.value}; }
SIGHTLINE_INLINE UintVec operator*(UintVec a, UintVec b) { return {a.value * b.value}; }
SIGHTLINE_INLINE UintVec shift_right(UintVec x, int bits) { return {x.value >> bits}; }
SIGHTLINE_INLINE Mask at_least(UintVec a, UintVec b) { return {reinterpret_cast<Int4>(a.value >= b.value)}; }

SIGHTLINE_INLINE Vec load_float16(const uint16_t* from) {
  return {Float4{core::float16_to_float(from[0]), core::float16_to_float(from[1]), core::float16_to_float(from[2]),
                 core::float16_to_float(from[3])}};
}
SIGHTLINE_INLINE Vec load_bfloat16(const uint16_t* from) {
  return {Float4{core::bfloat16_to_float(from[0]), core::bfloat16_to_float(from[1]), core::bfloat16_to_float(from[2]),
                 core::bfloat16_to_float(from[3])}};
}
// Columns 0, 2, 4, 6 and 1, 3, 5, 7.
SIGHTLINE_INLINE void load_bfloat16_pairs(const uint16_t* from, Vec& even, Vec& odd) {
  even = {Float4{core::bfloat16_to_float(from[0]), core::bfloat16_to_float(from[2]), core::bfloat16_to_float(from[4]),
                 core::bfloat16_to_float(from[6])}};
  odd = {Float4{core::bfloat16_to_float(from[1]), core::bfloat16_to_float(from[3]), core::bfloat16_to_float(from[5]),
                core::bfloat16_to_float(from[7])}};
}
SIGHTLINE_INLINE void store_float16(uint16_t* to, Vec x) {
  for (int lane = 0; lane < 4; ++lane) to[lane] = core::float_to_float16(x.value[lane]);
}
SIGHTLINE_INLINE void store_bfloat16(uint16_t* to, Vec x) {
  for (int lane = 0; lane < 4; ++lane) to[lane] = core::float_to_bfloat16(x.value[lane]);
}

constexpr bool kHasStreams = false;
SIGHTLINE_INLINE void stream(float* to, Vec x) { store(to, x); }
SIGHTLINE_INLINE void stream_float16(uint16_t* to, Vec x) { store_float16(to, x); }
SIGHTLINE_INLINE void stream_bfloat16(uint16_t* to, Vec x) { store_bfloat16(to, x); }
SIGHTLINE_INLINE void finish_streams() {}

}  // namespace sightline::SIGHTLINE_ISA_NS
