// Which rows of a tile see which of its keys, in bits: the rows' intervals, key_mask, and attn_mask where it is
// boolean.
#pragma once

#include "cpu/row_tile.h"

namespace sightline::SIGHTLINE_ISA_NS {

struct TileVisibility {
  uint64_t lanes[kKeyTile];  // bit r of a key: row r sees it
};
static_assert(kRowTile == 64 && kKeyTile == 64);

// Stages of transpose_bits: the halves that bits of `distance` tell apart change places between rows that lie so far
// apart in blocks of 8 rows.
template <int kRowDistance>
SIGHTLINE_INLINE void swap_bits(uint64_t (&rows)[8][8], int distance, uint64_t mask) {
  for (int row = 0; row < 8; row = (row + kRowDistance + 1) & ~kRowDistance)
    for (int lane = 0; lane < 8; ++lane) {
      const uint64_t swapped = ((rows[row][lane] >> distance) ^ rows[row + kRowDistance][lane]) & mask;
      rows[row][lane] ^= swapped << distance;
      rows[row + kRowDistance][lane] ^= swapped;
    }
}

// Bit i of row j becomes bit j of row i. Rows are exchanged in vectors of 8: first those whole vectors apart, then, the
// rows put down in the other order, those that were neighbours.
SIGHTLINE_INLINE void transpose_bits(uint64_t (&rows)[64]) {
  uint64_t blocks[8][8], turned[8][8];
  __builtin_memcpy(blocks, rows, sizeof rows);
  swap_bits<4>(blocks, 32, 0x00000000ffffffffu);
  swap_bits<2>(blocks, 16, 0x0000ffff0000ffffu);
  swap_bits<1>(blocks, 8, 0x00ff00ff00ff00ffu);
  for (int block = 0; block < 8; ++block)
    for (int lane = 0; lane < 8; ++lane) turned[lane][block] = blocks[block][lane];
  swap_bits<4>(turned, 4, 0x0f0f0f0f0f0f0f0fu);
  swap_bits<2>(turned, 2, 0x3333333333333333u);
  swap_bits<1>(turned, 1, 0x5555555555555555u);
  for (int block = 0; block < 8; ++block)
    for (int lane = 0; lane < 8; ++lane) rows[8 * block + lane] = turned[lane][block];
}

// The keys [first, first + 64) that lie in [begin, last], as bits.
SIGHTLINE_INLINE uint64_t interval_bits(int64_t first, int64_t begin, int64_t last) {
  const int64_t low = core::larger(begin - first, 0), high = core::smaller(last - first, 63);
  return high < low ? 0 : (~uint64_t{0} >> (63 - (high - low))) << low;
}

// From the rows' intervals and attn_mask, row by row.
SIGHTLINE_INLINE void find_visible_in_mask(const AttentionProblem& problem, const RowTile& rows, int64_t first,
                                           int count, TileVisibility& visible) {
  for (int lane = 0; lane < rows.lanes; ++lane) {
    uint64_t keys = interval_bits(first, rows.first[lane], rows.last[lane]);
    if (keys != 0) {
      // Rows of the mask lie far apart: what the next tile of keys reads of this one would be waited for.
      prefetch_mask(problem.attn_mask, rows.batch, rows.head[lane], rows.query[lane], first + kKeyTile, kKeyTile);
      keys &= mask_bits(problem, rows.batch, rows.head[lane], rows.query[lane], first, count);
    }
    visible.lanes[lane] = keys;
  }
  for (int lane = rows.lanes; lane < kRowTile; ++lane) visible.lanes[lane] = 0;
  transpose_bits(visible.lanes);
}

// From the rows' intervals alone, key by key.
SIGHTLINE_INLINE void find_visible_in_intervals(const RowTile& rows, int64_t first, int count,
                                                TileVisibility& visible) {
  for (int key = 0; key < count; ++key) {
    uint64_t lanes = 0;
    for (int lane = 0; lane < rows.lanes; lane += Vec::kWidth)
      lanes |= bits_of(between(IntVec::load(rows.first + lane), IntVec::load(rows.last + lane),
                               static_cast<int32_t>(first) + key))
               << lane;
    visible.lanes[key] = lanes;
  }
}

// What the packed mask leaves visible of a tile.
SIGHTLINE_INLINE TileShows tile_shows(const AttentionProblem& problem, const RowTile& rows, int64_t first) {
  return problem.mask_tiles.shows[mask_tile(problem.mask_tiles, rows.batch, rows.query[0], first)];
}

// Whether attn_mask hides keys of a tile, in bytes that lie side by side.
SIGHTLINE_INLINE bool tile_is_masked_with_bytes(const AttentionProblem& problem, const RowTile& rows, int64_t first) {
  if (problem.mask_tiles.lanes != nullptr) return tile_shows(problem, rows, first) != TileShows::kEverything;
  return masks_with_bytes(problem);
}

SIGHTLINE_INLINE bool tile_is_visible_to_any(const AttentionProblem& problem, const RowTile& rows, int64_t first,
                                             int64_t count) {
  if (first > rows.max_last || first + count <= rows.min_first) return false;
  return problem.mask_tiles.lanes == nullptr || tile_shows(problem, rows, first) != TileShows::kNothing;
}

// Of keys [first, first + count); `takes_part` says for each whether key_mask lets it take part.
[[maybe_unused]] static void find_visible(const AttentionProblem& problem, const RowTile& rows, int64_t first,
                                          int count, const bool* takes_part, TileVisibility& visible) {
  const bool packed = problem.mask_tiles.lanes != nullptr;
  if (masks_with_bytes(problem) && !packed)
    find_visible_in_mask(problem, rows, first, count, visible);
  else if (first < rows.max_first || first + count - 1 > rows.min_last)
    find_visible_in_intervals(rows, first, count, visible);
  else
    for (int key = 0; key < count; ++key) visible.lanes[key] = ~uint64_t{0};
  if (packed) {
    const int64_t tile = mask_tile(problem.mask_tiles, rows.batch, rows.query[0], first);
    for (int key = 0; key < count; ++key) visible.lanes[key] &= problem.mask_tiles.lanes[tile * kKeyTile + key];
  }
  for (int key = 0; key < count; ++key)
    if (!takes_part[key]) visible.lanes[key] = 0;
}

}  // namespace sightline::SIGHTLINE_ISA_NS
