// A sum of floats with the rounding error of every addition kept beside it: as good as fp64 on a machine where fp64 is
// slow. Row sums run over up to millions of keys, and section 2 of MATH.md subtracts their mean.
#pragma once

#include "core/macros.h"

namespace sightline::core {

struct CompensatedSum {
  float sum;
  float rest;
};

// Knuth's two-sum: sum + rest is exact before the new error joins the old ones.
SIGHTLINE_INLINE void add(CompensatedSum& total, float x) {
  const float sum = total.sum + x;
  const float added = sum - total.sum;
  total.rest += (total.sum - (sum - added)) + (x - added);
  total.sum = sum;
}

SIGHTLINE_INLINE void add(CompensatedSum& total, const CompensatedSum& other) {
  add(total, other.sum);
  total.rest += other.rest;
}

SIGHTLINE_INLINE CompensatedSum scaled(const CompensatedSum& total, float factor) {
  return {total.sum * factor, total.rest * factor};
}

// Infinity minus infinity makes the error term NaN; the sum itself is then the whole answer.
SIGHTLINE_INLINE float total_of(const CompensatedSum& total) {
  return total.rest == total.rest ? total.sum + total.rest : total.sum;
}

}  // namespace sightline::core
