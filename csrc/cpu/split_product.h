// Matrices as bfloat16 in one part or in two that add up to sixteen bits: what pair_product.h multiplies.
//
// Pairs lie in panels of 16 lanes, (lanes / 16, depth / 2, 16) of 32 bits: rows of a tile far apart would fall on few
// sets of the first-level cache.
#pragma once

#include "core/visibility.h"
#include "cpu/pair_product.h"

namespace sightline::SIGHTLINE_ISA_NS {

// Rows (rows, width) to pairs of their columns, which become the depth, (padded width / 2); the rows become lanes.
template <int kParts>
static void transpose_to_pairs(const float* from, int64_t from_stride, int64_t width, uint32_t* to, int64_t panel,
                               int64_t part, int64_t rows) {
  for (int64_t lane = 0; lane < rows; lane += 16)
    for (int64_t column = 0; column < width; column += 32) {
      Pairs block[kParts][16];
      for (int row = 0; row < 16; ++row) {
        const float* source = from + (lane + row) * from_stride + column;
        const bool live = lane + row < rows;
        Vec first = live ? Vec::load(source) : Vec::broadcast(0.0f);
        Vec second = live && column + 16 < width ? Vec::load(source + 16) : Vec::broadcast(0.0f);
        for_each_part<kParts>([&](int index, auto last) { block[index][row] = split_row<last>(first, second); });
      }
      uint32_t* target = to + lane / kPanelLanes * panel + column / 2 * kPanelLanes;
      for (int index = 0; index < kParts; ++index) {
        transpose_block(block[index]);
        for (int pair = 0; pair < 16; ++pair) store(target + index * part + pair * kPanelLanes, block[index][pair]);
      }
    }
}

// Rows (rows, width) as they lie, with zeros up to row `padded_rows` and column `to_stride`, which is a multiple of
// kPairDepth; `width` is one of 16.
template <int kParts>
static void split_rows(const float* from, int64_t from_stride, int64_t rows, int64_t width, int64_t padded_rows,
                       uint16_t* to, int64_t to_stride, int64_t part) {
  for (int64_t row = 0; row < padded_rows; ++row)
    for (int64_t column = 0; column < to_stride; column += kPairDepth) {
      Vec first = Vec::broadcast(0.0f), second = first;
      if (row < rows) first = Vec::load(from + row * from_stride + column);
      if (row < rows && column + 16 < width) second = Vec::load(from + row * from_stride + column + 16);
      uint16_t* target = to + row * to_stride + column;
      for_each_part<kParts>(
          [&](int index, auto last) { store(target + index * part, split_row<last>(first, second)); });
    }
}

// Rows (rows, width) to their transpose (width, depth), the depth padded with zeros. `width` is a multiple of 16.
template <int kParts>
static void transpose_to_rows(const float* from, int64_t from_stride, int64_t rows, int64_t width, uint16_t* to,
                              int64_t to_stride, int64_t part) {
  for (int64_t column = 0; column < width; column += 16)
    for (int64_t row = 0; row < rows; row += 32) {
      Pairs block[kParts][16];
      for (int pair = 0; pair < 16; ++pair) {
        const int64_t at = row + 2 * pair;
        const float* source = from + at * from_stride + column;
        Vec low = at < rows ? Vec::load(source) : Vec::broadcast(0.0f);
        Vec high = at + 1 < rows ? Vec::load(source + from_stride) : Vec::broadcast(0.0f);
        for_each_part<kParts>([&](int index, auto last) { block[index][pair] = split_pairs<last>(low, high); });
      }
      for (int index = 0; index < kParts; ++index) {
        transpose_block(block[index]);
        for (int lane = 0; lane < 16; ++lane)
          store(to + index * part + (column + lane) * to_stride + row, block[index][lane]);
      }
    }
}

// Rows (depth, lanes) to pairs; each row times its factor where there are some. `depth` is padded with zeros to a
// multiple of kPairDepth.
template <int kParts>
static void split_to_pairs(const float* from, int64_t from_stride, const float* factors, int64_t depth, int64_t lanes,
                           uint32_t* to, int64_t panel, int64_t part) {
  const int64_t padded_depth = core::round_up(depth, kPairDepth);
  for (int64_t row = 0; row < padded_depth; row += 2) {
    const Vec low_factor = Vec::broadcast(factors != nullptr && row < depth ? factors[row] : 1.0f);
    const Vec high_factor = Vec::broadcast(factors != nullptr && row + 1 < depth ? factors[row + 1] : 1.0f);
    for (int64_t lane = 0; lane < lanes; lane += 16) {
      Vec low = Vec::broadcast(0.0f), high = low;
      if (row < depth) low = Vec::load(from + row * from_stride + lane);
      if (row + 1 < depth) high = Vec::load(from + (row + 1) * from_stride + lane);
      if (factors != nullptr) low = low * low_factor, high = high * high_factor;
      uint32_t* target = to + lane / kPanelLanes * panel + row / 2 * kPanelLanes;
      for_each_part<kParts>([&](int index, auto last) { store(target + index * part, split_pairs<last>(low, high)); });
    }
  }
}

}  // namespace sightline::SIGHTLINE_ISA_NS
