// The functions that every instruction set provides, and the choice among them.
#pragma once

#include <cstdint>

#include "core/problem.h"
#include "core/recurrence.h"

namespace sightline {

// Seconds that the parts of attention's forward pass have taken, and of how many (row, key) pairs.
struct AttentionParts {
  double packing = 0.0, scores = 0.0, weights = 0.0, values = 0.0;
  int64_t entries = 0;
};

struct KernelTable {
  const char* name;
  void (*attention_forward)(const AttentionProblem&, const Parallel&);
  void (*attention_backward)(const AttentionProblem&, const AttentionGradients&, const Parallel&);
  void (*recurrence_forward)(const RecurrenceProblem&, const Parallel&);
  void (*recurrence_backward)(const RecurrenceProblem&, const RecurrenceGradients&, const Parallel&);
  // One function over an array, for the accuracy sweeps of the bench module: result[i] = f(x[i]).
  void (*exp2)(const float* x, float* result, int64_t count);
  void (*log2_one_plus)(const float* x, float* result, int64_t count);
  void (*exp2_short)(const float* x, float* result, int64_t count);
  void (*log2_one_plus_short)(const float* x, float* result, int64_t count);
  void (*tanh)(const float* x, float* result, int64_t count);
  void (*softplus)(const float* x, float* result, float* derivative, int64_t count);
  void (*power)(const float* x, float exponent, float* result, int64_t count);
  // For the bench module too: a plain call's first unit of work part by part, operations per second of one thread, and
  // a pass over memory that does nothing but read it.
  void (*attention_parts)(const AttentionProblem&, int repetitions, AttentionParts&);
  double (*multiply_rate)(bool pairs, double seconds);
  void (*read_floats)(const float* data, int64_t count);
  // Seconds of so many turns of fused multiply-adds, alone or after four products of the tile unit (0 without one).
  double (*vector_seconds)(int64_t turns, bool after_products, double seconds);
};

// The table chosen at load: the fastest instruction set of this machine, or the one that SIGHTLINE_ISA names.
// Throws std::runtime_error when SIGHTLINE_ISA names one that is unknown or that this machine lacks.
const KernelTable& kernels();

// Tables that this machine can run, slowest first; returns how many, at most `capacity`.
int available_kernels(const KernelTable** tables, int capacity);

}  // namespace sightline
