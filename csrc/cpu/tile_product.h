// C (+)= A B, or the sum of several such products, on the tile unit (AMX): its one micro-kernel. A and B are each one
// matrix of bfloat16 or the sum of several, which hold 16 and more bits of their numbers. Products of parts whose
// sizes multiply to less than the last part counts are left out, unless kAll; the smallest of each product are
// summed first, so that the many small terms round where it does not matter.
//
// A is read row after row along the depth; B holds pairs of its depth side by side, lower half first, (depth / 2,
// lanes) of 32 bits. Rows of A and C come in multiples of kPairRows and the depth in multiples of kPairDepth, both
// padded with zeros.
//
// The unit works in the order of its instructions: a store waits for its sums, and products behind it wait for the
// store. So the sums of a block are stored while the next block is under way, each tile when three other products have
// begun since the last that added to it. It does not run beside the vector units, which wait while it multiplies.
#pragma once

#include "cpu/prefetch.h"
#include "cpu/sanitizer.h"
#include "cpu/tile_shapes.h"
#include "cpu/vec_tile.h"

namespace sightline::SIGHTLINE_ISA_NS {

// A matrix of bfloat16 in parts: rows `stride` apart, parts `part` apart, both in elements.
struct SplitRows {
  const uint16_t* data;
  int64_t stride;
  int64_t part;
};
// Pairs in parts: sets of 16 lanes `panel` apart and in them rows of the depth `stride` apart, in elements.
struct SplitPairs {
  const uint32_t* data;
  int64_t panel;
  int64_t part;
  int64_t stride = kPanelLanes;
};

// The operands of one product of a sum.
struct TileFactors {
  SplitRows a;
  SplitPairs b;
  int64_t depth;
};

// Products of parts are of order 0 (both are the first) and up.
constexpr int orders_of_parts(int parts_a, int parts_b, bool all) {
  return all ? parts_a + parts_b - 1 : parts_a > parts_b ? parts_a : parts_b;
}
constexpr int products_of_parts(int parts_a, int parts_b, bool all) {
  int found = 0;
  for (int a = 0; a < parts_a; ++a)
    for (int b = 0; b < parts_b; ++b) found += a + b < orders_of_parts(parts_a, parts_b, all);
  return found;
}

// A block of C: one or two tiles of 16 rows by one or two of 16 lanes.
template <int kRowTiles, int kLaneTiles, bool kAccumulate>
struct TileBlock {
  int64_t stride;  // of C

  int64_t offset(int tile) const { return tile / 2 * kPairRows * stride + tile % 2 * kPanelLanes; }

  // Tile `kTile` leaves for the block before, where there is one, and starts for the next.
  template <int kTile>
  __attribute__((always_inline)) inline void turn_over(float* before, const float* next) const {
    if (kTile % 2 >= kLaneTiles || kTile / 2 >= kRowTiles) return;
    if (before != nullptr) store_tile<kTile>(before + offset(kTile), stride * 4);
    if (kAccumulate)
      load_tile<kTile>(next + offset(kTile), stride * 4);
    else
      clear_tile<kTile>();
  }

  __attribute__((always_inline)) inline void finish(float* c) const {
    store_tile<0>(c, stride * 4);
    if (kLaneTiles == 2) store_tile<1>(c + offset(1), stride * 4);
    if (kRowTiles == 2) store_tile<2>(c + offset(2), stride * 4);
    if (kRowTiles == 2 && kLaneTiles == 2) store_tile<3>(c + offset(3), stride * 4);
    tell_memory();
  }

  // One step of the depth, the first of a block or a later one.
  template <bool kFirst>
  __attribute__((always_inline)) inline void step(const uint16_t* a, int64_t a_stride, const uint32_t* b,
                                                  int64_t b_stride, int64_t panel, float* before,
                                                  const float* next) const {
    if (kFirst) turn_over<0>(before, next);
    load_rows_of_a<0>(a, a_stride * 2);
    load_lanes_of_b<0>(b, b_stride * 4);
    if (kFirst) turn_over<1>(before, next);
    multiply_tiles<0>();
    if (kLaneTiles == 2) load_lanes_of_b<1>(b + panel, b_stride * 4);
    if (kFirst) turn_over<2>(before, next);
    if (kLaneTiles == 2) multiply_tiles<1>();
    if (kRowTiles == 2) load_rows_of_a<1>(a + kPairRows * a_stride, a_stride * 2);
    if (kFirst) turn_over<3>(before, next);
    if (kRowTiles == 2) multiply_tiles<2>();
    if (kRowTiles == 2 && kLaneTiles == 2) multiply_tiles<3>();
  }

