// How a warp divides a tile of 16 rows and 16 keys, or 16 rows and 64 columns of V, among its lanes.
//
// Lane 4 g + t owns the rows g and g + 8. Of a score tile it owns the keys 8 n + 2 t + h (n, h in {0, 1}), as
// entries[n][2 r + h] for row g + 8 r: what the matrix instruction leaves in its registers, and, packed, what it takes
// as its next operand. Of a set of 64 columns it owns (2 t + h) * 8 + e, e < 8, as sums[set][e][2 r + h].
#pragma once

#include "cuda/decode_problem.h"
#include "cuda/device.h"
#include "cuda/element.h"

namespace sightline::cuda {

struct Lane {
  int warp, index, g, t;
};

SIGHTLINE_DEVICE Lane this_lane() {
  const int thread = thread_index(), index = thread % kWarpThreads;
  return {thread / kWarpThreads, index, index / 4, index % 4};
}

SIGHTLINE_DEVICE int key_in_tile(const Lane& lane, int n, int h) { return n * 8 + lane.t * 2 + h; }
SIGHTLINE_DEVICE int column_in_set(const Lane& lane, int h, int e) { return (lane.t * 2 + h) * 8 + e; }

struct ScoreTile {
  float entries[2][4];
};

// A property of the lane's four keys.
template <class Value>
struct OfKeys {
  Value of[2][2];
};

template <int kWidth>
struct ValueSums {
  static constexpr int kSets = kWidth / kWidthStep;
  float sums[kSets][8][4];
};

// K or V of one key head; keys from `end` on are not to be read.
struct HeadRows {
  const char* data;
  int64_t row_bytes;
  int32_t width, end;

  SIGHTLINE_DEVICE const char* row(const HeadRows& rows, int32_t key) { return rows.data + key * rows.row_bytes; }
};

template <class T>
SIGHTLINE_DEVICE HeadRows head_rows(const HeadsView& view, int64_t batch, int64_t head, int64_t width, int32_t end) {
  const int64_t offset = batch * view.batch_stride + head * view.head_stride;
  return {static_cast<const char*>(view.data) + offset * T::kBytes, view.row_stride * T::kBytes,
          static_cast<int32_t>(width), end};
}

// The sum over the four lanes that own the same rows.
SIGHTLINE_DEVICE float sum_over_row(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

}  // namespace sightline::cuda
