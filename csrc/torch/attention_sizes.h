// The sizes of query, key and value: what the CPU and the CUDA binding of attention check alike.
#pragma once

#include <string>

#include "core/problem.h"
#include "core/weights.h"
#include "torch/tensors.h"

namespace sightline::binding {

// Rows and keys are counted in 32 bits, tiles of up to 64 beyond the last included.
constexpr int64_t kLargestIndex = INT32_MAX - 64;

inline WeightFunction weight_function_of(int64_t number) {
  const auto name_of = [](int64_t known) {
    return core::with_weight(static_cast<WeightFunction>(known), [](auto weight) { return decltype(weight)::kName; });
  };
  if (number >= 0 && number < kWeightFunctions) return static_cast<WeightFunction>(number);
  std::string known;
  for (int64_t index = 0; index < kWeightFunctions; ++index)
    known += (index > 0 ? " or " : "") + std::to_string(index) + " (" + name_of(index) + ")";
  STD_TORCH_CHECK(false, "weight_function: expected ", known);
  return WeightFunction::kSoftmax;
}

inline void set_up_sizes(const Tensor& query, const Tensor& key, const Tensor& value, AttentionProblem& problem) {
  STD_TORCH_CHECK(key.scalar_type() == query.scalar_type() && value.scalar_type() == query.scalar_type(),
                  "key and value: expected the dtype of query");
  problem.dtype = dtype_of(query, "query");
  problem.batch = query.size(0);
  problem.heads = query.size(1);
  problem.queries = query.size(2);
  problem.head_width = query.size(3);
  problem.key_heads = key.size(1);
  problem.keys = key.size(2);
  problem.value_width = value.size(3);
  STD_TORCH_CHECK(key.size(0) == problem.batch && value.size(0) == problem.batch,
                  "key and value: expected the batch of query");
  STD_TORCH_CHECK(value.size(1) == problem.key_heads && value.size(2) == problem.keys,
                  "value: expected the heads and rows of key");
  STD_TORCH_CHECK(key.size(3) == problem.head_width, "key: expected the width of query");
  STD_TORCH_CHECK(problem.head_width > 0 && problem.value_width > 0, "query and value: expected a width of at least 1");
  STD_TORCH_CHECK(problem.key_heads > 0 && problem.heads % problem.key_heads == 0,
                  "query: expected a multiple of the key heads");
  STD_TORCH_CHECK(problem.queries <= kLargestIndex && problem.keys <= kLargestIndex,
                  "query and key: expected fewer than 2^31 rows");
  problem.query = heads_view(query);
  problem.key = heads_view(key);
  problem.value = heads_view(value);
}

}  // namespace sightline::binding
