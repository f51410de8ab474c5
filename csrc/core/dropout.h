// Counter-based dropout: keep (i, j) when a hash of (seed, b, h, i, j) is at least p * 2^32.
//
// The mixer is "lowbias32" (C. Wellons, "Prospecting for Hash Functions", 2018). U is uint32_t or a vector of them,
// with operators ^ + * and shift_right. Every backend computes the same bits, forward and backward.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace sightline::core {

SIGHTLINE_INLINE uint32_t shift_right(uint32_t x, int bits) { return x >> bits; }

template <class U>
SIGHTLINE_INLINE U mix_bits(U x, U first, U second) {
  x = x ^ shift_right(x, 16);
  x = x * first;
  x = x ^ shift_right(x, 15);
  x = x * second;
  return x ^ shift_right(x, 16);
}

constexpr uint32_t kMixFirst = 0x7feb352du;
constexpr uint32_t kMixSecond = 0x846ca68bu;
constexpr uint32_t kKeyOffset = 0x9e3779b9u;

SIGHTLINE_INLINE uint32_t mix_bits(uint32_t x) { return mix_bits<uint32_t>(x, kMixFirst, kMixSecond); }

// `head` is b * H + h, `row` the query's index in its tensor.
SIGHTLINE_INLINE uint32_t dropout_row_key(uint64_t seed, uint32_t head, uint32_t row) {
  const uint32_t low = mix_bits(static_cast<uint32_t>(seed));
  const uint32_t high = mix_bits(low + static_cast<uint32_t>(seed >> 32));
  return mix_bits(mix_bits(high + head) + row);
}

SIGHTLINE_INLINE uint32_t dropout_key_key(uint32_t key) { return mix_bits(key + kKeyOffset); }

}  // namespace sightline::core
