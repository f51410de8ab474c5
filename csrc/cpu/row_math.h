// Short loops over one row of fp32 numbers.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/visibility.h"
#include "core/weights.h"
#include "cpu/tile_shapes.h"
#include "cpu/vec.h"

namespace sightline::SIGHTLINE_ISA_NS {

// Row (batch, head, row) of a tensor of heads.
SIGHTLINE_INLINE const void* row_of(const HeadsView& view, DType dtype, int64_t batch, int64_t head, int64_t row) {
  return advance(static_cast<const void*>(view.data),
                 batch * view.batch_stride + head * view.head_stride + row * view.row_stride, dtype);
}

SIGHTLINE_INLINE void* writable_row_of(const HeadsView& view, DType dtype, int64_t batch, int64_t head, int64_t row) {
  return advance(view.data, batch * view.batch_stride + head * view.head_stride + row * view.row_stride, dtype);
}

SIGHTLINE_INLINE void zero(float* values, int64_t count) {
  for (int64_t index = 0; index < count; ++index) values[index] = 0.0f;
}

SIGHTLINE_INLINE float dot(const float* a, const float* b, int64_t count) {
  Vec sum = Vec::broadcast(0.0f);
  int64_t index = 0;
  for (; index + Vec::kWidth <= count; index += Vec::kWidth) sum = fma(Vec::load(a + index), Vec::load(b + index), sum);
  float total = sum_of_lanes(sum);
  for (; index < count; ++index) total += a[index] * b[index];
  return total;
}

// products[lane] = <a, b> of two matrices (width, lanes), added up as product.h adds up <do, v>: a row that attends to
// one key alone has o = v, and its score gradient <do, v> - <do, o> is then exactly 0.
[[maybe_unused]] static void dots_in_order(const float* a, const float* b, int64_t width, int64_t lanes,
                                           float* products) {
  for (int64_t lane = 0; lane < lanes; lane += Vec::kWidth) {
    Vec total = Vec::broadcast(0.0f);
    for (int64_t start = 0; start < width; start += kDepthChunk) {
      Vec sum = Vec::broadcast(0.0f);
      for (int64_t index = start; index < core::smaller(width, start + kDepthChunk); ++index)
        sum = fma(Vec::load(a + index * lanes + lane), Vec::load(b + index * lanes + lane), sum);
      total = total + sum;
    }
    store(products + lane, total);
  }
}

// to (width, rows) = from (rows, width); `rows` is a multiple of the vector width.
[[maybe_unused]] static void transpose_rows(const float* from, int64_t from_stride, int64_t rows, int64_t width,
                                            float* to) {
  for (int64_t row = 0; row < rows; row += Vec::kWidth) {
    int64_t column = 0;
    for (; column + Vec::kWidth <= width; column += Vec::kWidth)
      transpose_block(from + row * from_stride + column, from_stride, to + column * rows + row, rows);
    for (; column < width; ++column)
      for (int64_t lane = row; lane < row + Vec::kWidth; ++lane)
        to[column * rows + lane] = from[lane * from_stride + column];
  }
}

SIGHTLINE_INLINE bool is_finite(const float* values, int64_t count) {
  // Zero times anything finite is zero, times NaN or infinity NaN.
  constexpr int kProbes = 4;  // beside each other: each waits for itself alone
  const Vec nothing = Vec::broadcast(0.0f);
  Vec probes[kProbes] = {nothing, nothing, nothing, nothing};
  int64_t index = 0;
  for (; index + kProbes * Vec::kWidth <= count; index += kProbes * Vec::kWidth) SIGHTLINE_UNROLL
  for (int probe = 0; probe < kProbes; ++probe)
    probes[probe] = fma(Vec::load(values + index + probe * Vec::kWidth), nothing, probes[probe]);
  for (; index + Vec::kWidth <= count; index += Vec::kWidth)
    probes[0] = fma(Vec::load(values + index), nothing, probes[0]);
  float total = sum_of_lanes((probes[0] + probes[1]) + (probes[2] + probes[3]));
  for (; index < count; ++index) total += values[index] * 0.0f;
  return total == 0.0f;
}

SIGHTLINE_INLINE bool is_zero(const float* values, int64_t count) {
  for (int64_t index = 0; index < count; ++index)
    if (values[index] != 0.0f) return false;
  return true;
}

// A factor of 0 forgets the row, NaN included.
SIGHTLINE_INLINE void scale_row(float* row, float factor, int64_t width) {
  if (factor == 0.0f) return zero(row, width);
  for (int64_t column = 0; column < width; column += Vec::kWidth)
    store(row + column, Vec::load(row + column) * Vec::broadcast(factor));
}

// The row divided by the sum of its weights: 0 where there is none, NaN where the sum has left fp32.
SIGHTLINE_INLINE void divide_row(float* row, double sum, int64_t width) {
  constexpr double kLeast = 0x1p-126;  // what is smaller counts as 0
  double factor = sum == 0.0 ? 0.0 : sum == INFINITY ? NAN : 1.0 / sum;
  if (factor > 0.0 && factor < kLeast) {
    scale_row(row, 0x1p-64f, width);
    factor *= 0x1p64;
  }
  scale_row(row, static_cast<float>(factor), width);
}

SIGHTLINE_INLINE float inverse_of_norm(const float* values, int64_t count, bool* floored = nullptr) {
  const float norm = std::sqrt(dot(values, values, count));
  const bool below = norm < core::kNormFloor;  // false for NaN, which must stay
  if (floored != nullptr) *floored = below;
  return 1.0f / (below ? core::kNormFloor : norm);
}

}  // namespace sightline::SIGHTLINE_ISA_NS
