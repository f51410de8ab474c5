// Which rows of a tile see which of its keys, in bits: the rows' intervals, key_mask, and attn_mask where it is
// boolean.
#pragma once

#include "cpu/row_tile.h"

namespace sightline::SIGHTLINE_ISA_NS {

struct TileVisibility {
  uint64_t lanes[kKeyTile];  // bit r of a key: row r sees it
};
static_assert(kRowTile == 64 && kKeyTile == 64);

// Bit i of row j becomes bit j of row i.
SIGHTLINE_INLINE void transpose_bits(uint64_t (&rows)[64]) {
  uint64_t mask = 0x00000000ffffffffu;
  for (int distance = 32; distance != 0; distance >>= 1, mask ^= mask << distance)
    for (int row = 0; row < 64; row = (row + distance + 1) & ~distance) {
      const uint64_t swapped = ((rows[row] >> distance) ^ rows[row + distance]) & mask;
      rows[row] ^= swapped << distance;
      rows[row + distance] ^= swapped;
    }
}

// The keys [first, first + 64) that lie in [begin, last], as bits.
SIGHTLINE_INLINE uint64_t interval_bits(int64_t first, int64_t begin, int64_t last) {
  const int64_t low = core::larger(begin - first, 0), high = core::smaller(last - first, 63);
  return high < low ? 0 : (~uint64_t{0} >> (63 - (high - low))) << low;
}

// `takes_part` says for each of the keys [first, first + count) whether key_mask lets it take part.
[[maybe_unused]] static void find_visible(const AttentionProblem& problem, const RowTile& rows, int64_t first,
                                          int count, const bool* takes_part, TileVisibility& visible) {
  const bool has_bytes = masks_with_bytes(problem);
  for (int lane = 0; lane < rows.lanes; ++lane) {
    uint64_t keys = interval_bits(first, rows.first[lane], rows.last[lane]);
    if (has_bytes && keys != 0) {
      // Rows of the mask lie far apart: what the next tile of keys reads of this one would be waited for.
      prefetch_mask(problem.attn_mask, rows.batch, rows.head[lane], rows.query[lane], first + kKeyTile, kKeyTile);
      keys &= mask_bits(problem, rows.batch, rows.head[lane], rows.query[lane], first, count);
    }
    visible.lanes[lane] = keys;
  }
  for (int lane = rows.lanes; lane < kRowTile; ++lane) visible.lanes[lane] = 0;
  transpose_bits(visible.lanes);
  for (int key = 0; key < count; ++key)
    if (!takes_part[key]) visible.lanes[key] = 0;
}

}  // namespace sightline::SIGHTLINE_ISA_NS
