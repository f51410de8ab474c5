// The tile unit (AMX) as its one micro-kernel uses it: tiles 0 to 3 are sums, two of rows by two of lanes, tiles 4 and
// 5 hold rows of A and 6 and 7 lanes of B. Machines without have the same names, so that kernels read the same
// everywhere, and none of them is called: kHasTileUnit is false.
#pragma once

#include "cpu/vec.h"

namespace sightline::SIGHTLINE_ISA_NS {

#if defined(__AMX_BF16__)

constexpr bool kHasTileUnit = true;

// The intrinsics that load tiles do not tell the compiler which memory they read: what was stored before stays before.
SIGHTLINE_INLINE void tell_memory() { asm volatile("" : : : "memory"); }

// The configuration of this thread's tile unit, for as long as it is wanted: tiles of 16 rows, 64 bytes long in A, and
// as many numbers of 32 bits in B and in sums as there are lanes.
class TileUnit {
 public:
  explicit TileUnit(bool wanted, int lanes = 16) : wanted_(wanted) {
    if (!wanted) return;
    struct __attribute__((packed)) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } configuration;
    for (int tile = 0; tile < 8; ++tile) {
      const bool is_a = tile == 4 || tile == 5;
      configuration.row_bytes[tile] = static_cast<uint16_t>(is_a ? 64 : lanes * 4);
      configuration.rows[tile] = 16;
    }
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

// The unit falls asleep when it has not multiplied for some 600 ns, and the next product then waits for 300 ns more
// (measured on Sapphire Rapids). To be called within other work between products; leaves nothing usable in tile 0.
SIGHTLINE_INLINE void keep_tile_unit_awake() { _tile_dpbf16ps(0, 4, 6); }

// The intrinsics want literal numbers.
template <int kTile>
SIGHTLINE_INLINE void store_tile(float* to, int64_t row_bytes) {
  if constexpr (kTile == 0) _tile_stored(0, to, row_bytes);
  if constexpr (kTile == 1) _tile_stored(1, to, row_bytes);
  if constexpr (kTile == 2) _tile_stored(2, to, row_bytes);
  if constexpr (kTile == 3) _tile_stored(3, to, row_bytes);
}
template <int kTile>
SIGHTLINE_INLINE void load_tile(const float* from, int64_t row_bytes) {
  if constexpr (kTile == 0) _tile_loadd(0, from, row_bytes);
  if constexpr (kTile == 1) _tile_loadd(1, from, row_bytes);
  if constexpr (kTile == 2) _tile_loadd(2, from, row_bytes);
  if constexpr (kTile == 3) _tile_loadd(3, from, row_bytes);
}
template <int kTile>
SIGHTLINE_INLINE void clear_tile() {
  if constexpr (kTile == 0) _tile_zero(0);
  if constexpr (kTile == 1) _tile_zero(1);
  if constexpr (kTile == 2) _tile_zero(2);
  if constexpr (kTile == 3) _tile_zero(3);
}
template <int kRowTile>
SIGHTLINE_INLINE void load_rows_of_a(const uint16_t* from, int64_t row_bytes) {
  if constexpr (kRowTile == 0) _tile_loadd(4, from, row_bytes);
  if constexpr (kRowTile == 1) _tile_loadd(5, from, row_bytes);
}
template <int kLaneTile>
SIGHTLINE_INLINE void load_lanes_of_b(const uint32_t* from, int64_t row_bytes) {
  if constexpr (kLaneTile == 0) _tile_loadd(6, from, row_bytes);
  if constexpr (kLaneTile == 1) _tile_loadd(7, from, row_bytes);
}
// Sum `kTile` += its rows of A times its lanes of B.
template <int kTile>
SIGHTLINE_INLINE void multiply_tiles() {
  if constexpr (kTile == 0) _tile_dpbf16ps(0, 4, 6);
  if constexpr (kTile == 1) _tile_dpbf16ps(1, 4, 7);
  if constexpr (kTile == 2) _tile_dpbf16ps(2, 5, 6);
  if constexpr (kTile == 3) _tile_dpbf16ps(3, 5, 7);
}
// Columns 0 to 3 of (16, 4) numbers.
SIGHTLINE_INLINE void part_four_columns(const float* from, Vec (&columns)[4]) {
  const __m512i first_two = _mm512_set_epi32(29, 25, 21, 17, 13, 9, 5, 1, 28, 24, 20, 16, 12, 8, 4, 0);
  const __m512i last_two = _mm512_set_epi32(31, 27, 23, 19, 15, 11, 7, 3, 30, 26, 22, 18, 14, 10, 6, 2);
  const Vec rows[4] = {Vec::load(from), Vec::load(from + 16), Vec::load(from + 32), Vec::load(from + 48)};
  for (int half = 0; half < 2; ++half) {
    const __m512i order = half == 0 ? first_two : last_two;
    const __m512 low = _mm512_permutex2var_ps(rows[0].value, order, rows[1].value);
    const __m512 high = _mm512_permutex2var_ps(rows[2].value, order, rows[3].value);
    columns[2 * half] = {_mm512_shuffle_f32x4(low, high, 0x44)};
    columns[2 * half + 1] = {_mm512_shuffle_f32x4(low, high, 0xee)};
  }
}
// All eight tiles to 0.
SIGHTLINE_INLINE void clear_all_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
}

#else

constexpr bool kHasTileUnit = false;

class TileUnit {
 public:
  explicit TileUnit(bool, int = 16) {}
};
SIGHTLINE_INLINE void tell_memory() {}
SIGHTLINE_INLINE void keep_tile_unit_awake() {}
template <int kTile>
SIGHTLINE_INLINE void store_tile(float*, int64_t) {}
template <int kTile>
SIGHTLINE_INLINE void load_tile(const float*, int64_t) {}
template <int kTile>
SIGHTLINE_INLINE void clear_tile() {}
template <int kRowTile>
SIGHTLINE_INLINE void load_rows_of_a(const uint16_t*, int64_t) {}
template <int kLaneTile>
SIGHTLINE_INLINE void load_lanes_of_b(const uint32_t*, int64_t) {}
template <int kTile>
SIGHTLINE_INLINE void multiply_tiles() {}
SIGHTLINE_INLINE void part_four_columns(const float*, Vec (&)[4]) {}
SIGHTLINE_INLINE void clear_all_tiles() {}

#endif

}  // namespace sightline::SIGHTLINE_ISA_NS
