// The products of decoding's keys in bfloat16 on the tile unit (AMX), with a third of the instructions of
// decode_products.h, so that memory is what remains to wait for. A tile is 16 keys by 32 columns as they lie, and its
// product with four query rows leaves the rows of a key side by side.
//
// Values would have to be put into pairs of keys first: measured, that costs what the tile unit saves.
#pragma once

#include "cpu/decode_products.h"
#include "cpu/pair_product.h"

namespace sightline::SIGHTLINE_ISA_NS {

#if defined(__AMX_BF16__)

// Queries as load_group arranges them (even columns of a group, then odd ones) to pairs of columns, (groups of
// kRowGroup rows, D / 2, kRowGroup); rows that a group lacks are zeros.
[[maybe_unused]] static void pack_queries(const float* queries, int64_t width, int rows, uint32_t* pairs) {
  static_assert(kColumnGroup == kPairDepth);
  const auto bits = [&](int row, int64_t place) {
    uint32_t number;
    __builtin_memcpy(&number, queries + row * width + place, sizeof number);
    return number;
  };
  for (int group = 0; group < rows; group += kRowGroup)
    for (int64_t column = 0; column < width; column += kColumnGroup)
      for (int64_t pair = 0; pair < kColumnGroup / 2; ++pair)
        for (int row = group; row < group + kRowGroup; ++row)
          *pairs++ = row < rows ? bits(row, column + pair) >> 16 | bits(row, column + pair + Vec::kWidth) : 0;
}

// products[r * stride + j] for four rows and 16 keys, from (keys, rows).
SIGHTLINE_INLINE void part_rows(const float* from, float* products, int64_t stride) {
  const __m512i first_rows = _mm512_set_epi32(29, 25, 21, 17, 13, 9, 5, 1, 28, 24, 20, 16, 12, 8, 4, 0);
  const __m512i last_rows = _mm512_set_epi32(31, 27, 23, 19, 15, 11, 7, 3, 30, 26, 22, 18, 14, 10, 6, 2);
  const __m512 keys[4] = {_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16), _mm512_loadu_ps(from + 32),
                          _mm512_loadu_ps(from + 48)};
  for (int half = 0; half < 2; ++half) {
    const __m512i order = half == 0 ? first_rows : last_rows;
    const __m512 low = _mm512_permutex2var_ps(keys[0], order, keys[1]);
    const __m512 high = _mm512_permutex2var_ps(keys[2], order, keys[3]);
    _mm512_storeu_ps(products + 2 * half * stride, _mm512_shuffle_f32x4(low, high, 0x44));
    _mm512_storeu_ps(products + (2 * half + 1) * stride, _mm512_shuffle_f32x4(low, high, 0xee));
  }
}

// sums (keys, rows): products of keys [first, first + 16 kTiles) and four rows.
template <int kTiles>
SIGHTLINE_INLINE void key_tile_products(const WideRows& keys, int64_t first, const uint32_t* queries, float* sums) {
  const auto* from = static_cast<const uint16_t*>(row_of<DType::kBFloat16>(keys, first));
  const int64_t bytes = keys.row_stride * 2;
  _tile_zero(0);
  if (kTiles == 2) _tile_zero(1);
  for (int64_t column = 0; column < keys.width; column += kPairDepth) {
    check_tile(from + column, bytes, 16 * kTiles, 64);
    _tile_loadd(6, queries + column / 2 * kRowGroup, kRowGroup * 4);
    _tile_loadd(4, from + column, bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (kTiles == 2) {
      _tile_loadd(5, from + 16 * keys.row_stride + column, bytes);
      _tile_dpbf16ps(1, 5, 6);
    }
    const char* ahead = reinterpret_cast<const char*>(from + column) + kKeyBytesAhead;
    for (int key = 0; key < 16 * kTiles; ++key) __builtin_prefetch(ahead + key * bytes, 0, 2);
  }
  _tile_stored(0, sums, kRowGroup * 4);
  if (kTiles == 2) _tile_stored(1, sums + 16 * kRowGroup, kRowGroup * 4);
  tell_memory();
}

// key_products of decode_products.h.
[[maybe_unused]] static void key_products_by_tiles(const WideRows& keys, int64_t count, const float* queries,
                                                   int64_t query_stride, const uint32_t* query_pairs, int rows,
                                                   float* products, int64_t stride, float* norms) {
  const int64_t in_tiles = count / 16 * 16;
  {
    const TileUnit unit(true, kRowGroup);
    alignas(64) float sums[2][16 * kRowGroup];
    for (int64_t first = 0; first < in_tiles; first += 32) {
      const int tiles = first + 32 <= in_tiles ? 2 : 1;
      for (int row = 0; row < rows; row += kRowGroup) {
        const uint32_t* pairs = query_pairs + row * keys.width / 2;
        tell_memory();
        if (tiles == 2)
          key_tile_products<2>(keys, first, pairs, sums[0]);
        else
          key_tile_products<1>(keys, first, pairs, sums[0]);
        for (int tile = 0; tile < tiles; ++tile) {
          float* to = products + row * stride + first + 16 * tile;
          if (rows - row >= kRowGroup) {
            part_rows(sums[tile], to, stride);
          } else {
            alignas(64) float parted[kRowGroup * 16];
            part_rows(sums[tile], parted, 16);
            for (int of_group = 0; of_group < rows - row; ++of_group)
              store(to + of_group * stride, Vec::load(parted + of_group * 16));
          }
        }
      }
      if (norms == nullptr) continue;
      for (int tile = 0; tile < tiles; ++tile)
        key_products_of_rows<DType::kBFloat16, 1, true>(keys, first + 16 * tile, count, nullptr, 0, norms, 0);
    }
  }
  if (in_tiles == count) return;
  const WideRows rest{row_of<DType::kBFloat16>(keys, in_tiles), keys.row_stride, keys.width};
  key_products<DType::kBFloat16>(rest, count - in_tiles, queries, query_stride, rows, products + in_tiles, stride,
                                 norms == nullptr ? nullptr : norms + in_tiles);
}

#endif

}  // namespace sightline::SIGHTLINE_ISA_NS
