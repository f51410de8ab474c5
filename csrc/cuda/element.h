// The three element types behind one interface: widening, rounding, and for the 16-bit types the matrix product.
//
// A Words4 holds 8 numbers of 16 bits or 4 of 32.
#pragma once

#include "cuda/device.h"

namespace sightline::cuda {

struct Float32 {
  using Bits = uint32_t;
  static constexpr int kBytes = 4;
  SIGHTLINE_DEVICE float widen(Bits bits) { return core::float_from_bits(bits); }
  SIGHTLINE_DEVICE Bits narrow(float value) { return core::bits_of_float(value); }
};

struct Float16 {
  using Bits = uint16_t;
  static constexpr int kBytes = 2;
  static constexpr uint32_t kExponents = 0x7c007c00u, kLowestExponentBits = 0x04000400u;
  SIGHTLINE_DEVICE float widen(Bits bits) { return widen_float16(bits); }
  SIGHTLINE_DEVICE uint32_t pack(float low, float high) { return pack_float16(low, high); }
  SIGHTLINE_DEVICE Bits narrow(float value) { return static_cast<Bits>(pack_float16(value, 0.0f)); }
  SIGHTLINE_DEVICE void multiply_add(float (&sums)[4], const Words4& a, uint32_t b0, uint32_t b1) {
    multiply_add_float16(sums, a, b0, b1);
  }
};

struct BFloat16 {
  using Bits = uint16_t;
  static constexpr int kBytes = 2;
  static constexpr uint32_t kExponents = 0x7f807f80u, kLowestExponentBits = 0x00800080u;
  SIGHTLINE_DEVICE float widen(Bits bits) { return core::bfloat16_to_float(bits); }
  SIGHTLINE_DEVICE uint32_t pack(float low, float high) { return pack_bfloat16(low, high); }
  SIGHTLINE_DEVICE Bits narrow(float value) { return static_cast<Bits>(pack_bfloat16(value, 0.0f)); }
  SIGHTLINE_DEVICE void multiply_add(float (&sums)[4], const Words4& a, uint32_t b0, uint32_t b1) {
    multiply_add_bfloat16(sums, a, b0, b1);
  }
};

// Both numbers of a 32-bit word, widened.
template <class T>
SIGHTLINE_DEVICE void widen_pair(uint32_t word, float& low, float& high) {
  low = T::widen(static_cast<uint16_t>(word));
  high = T::widen(static_cast<uint16_t>(word >> 16));
}

// Two 16-bit numbers with infinities and NaN replaced by 0.
template <class T>
SIGHTLINE_DEVICE uint32_t finite_or_zero(uint32_t word) {
  // Adding 1 to an exponent of all ones carries into the sign's place.
  const uint32_t carry = ((word & T::kExponents) + T::kLowestExponentBits) & 0x80008000u;
  return word & ~((carry >> 15) * 0xffffu);
}

SIGHTLINE_DEVICE bool is_finite(float value) { return value - value == 0.0f; }

template <class T>
SIGHTLINE_DEVICE float load_element(const char* row, int column) {
  return T::widen(reinterpret_cast<const typename T::Bits*>(row)[column]);
}

// The 16 bytes of a row that begin at `column`; zeros past its width. kVector: the row is aligned and its width whole.
template <class T, bool kVector>
SIGHTLINE_DEVICE Words4 load_words(const char* row, int column, int width, bool live) {
  constexpr int kCount = 16 / T::kBytes;
  if constexpr (kVector) {
    Words4 words{0, 0, 0, 0};
    if (live && column < width) words = load_16_bytes(row + column * T::kBytes);
    return words;
  } else {
    const auto* elements = reinterpret_cast<const typename T::Bits*>(row);
    uint32_t parts[4] = {0, 0, 0, 0};
    SIGHTLINE_UNROLL
    for (int index = 0; index < kCount; ++index) {
      const bool inside = live && column + index < width;
      const uint32_t bits = inside ? elements[column + index] : 0;
      parts[index * T::kBytes / 4] |= bits << (index * T::kBytes % 4 * 8);
    }
    return {parts[0], parts[1], parts[2], parts[3]};
  }
}

// The same into shared memory, where it arrives later if the row allows it.
template <class T, bool kVector>
SIGHTLINE_DEVICE void copy_words(Words4* to, const char* row, int column, int width, bool live) {
  if constexpr (kVector)
    copy_16_bytes(to, row + column * T::kBytes, live && column < width);
  else
    *to = load_words<T, kVector>(row, column, width, live);
}

}  // namespace sightline::cuda
