// The products of decoding's keys in bfloat16 on the tile unit (AMX), with fewer instructions than those of
// decode_products.h, so that memory is what remains to wait for. A tile is 16 keys by 32 columns as they lie, and its
// product with four query rows leaves the rows of a key side by side.
//
// Values would have to be put into pairs of keys first: measured, that costs what the tile unit saves.
#pragma once

#include "cpu/decode_products.h"
#include "cpu/sanitizer.h"
#include "cpu/vec_tile.h"

namespace sightline::SIGHTLINE_ISA_NS {

// Queries (rows, D) to pairs of columns, (groups of kRowGroup rows, D / 2, kRowGroup); rows that a group lacks are
// zeros.
[[maybe_unused]] static void pack_queries(const uint16_t* queries, int64_t width, int rows, uint32_t* pairs) {
  for (int group = 0; group < rows; group += kRowGroup)
    for (int64_t column = 0; column < width; column += 2)
      for (int row = group; row < group + kRowGroup; ++row, ++pairs) {
        *pairs = 0;
        if (row < rows) __builtin_memcpy(pairs, queries + row * width + column, sizeof *pairs);
      }
}

// sums (keys, rows): products of keys [first, first + 16 kTiles) and four rows.
template <int kTiles>
SIGHTLINE_INLINE void key_tile_products(const WideRows& keys, int64_t first, const uint32_t* queries, float* sums) {
  const auto* from = static_cast<const uint16_t*>(row_of<DType::kBFloat16>(keys, first));
  const int64_t bytes = keys.row_stride * 2;
  clear_tile<0>();
  if (kTiles == 2) clear_tile<2>();
  for (int64_t column = 0; column < keys.width; column += kPairDepth) {
    check_tile(from + column, bytes, 16 * kTiles, 64);
    load_lanes_of_b<0>(queries + column / 2 * kRowGroup, kRowGroup * 4);
    load_rows_of_a<0>(from + column, bytes);
    multiply_tiles<0>();
    if (kTiles == 2) {
      load_rows_of_a<1>(from + 16 * keys.row_stride + column, bytes);
      multiply_tiles<2>();
    }
    const char* ahead = reinterpret_cast<const char*>(from + column) + kKeyBytesAhead;
    for (int key = 0; key < 16 * kTiles; ++key) ask_for(ahead + key * bytes, 64);
  }
  store_tile<0>(sums, kRowGroup * 4);
  if (kTiles == 2) store_tile<2>(sums + 16 * kRowGroup, kRowGroup * 4);
  tell_memory();
}

// key_products of decode_products.h.
[[maybe_unused]] static void key_products_by_tiles(const WideRows& keys, int64_t count,
                                                   const QueryNumber<DType::kBFloat16>* queries, int64_t query_stride,
                                                   const uint32_t* query_pairs, int rows, float* products,
                                                   int64_t stride, float* norms) {
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
          Vec parted[kRowGroup];
          part_four_columns(sums[tile], parted);
          for (int of_group = 0; of_group < core::smaller(kRowGroup, rows - row); ++of_group)
            store(products + (row + of_group) * stride + first + 16 * tile, parted[of_group]);
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

}  // namespace sightline::SIGHTLINE_ISA_NS
