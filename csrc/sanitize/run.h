// What the parts of the program share.
#pragma once

#include <cstdint>
#include <random>
#include <string>

#include "cpu/kernel_table.h"

namespace sightline::sanitize {

struct Run {
  const KernelTable& kernels;
  int cases;
  std::mt19937& random;

  bool chance(double probability) const { return std::bernoulli_distribution(probability)(random); }
  int64_t between(int64_t least, int64_t most) const {
    return std::uniform_int_distribution<int64_t>(least, most)(random);
  }
};

// Said when a sanitizer or a check ends the program.
void describe_case(const std::string& description);

template <class Case>
void run_both_ways(Case&& one) {
  describe_case(one.description());
  one.run_forward();
  one.run_backward();
}

// Threads of the program's own.
Parallel own_threads(int count);

void run_attention(const Run& run);
// Attention on more than there is memory for ("keys", "queries", "widths") or than numbers can count ("overflow"): a
// build in which this goes unnoticed checks nothing.
void break_attention(const Run& run, const std::string& how);
void run_recurrence(const Run& run);
void run_elementwise(const Run& run);

}  // namespace sightline::sanitize
