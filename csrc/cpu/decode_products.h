// The two products of decoding: a few query rows with many keys, and their weights with the values.
//
// Keys and values are read once, row by row as they lie, as vectors along their width: with one to eight query rows
// there are not enough lanes for the layout of product.h, whose lanes are rows. Numbers of 16 bits are widened in
// registers. bfloat16 comes apart into even and odd columns for free, so queries and sums keep that order (see
// `arranged_place`). Where a machine multiplies pairs of bfloat16, queries and keys are pairs as they lie, which takes
// half of the multiplications and no widening; values would have to be put into pairs of keys, and their weights be
// rounded.
#pragma once

#include <type_traits>

#include "cpu/row_math.h"
#include "cpu/tile_shapes.h"
#include "cpu/vec_pairs.h"

namespace sightline::SIGHTLINE_ISA_NS {

// Rows of numbers of one dtype whose width is a multiple of kColumnGroup.
struct WideRows {
  const void* data;
  int64_t row_stride;
  int64_t width;
};

template <DType kType>
constexpr int64_t kBytesOf = kType == DType::kFloat32 ? 4 : 2;

// Products of queries and keys are those of pairs.
template <DType kType>
constexpr bool kByPairs = kHasPairProducts && kType == DType::kBFloat16;

// What queries are held as: with pairs as they are, otherwise fp32 in the order of arranged_place.
template <DType kType>
using QueryNumber = std::conditional_t<kByPairs<kType>, uint16_t, float>;

template <DType kType>
SIGHTLINE_INLINE const void* row_of(const WideRows& rows, int64_t row) {
  return static_cast<const char*>(rows.data) + row * rows.row_stride * kBytesOf<kType>;
}

SIGHTLINE_INLINE void ask_for(const void* start, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(static_cast<const char*>(start) + byte, 0, 2);
}

// The rows of a unit that add_values does not ask for itself, because it would be too late: the first of them. To be
// asked for, a row at a time, while something else is computed.
class RowsAhead {
 public:
  RowsAhead(const WideRows& rows, int64_t element_bytes, int64_t count)
      : next_(static_cast<const char*>(rows.data)),
        stride_(rows.row_stride * element_bytes),
        bytes_(rows.width * element_bytes),
        count_(core::smaller(count, kValueBytesAhead / bytes_)) {}

  __attribute__((always_inline)) inline void ask() {
    if (count_ == 0) return;
    ask_for(next_, bytes_);
    next_ += stride_;
    count_ -= 1;
  }

 private:
  const char* next_;
  int64_t stride_, bytes_, count_;
};

template <DType kType>
SIGHTLINE_INLINE void load_group(const void* row, int64_t column, Vec& first, Vec& second) {
  if constexpr (kType == DType::kFloat32) {
    const float* from = static_cast<const float*>(row) + column;
    first = Vec::load(from);
    second = Vec::load(from + Vec::kWidth);
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(row) + column;
    if constexpr (kType == DType::kFloat16) {
      first = load_float16(from);
      second = load_float16(from + Vec::kWidth);
    } else {
      load_bfloat16_pairs(from, first, second);
    }
  }
}

// Where a column stands in the order in which load_group gives columns of this dtype.
SIGHTLINE_INLINE int64_t arranged_place(DType type, int64_t column) {
  if (type != DType::kBFloat16) return column;
  const int64_t within = column % kColumnGroup;
  return column - within + within / 2 + within % 2 * Vec::kWidth;
}

// products[r * stride + j] = <queries[r], row j of keys> for kRows rows and kWidth keys; with kNorms the squares of the
// keys' norms instead. Rows of `keys` past `count` are taken to be the last one.
template <DType kType, int kRows, bool kNorms>
SIGHTLINE_INLINE void key_products_of_rows(const WideRows& keys, int64_t first, int64_t count,
                                           const QueryNumber<kType>* queries, int64_t query_stride, float* products,
                                           int64_t stride) {
  constexpr int kKeys = Vec::kWidth / (kRows == 3 ? 4 : kRows);
  for (int64_t start = first; start < first + Vec::kWidth; start += kKeys) {
    const void* rows[kKeys];
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) rows[j] = row_of<kType>(keys, core::smaller(start + j, count - 1));
    Vec sums[Vec::kWidth];
#pragma GCC unroll 16
    for (int sum = 0; sum < Vec::kWidth; ++sum) sums[sum] = Vec::broadcast(0.0f);
    for (int64_t column = 0; column < keys.width; column += kColumnGroup) {
#pragma GCC unroll 16
      for (int j = 0; j < kKeys; ++j) {
        if (!kNorms)
          ask_for(static_cast<const char*>(rows[j]) + column * kBytesOf<kType> + kKeyBytesAhead,
                  kColumnGroup * kBytesOf<kType>);
        if constexpr (kByPairs<kType>) {
          const Pairs key = load_pairs(static_cast<const uint16_t*>(rows[j]) + column);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            const Pairs query = kNorms ? key : load_pairs(queries + r * query_stride + column);
            sums[r * kKeys + j] = add_products(sums[r * kKeys + j], query, key);
          }
        } else {
          Vec key[2];
          load_group<kType>(rows[j], column, key[0], key[1]);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
              const Vec query =
                  kNorms ? key[half] : Vec::load(queries + r * query_stride + column + half * Vec::kWidth);
              sums[r * kKeys + j] = fma(query, key[half], sums[r * kKeys + j]);
            }
        }
      }
    }
    alignas(64) float totals[Vec::kWidth];
    store(totals, sums_of_lanes(sums));
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
      __builtin_memcpy(products + r * stride + start, totals + r * kKeys, kKeys * sizeof(float));
  }
}

