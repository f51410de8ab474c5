// The two small kernels around decode_split.h: one adds up what the splits found for a row and writes its output, the
// other counts the visible keys of a row where key_mask thins them out.
#pragma once

#include "cuda/decode_rows.h"
#include "cuda/element.h"

namespace sightline::cuda {

// Grid: x packed rows.
template <class T>
struct MergeSplits {
  static constexpr int kBlockThreads = kThreads;
  static constexpr int kBlocksPerProcessor = 1;
  struct Shared {};

  SIGHTLINE_DEVICE void run(const DecodeProblem& problem, Shared&) {
    const AttentionProblem& attention = problem.attention;
    const WeightFunction function = attention.weight_function;
    const int64_t row = block_x(), rows = group_rows(attention);
    const int64_t batch = row / (attention.heads * attention.queries);
    const int64_t key_head = row / rows % attention.key_heads, rho = row % rows;
    const int64_t head = key_head * (attention.heads / attention.key_heads) + rho / attention.queries;
    const int64_t query = rho % attention.queries;

    const float sink = attention.sinks != nullptr ? attention.sinks[head] : -INFINITY;
    const RowTotal normalizer =
        total_of_splits(problem.row_partials + row * problem.splits, problem.splits, function, sink);
    const bool reweights = attention.reweight.power > 0.0f;
    const RowPartial* partials = (reweights ? problem.weight_partials : problem.row_partials) + row * problem.splits;
    const RowTotal total = reweights ? total_of_splits(partials, problem.splits, function, -INFINITY) : normalizer;
    const float divisor = T::kBytes == 2 ? total.divisor : core::total_of(total.weights);

    const float* values = problem.value_partials + row * problem.splits * attention.value_width;
    auto* output = static_cast<typename T::Bits*>(attention.output.data) + batch * attention.output.batch_stride +
                   head * attention.output.head_stride + query * attention.output.row_stride;
    for (int64_t column = thread_index(); column < attention.value_width; column += kThreads) {
      float sum = 0.0f;
      for (int64_t split = 0; split < problem.splits; ++split) {
        // A split without weight has not written its values.
        if (partials[split].weights == 0.0f) continue;
        const float before = reference_of(function, partials[split].largest);
        sum += rescaled(values[split * attention.value_width + column],
                        change_of_reference(function, before, total.reference));
      }
      output[column] = T::narrow(divisor == 0.0f ? 0.0f : sum / divisor);
    }
    if (thread_index() != 0) return;
    const float weights = core::total_of(normalizer.weights);
    attention.log_normalizer[(batch * attention.heads + head) * attention.queries + query] =
        weights == 0.0f ? -INFINITY : log_of_unit(function, normalizer.reference) + logf(weights);
  }
};

// Grid: x queries, y batch.
struct CountVisibleKeys {
  static constexpr int kBlockThreads = kThreads;
  static constexpr int kBlocksPerProcessor = 1;
  struct Shared {
    int32_t counts[kWarps];
  };

  SIGHTLINE_DEVICE void run(const DecodeProblem& problem, Shared& shared) {
    const AttentionProblem& attention = problem.attention;
    const int64_t query = block_x(), batch = block_y();
    const core::KeyInterval interval = row_interval(problem, batch, query);
    const uint8_t* mask = attention.key_mask + batch * attention.key_mask_strides[0];
    int32_t count = 0;
    for (int64_t key = interval.first + thread_index(); key <= interval.last; key += kThreads)
      count += mask[key * attention.key_mask_strides[1]] != 0;
    for (int step = 1; step < kWarpThreads; step *= 2) count += shuffle_xor(count, step);
    if (thread_index() % kWarpThreads == 0) shared.counts[thread_index() / kWarpThreads] = count;
    sync_block();
    if (thread_index() != 0) return;
    for (int warp = 1; warp < kWarps; ++warp) count += shared.counts[warp];
    problem.visible_keys[batch * attention.queries + query] = count;
  }
};

}  // namespace sightline::cuda