  // The sums of rows from `row` and lanes from `lane` stay in the tiles; those of the block before are stored on the
  // way.
  template <int kPartsA, int kPartsB, bool kAll, class Between>
  __attribute__((always_inline)) inline void multiply(const TileFactors* factors, int count, int64_t row, int64_t lane,
                                                      float* before, const float* next, const Between& between) const {
    constexpr int kOrders = orders_of_parts(kPartsA, kPartsB, kAll);
    check_tile(next, stride * 4, 16 * kRowTiles, 64 * kLaneTiles);
    tell_memory();
    bool first = true;
    for (int factor = 0; factor < count; ++factor) {
      const SplitRows& a = factors[factor].a;
      const SplitPairs& b = factors[factor].b;
      const int64_t depth = factors[factor].depth;
      for (int order = kOrders - 1; order >= 0; --order)
        for (int part_b = 0; part_b < kPartsB; ++part_b) {
          const int part_a = order - part_b;
          if (part_a < 0 || part_a >= kPartsA) continue;
          const uint16_t* from_a = a.data + part_a * a.part + row * a.stride;
          const uint32_t* from_b = b.data + part_b * b.part + lane / kPanelLanes * b.panel;
          check_tile(from_a, a.stride * 2, 16 * kRowTiles, depth * 2);
          for (int tile = 0; tile < kLaneTiles; ++tile)
            check_tile(from_b + tile * b.panel, b.stride * 4, depth / 2, 64);
          int64_t k = 0;
          if (first) {
            between();
            step<true>(from_a, a.stride, from_b, b.stride, b.panel, before, next);
            first = false;
            k = kPairDepth;
          }
          for (; k < depth; k += kPairDepth) {
            between();
            step<false>(from_a + k, a.stride, from_b + k / 2 * b.stride, b.stride, b.panel, nullptr, nullptr);
          }
        }
    }
  }
};

// Blocks of kLaneTiles tiles of lanes, all rows of C: two tiles of rows each, one at the end where it is left over.
template <int kPartsA, int kPartsB, bool kAll, int kLaneTiles, bool kAccumulate, class Between>
static void tile_panel(const TileFactors* factors, int count, int64_t lane, float* c, int64_t c_stride, int64_t rows,
                       const Between& between) {
  const TileBlock<2, kLaneTiles, kAccumulate> block{c_stride};
  float* before = nullptr;
  int64_t row = 0;
  for (; row + 2 * kPairRows <= rows; row += 2 * kPairRows) {
    float* target = c + row * c_stride + lane;
    block.template multiply<kPartsA, kPartsB, kAll>(factors, count, row, lane, before, target, between);
    before = target;
  }
  if (before != nullptr) block.finish(before);
  if (row == rows) return;
  const TileBlock<1, kLaneTiles, kAccumulate> last{c_stride};
  float* target = c + row * c_stride + lane;
  last.template multiply<kPartsA, kPartsB, kAll>(factors, count, row, lane, nullptr, target, between);
  last.finish(target);
}

// C (rows, lanes) = the sum of `count` products, at least one, or += with kAccumulate.
template <int kPartsA, int kPartsB, bool kAccumulate, bool kAll = false, class Between = Nothing>
static void tile_product(const TileFactors* factors, int count, float* c, int64_t c_stride, int64_t rows, int64_t lanes,
                         const Between& between = {}) {
  int64_t steps = 0;
  for (int factor = 0; factor < count; ++factor) steps += factors[factor].depth / kPairDepth;
  constexpr int64_t kRows = 2 * kPairRows, kLanes = 2 * kPanelLanes;
  between.spread(core::round_up(rows, kRows) / kRows * core::round_up(lanes, kLanes) / kLanes * steps *
                 products_of_parts(kPartsA, kPartsB, kAll));
  for (int64_t lane = 0; lane < lanes; lane += kLanes) {
    if (lane + kPanelLanes < lanes)
      tile_panel<kPartsA, kPartsB, kAll, 2, kAccumulate>(factors, count, lane, c, c_stride, rows, between);
    else
      tile_panel<kPartsA, kPartsB, kAll, 1, kAccumulate>(factors, count, lane, c, c_stride, rows, between);
  }
}

}  // namespace sightline::SIGHTLINE_ISA_NS
