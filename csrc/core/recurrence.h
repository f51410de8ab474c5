// What one call of the additive recurrence is given (MATH.md section 4): sizes, pointers with strides, options. Plain
// data, no torch. Strides count elements; symbols as in problem.h, with Dk and Dv the widths of key and value.
#pragma once

#include "core/problem.h"

namespace sightline {

struct RecurrenceProblem {
  int64_t batch = 0, heads = 0, key_heads = 0, length = 0, key_width = 0, value_width = 0;
  DType dtype = DType::kFloat32;
  HeadsView query, key, value, output;
  HeadsView key_gain;  // data null: none
  DType gain_dtype = DType::kFloat32;

  const uint8_t* key_mask = nullptr;  // (B,N) with these strides
  int64_t key_mask_strides[2] = {0, 0};
  const int64_t* cuts = nullptr;  // (documents + 1,), ascending within [0, N]; null: every batch entry is a sequence
  int64_t documents = 0;

  bool causal = true;
  float scale = 1.0f;

  // One state per sequence, contiguous fp32: (sequences,Hk,Dk) and (sequences,Hk,Dk,Dv). Null: none given, none wanted.
  const float* initial_log_normalizer = nullptr;
  const float* initial_memory = nullptr;
  float* final_log_normalizer = nullptr;
  float* final_memory = nullptr;

  int64_t sequences() const { return cuts == nullptr ? batch : documents; }
};

// Backward reads the problem (not its output and final state) and these.
struct RecurrenceGradients {
  HeadsView grad_output;
  const float* grad_log_normalizer = nullptr;  // of the final state, contiguous; null: zero
  const float* grad_memory = nullptr;
  HeadsView grad_query, grad_key, grad_value;    // written, in the query's dtype
  HeadsView grad_gain;                           // written, in the gain's dtype; data null: not wanted
  float* grad_initial_log_normalizer = nullptr;  // written, contiguous; null: not wanted
  float* grad_initial_memory = nullptr;
};

}  // namespace sightline
