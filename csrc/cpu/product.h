// C (+)= A B on small fp32 tiles: the one micro-kernel behind every product of attention.
//
// B is read as rows of vectors, A one scalar at a time by broadcast with free strides in both directions. Scores use
// A = K as stored and B = Q transposed, so that the lanes of a score tile are queries and its rows are keys: every
// quantity of a query row is then a vector, reductions over keys are vertical, and the same tile, read with swapped
// strides, is the A operand of weights times V and of the gradients.
#pragma once

#include <type_traits>

#include "cpu/prefetch.h"
#include "cpu/row_math.h"

namespace sightline::SIGHTLINE_ISA_NS {

// A matrix of scalars: element (row, depth) at data[row * row_stride + depth * depth_stride].
struct Broadcast {
  const float* data;
  int64_t row_stride;
  int64_t depth_stride;
};

template <int kRows, int kVectors, bool kAccumulate, class Between = Nothing>
SIGHTLINE_INLINE void product_block(Broadcast a, const float* b, int64_t b_stride, float* c, int64_t c_stride,
                                    int64_t depth, const Between& between = {}) {
  // Sums start at 0 and meet C at the end: adding tile sums to a running total loses less than one long chain.
  Vec sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 8
    for (int vector = 0; vector < kVectors; ++vector) sums[row][vector] = Vec::broadcast(0.0f);
  const auto add = [&](int64_t k) SIGHTLINE_INLINE_LAMBDA {
    Vec columns[kVectors];
#pragma GCC unroll 8
    for (int vector = 0; vector < kVectors; ++vector)
      columns[vector] = Vec::load(b + k * b_stride + vector * Vec::kWidth);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const Vec scalar = Vec::broadcast(a.data[row * a.row_stride + k * a.depth_stride]);
#pragma GCC unroll 8
      for (int vector = 0; vector < kVectors; ++vector)
        sums[row][vector] = fma(scalar, columns[vector], sums[row][vector]);
    }
  };
  if constexpr (std::is_same_v<Between, Nothing>) {
    for (int64_t k = 0; k < depth; ++k) add(k);
  } else {
    for (int64_t begin = 0; begin < depth; begin += kAskDepth) {
      between();
      const int64_t end = core::smaller(begin + kAskDepth, depth);
      for (int64_t k = begin; k < end; ++k) add(k);
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 8
    for (int vector = 0; vector < kVectors; ++vector) {
      float* target = c + row * c_stride + vector * Vec::kWidth;
      store(target, kAccumulate ? Vec::load(target) + sums[row][vector] : sums[row][vector]);
    }
}

template <int kVectors, bool kAccumulate, class Between>
static void product_panel(Broadcast a, const float* b, int64_t b_stride, float* c, int64_t c_stride, int64_t rows,
                          int64_t depth, const Between& between) {
  constexpr int kRows = kRegisterTiles.product.rows;
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    product_block<kRows, kVectors, kAccumulate>({a.data + row * a.row_stride, a.row_stride, a.depth_stride}, b,
                                                b_stride, c + row * c_stride, c_stride, depth, between);
  }
  const Broadcast rest{a.data + row * a.row_stride, a.row_stride, a.depth_stride};
  float* rest_c = c + row * c_stride;
  switch (rows - row) {
    case 5:
      product_block<5, kVectors, kAccumulate>(rest, b, b_stride, rest_c, c_stride, depth);
      break;
    case 4:
      product_block<4, kVectors, kAccumulate>(rest, b, b_stride, rest_c, c_stride, depth);
      break;
    case 3:
      product_block<3, kVectors, kAccumulate>(rest, b, b_stride, rest_c, c_stride, depth);
      break;
    case 2:
      product_block<2, kVectors, kAccumulate>(rest, b, b_stride, rest_c, c_stride, depth);
      break;
    case 1:
      product_block<1, kVectors, kAccumulate>(rest, b, b_stride, rest_c, c_stride, depth);
      break;
    default:
      break;
  }
}

// One pass over a chunk of the depth.
template <bool kAccumulate, class Between>
static void product_of_chunk(Broadcast a, const float* b, int64_t b_stride, float* c, int64_t c_stride, int64_t rows,
                             int64_t columns, int64_t depth, const Between& between) {
  constexpr int kVectors = kRegisterTiles.product.vectors;
  int64_t column = 0;
  for (; column + kVectors * Vec::kWidth <= columns; column += kVectors * Vec::kWidth)
    product_panel<kVectors, kAccumulate>(a, b + column, b_stride, c + column, c_stride, rows, depth, between);
  switch ((columns - column) / Vec::kWidth) {
    case 3:
      product_panel<3, kAccumulate>(a, b + column, b_stride, c + column, c_stride, rows, depth, between);
      break;
    case 2:
      product_panel<2, kAccumulate>(a, b + column, b_stride, c + column, c_stride, rows, depth, between);
      break;
    case 1:
      product_panel<1, kAccumulate>(a, b + column, b_stride, c + column, c_stride, rows, depth, between);
      break;
    default:
      break;
  }
}

// C (rows x columns) = A B, or += with kAccumulate. `columns` is a multiple of the vector width. Sums of at most kChunk
// products are formed apart and added up.
template <bool kAccumulate, int64_t kChunk = kDepthChunk, class Between = Nothing>
static void product(Broadcast a, const float* b, int64_t b_stride, float* c, int64_t c_stride, int64_t rows,
                    int64_t columns, int64_t depth, const Between& between = {}) {
  constexpr int64_t kLanes = kRegisterTiles.product.vectors * Vec::kWidth;
  between.spread(rows / kRegisterTiles.product.rows * core::round_up(columns, kLanes) / kLanes *
                 core::round_up(depth, kAskDepth) / kAskDepth);
  product_of_chunk<kAccumulate>(a, b, b_stride, c, c_stride, rows, columns, core::smaller(depth, kChunk), between);
  for (int64_t k = kChunk; k < depth; k += kChunk)
    product_of_chunk<true>({a.data + k * a.depth_stride, a.row_stride, a.depth_stride}, b + k * b_stride, b_stride, c,
                           c_stride, rows, columns, core::smaller(depth - k, kChunk), between);
}

// C += A B in which a weight of exactly 0 selects nothing, so that 0 * NaN and 0 * inf do not reach C. Only for
// tiles with non-finite numbers in B. It adds in the order of product_block: finite rows beside others keep their bits.
[[maybe_unused]] static void product_of_nonzero(Broadcast a, const float* b, int64_t b_stride, float* c,
                                                int64_t c_stride, int64_t rows, int64_t columns, int64_t depth) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < columns; column += Vec::kWidth) {
      Vec sum = Vec::broadcast(0.0f);
      for (int64_t k = 0; k < depth; ++k) {
        const float weight = a.data[row * a.row_stride + k * a.depth_stride];
        if (weight != 0.0f) sum = fma(Vec::broadcast(weight), Vec::load(b + k * b_stride + column), sum);
      }
      float* target = c + row * c_stride + column;
      store(target, Vec::load(target) + sum);
    }
}

template <class Between = Nothing>
SIGHTLINE_INLINE void accumulate_product(bool finite, Broadcast a, const float* b, int64_t b_stride, float* c,
                                         int64_t c_stride, int64_t rows, int64_t columns, int64_t depth,
                                         const Between& between = {}) {
  if (finite)
    product<true>(a, b, b_stride, c, c_stride, rows, columns, depth, between);
  else
    product_of_nonzero(a, b, b_stride, c, c_stride, rows, columns, depth);
}

}  // namespace sightline::SIGHTLINE_ISA_NS
