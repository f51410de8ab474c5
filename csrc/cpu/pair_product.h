// C (+)= A B on bfloat16 numbers in pairs, summed in fp32: on the tile unit (AMX) where there is one (tile_product.h),
// else with AVX-512-BF16's dot products, else not at all.
//
// A is read as it lies, row after row along the depth; B holds pairs of its depth side by side, (depth / 2, lanes) of
// 32 bits, lower half first; paddings as in tile_product.h. So keys are used where they are, and weights stay in the
// lanes in which they were made: the second product gives the transposed output, (columns of V) x (lanes), from V
// transposed.
#pragma once

#include "cpu/tile_product.h"
#include "cpu/vec_pairs.h"

namespace sightline::SIGHTLINE_ISA_NS {

// How many matrices of bfloat16 hold the numbers of a dtype for products of pairs; 0 where these are not to be had, or
// do not pay: fp32 would take three, and the six products of their parts take as long as one of fp32.
SIGHTLINE_INLINE int pair_parts(DType dtype) {
  if (dtype == DType::kBFloat16) return kHasPairProducts ? 1 : 0;
  return dtype == DType::kFloat16 && kHasTileUnit ? 2 : 0;
}

// Calls run(parts) with the number of pair_parts() that the compiler knows.
template <class Run>
static auto with_pair_parts(int parts, Run run) {
  if constexpr (kHasPairProducts)
    if (parts == 1) return run(std::integral_constant<int, 1>());
  if constexpr (kHasTileUnit)
    if (parts == 2) return run(std::integral_constant<int, 2>());
  return run(std::integral_constant<int, 0>());
}

// (depth, lanes) of fp32 to pairs (padded_depth / 2, lanes), in parts `part` apart.
template <int kParts>
static void rows_to_pairs(const float* from, int64_t depth, int64_t padded_depth, int64_t lanes, uint32_t* pairs,
                          int64_t part = 0) {
  const Vec zeros = Vec::broadcast(0.0f);
  for (int64_t row = 0; row < padded_depth; row += 2)
    for (int64_t lane = 0; lane < lanes; lane += Vec::kWidth) {
      Vec low = row < depth ? Vec::load(from + row * lanes + lane) : zeros;
      Vec high = row + 1 < depth ? Vec::load(from + (row + 1) * lanes + lane) : zeros;
      uint32_t* to = pairs + row / 2 * lanes + lane;
      for_each_part<kParts>([&](int index, auto last) { store(to + index * part, split_pairs<last>(low, high)); });
    }
}

// Rows (count, width) of bfloat16 to (padded width, padded_count), zeros in the padding; both paddings are multiples of
// kPairRows and kPairDepth.
SIGHTLINE_INLINE void transpose_bfloat16(const uint16_t* from, int64_t row_stride, int64_t count, int64_t width,
                                         uint16_t* to, int64_t padded_count) {
  for (int64_t column = 0; column < width; column += 16) {
    const Mask live = first_lanes(width - column), none = first_lanes(0);
    for (int64_t row = 0; row < padded_count; row += 32) {
      Pairs block[16];
      for (int pair = 0; pair < 16; ++pair) {
        const int64_t low = row + 2 * pair;
        const uint16_t* source = from + low * row_stride + column;
        block[pair] = pair_rows(source, low < count ? live : none, source + row_stride, low + 1 < count ? live : none);
      }
      transpose_block(block);
      for (int lane = 0; lane < 16; ++lane) store(to + (column + lane) * padded_count + row, block[lane]);
    }
  }
}

// Adds the transpose of `from` (columns, lanes) to the rows of `to` (lanes, columns), and clears it.
SIGHTLINE_INLINE void move_transposed(float* from, int64_t columns, int64_t lanes, float* to) {
  for (int64_t column = 0; column < columns; column += 16)
    for (int64_t lane = 0; lane < lanes; lane += 16) {
      Pairs block[16];
      for (int row = 0; row < 16; ++row) {
        float* source = from + (column + row) * lanes + lane;
        block[row] = as_pairs(Vec::load(source));
        store(source, Vec::broadcast(0.0f));
      }
      transpose_block(block);
      for (int row = 0; row < 16; ++row) {
        float* target = to + (lane + row) * columns + column;
        store(target, Vec::load(target) + as_floats(block[row]));
      }
    }
}

// A block of C with its sums in registers: vectors of B a panel apart.
template <int kRows, int kVectors, bool kAccumulate, class Between>
SIGHTLINE_INLINE void pair_block(const uint16_t* a, int64_t a_stride, const SplitPairs& b, float* c, int64_t c_stride,
                                 int64_t depth, const Between& between) {
  Vec sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 8
    for (int vector = 0; vector < kVectors; ++vector)
      sums[row][vector] = kAccumulate ? Vec::load(c + row * c_stride + vector * Vec::kWidth) : Vec::broadcast(0.0f);
  const auto add = [&](int64_t k) SIGHTLINE_INLINE_LAMBDA {
    Pairs columns[kVectors];
#pragma GCC unroll 8
    for (int vector = 0; vector < kVectors; ++vector)
      columns[vector] = load_pairs(b.data + k / 2 * b.stride + vector * b.panel);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const Pairs pair = broadcast_pair(a + row * a_stride + k);
#pragma GCC unroll 8
      for (int vector = 0; vector < kVectors; ++vector)
        sums[row][vector] = add_products(sums[row][vector], pair, columns[vector]);
    }
  };
  if constexpr (std::is_same_v<Between, Nothing>) {
    for (int64_t k = 0; k < depth; k += 2) add(k);
  } else {
    for (int64_t begin = 0; begin < depth; begin += kPairDepth) {
      between();
      for (int64_t k = begin; k < begin + kPairDepth; k += 2) add(k);
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 8
    for (int vector = 0; vector < kVectors; ++vector)
      store(c + row * c_stride + vector * Vec::kWidth, sums[row][vector]);
}

// Where few lanes are left more rows make up for them: sums that wait for each other would wait for themselves.
constexpr int rows_beside(int vectors) {
  return vectors > 2 ? kRegisterTiles.pairs.rows : static_cast<int>(kPairRows) / vectors;
}

// All rows of the lanes of kVectors vectors.
template <int kVectors, bool kAccumulate, class Between>
static void pair_panel(const TileFactors& factors, int64_t lane, float* c, int64_t c_stride, int64_t rows,
                       const Between& between) {
  constexpr int kRows = rows_beside(kVectors);
  static_assert(kPairRows % kRows == 0);
  const auto& [a, b, depth] = factors;
  const SplitPairs panels{b.data + lane / kPanelLanes * b.panel, b.panel, 0, b.stride};
  for (int64_t row = 0; row < rows; row += kRows)
    pair_block<kRows, kVectors, kAccumulate>(a.data + row * a.stride, a.stride, panels, c + row * c_stride + lane,
                                             c_stride, depth, between);
}

template <bool kAccumulate, class Between>
static void pair_blocks(const TileFactors& factors, float* c, int64_t c_stride, int64_t rows, int64_t lanes,
                        const Between& between) {
  constexpr int kVectors = kRegisterTiles.pairs.vectors;
  static_assert(kVectors == 4, "the rest has up to three");
  int64_t lane = 0;
  for (; lane + kVectors * Vec::kWidth <= lanes; lane += kVectors * Vec::kWidth)
    pair_panel<kVectors, kAccumulate>(factors, lane, c, c_stride, rows, between);
  switch ((lanes - lane) / Vec::kWidth) {
    case 3:
      pair_panel<3, kAccumulate>(factors, lane, c, c_stride, rows, between);
      break;
    case 2:
      pair_panel<2, kAccumulate>(factors, lane, c, c_stride, rows, between);
      break;
    case 1:
      pair_panel<1, kAccumulate>(factors, lane, c, c_stride, rows, between);
      break;
    default:
      break;
  }
}

// C (rows, lanes) = the sum of `count` products of operands in parts, at least one, or += with kAccumulate; with kAll
// of all bits. Dot products alone know one part.
template <int kPartsA, int kPartsB, bool kAccumulate, bool kAll = false, class Between = Nothing>
static void pair_products(const TileFactors* factors, int count, float* c, int64_t c_stride, int64_t rows,
                          int64_t lanes, const Between& between = {}) {
  if constexpr (kHasTileUnit) {
    tile_product<kPartsA, kPartsB, kAccumulate, kAll>(factors, count, c, c_stride, rows, lanes, between);
  } else if constexpr (kHasPairProducts) {
    static_assert(kPartsA <= 1 && kPartsB <= 1);
    constexpr int64_t kVectors = kRegisterTiles.pairs.vectors, kSums = kRegisterTiles.pairs.rows * kVectors;
    int64_t steps = 0;
    for (int index = 0; index < count; ++index) steps += factors[index].depth / kPairDepth;
    between.spread(rows * lanes / Vec::kWidth / kSums * steps);
    for (int index = 0; index < count; ++index) {
      if (kAccumulate || index > 0)
        pair_blocks<true>(factors[index], c, c_stride, rows, lanes, between);
      else
        pair_blocks<false>(factors[index], c, c_stride, rows, lanes, between);
    }
  }
}

// One product.
template <int kPartsA, int kPartsB, bool kAccumulate>
static void pair_product(SplitRows a, SplitPairs b, float* c, int64_t c_stride, int64_t rows, int64_t lanes,
                         int64_t depth, Prefetches& prefetches) {
  const TileFactors factors{a, b, depth};
  pair_products<kPartsA, kPartsB, kAccumulate>(&factors, 1, c, c_stride, rows, lanes, AskFor{prefetches});
}

// The same where nobody asks for what is left of `prefetches`.
template <int kPartsA, int kPartsB, bool kAccumulate>
static void pair_product(SplitRows a, SplitPairs b, float* c, int64_t c_stride, int64_t rows, int64_t lanes,
                         int64_t depth, Prefetches&& prefetches) {
  pair_product<kPartsA, kPartsB, kAccumulate>(a, b, c, c_stride, rows, lanes, depth, prefetches);
}

}  // namespace sightline::SIGHTLINE_ISA_NS