// All rows with keys [0, count), and with `norms` the squares of the keys' norms. Products are written up to the next
// whole vector.
template <DType kType>
static void key_products(const WideRows& keys, int64_t count, const QueryNumber<kType>* queries, int64_t query_stride,
                         int rows, float* products, int64_t stride, float* norms) {
  for (int64_t first = 0; first < count; first += Vec::kWidth) {
    for (int row = 0; row < rows; row += kRowGroup) {
      const QueryNumber<kType>* from = queries + row * query_stride;
      float* to = products + row * stride;
      switch (rows - row) {
        case 1:
          key_products_of_rows<kType, 1, false>(keys, first, count, from, query_stride, to, stride);
          break;
        case 2:
          key_products_of_rows<kType, 2, false>(keys, first, count, from, query_stride, to, stride);
          break;
        case 3:
          key_products_of_rows<kType, 3, false>(keys, first, count, from, query_stride, to, stride);
          break;
        default:
          key_products_of_rows<kType, 4, false>(keys, first, count, from, query_stride, to, stride);
          break;
      }
    }
    if (norms != nullptr) key_products_of_rows<kType, 1, true>(keys, first, count, nullptr, 0, norms, 0);
  }
}

// sums[r] += sum_j weights[r * stride + j] values[j] over keys [first, last) and kVectors vectors of columns. With
// kSkipZeros a weight of 0 selects nothing, so that 0 * NaN does not reach the sums.
template <DType kType, int kRows, int kVectors, bool kSkipZeros>
SIGHTLINE_INLINE void add_values_of_columns(const WideRows& values, int64_t first, int64_t last, int64_t column,
                                            int64_t ahead, const float* weights, int64_t stride, float* sums,
                                            int64_t sum_stride) {
  Vec totals[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int vector = 0; vector < kVectors; ++vector) totals[r][vector] = Vec::broadcast(0.0f);
  for (int64_t j = first; j < last; ++j) {
    const void* row = row_of<kType>(values, j);
    if (ahead > 0)
      ask_for(static_cast<const char*>(row_of<kType>(values, j + ahead)) + column * kBytesOf<kType>,
              kVectors * Vec::kWidth * kBytesOf<kType>);
    if (kSkipZeros && weights[j] == 0.0f) continue;
    Vec value[kVectors];
#pragma GCC unroll 8
    for (int vector = 0; vector < kVectors; vector += 2)
      load_group<kType>(row, column + vector * Vec::kWidth, value[vector], value[vector + 1]);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = Vec::broadcast(weights[r * stride + j]);
#pragma GCC unroll 16
      for (int vector = 0; vector < kVectors; ++vector)
        totals[r][vector] = fma(weight, value[vector], totals[r][vector]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int vector = 0; vector < kVectors; ++vector) {
      float* sum = sums + r * sum_stride + column + vector * Vec::kWidth;
      store(sum, Vec::load(sum) + totals[r][vector]);
    }
}

template <DType kType, int kRows, bool kSkipZeros>
static void add_values_of_rows(const WideRows& values, int64_t first, int64_t last, int64_t ahead, const float* weights,
                               int64_t stride, float* sums, int64_t sum_stride) {
  constexpr int kVectors = kRows == 1 ? 8 : kValueSums / (kRows == 3 ? 4 : kRows);
  int64_t column = 0;
  for (; column + kVectors * Vec::kWidth <= values.width; column += kVectors * Vec::kWidth)
    add_values_of_columns<kType, kRows, kVectors, kSkipZeros>(values, first, last, column, ahead, weights, stride, sums,
                                                              sum_stride);
  for (; column < values.width; column += kColumnGroup)
    add_values_of_columns<kType, kRows, 2, kSkipZeros>(values, first, last, column, ahead, weights, stride, sums,
                                                       sum_stride);
}

// sums (rows, width) += weights (rows, count) values (count, width). Sums of kValueTile keys are formed apart and added
// up.
template <DType kType>
static void add_values(const WideRows& values, int64_t count, const float* weights, int64_t stride, int rows,
                       bool finite, float* sums, int64_t sum_stride) {
  for (int64_t first = 0; first < count; first += kValueTile) {
    const int64_t last = core::smaller(first + kValueTile, count);
    const int64_t rows_ahead = kValueBytesAhead / (values.width * kBytesOf<kType>);
    const int64_t ahead = last + rows_ahead <= count ? rows_ahead : 0;
    for (int row = 0; row < rows;) {
      const float* from = weights + row * stride;
      float* to = sums + row * sum_stride;
      if (!finite) {
        add_values_of_rows<kType, 1, true>(values, first, last, ahead, from, stride, to, sum_stride);
        row += 1;
        continue;
      }
      switch (rows - row) {
        case 1:
          add_values_of_rows<kType, 1, false>(values, first, last, ahead, from, stride, to, sum_stride);
          break;
        case 2:
          add_values_of_rows<kType, 2, false>(values, first, last, ahead, from, stride, to, sum_stride);
          break;
        case 3:
          add_values_of_rows<kType, 3, false>(values, first, last, ahead, from, stride, to, sum_stride);
          break;
        default:
          add_values_of_rows<kType, 4, false>(values, first, last, ahead, from, stride, to, sum_stride);
          break;
      }
      row += kRowGroup;
    }
  }
}

}  // namespace sightline::SIGHTLINE_ISA_NS
