// The host's side of decoding: how many splits, and how much memory.
#pragma once

#include "cuda/decode_problem.h"

namespace sightline::cuda {

// All blocks are to run at once: one more than the machine holds would start when the others end, and take as long
// again. Fewer splits lengthen the sums of one warp: fp32 sums stay accurate to the dtype over this many keys.
constexpr int64_t kFewestKeysPerSplit = kWarps * kKeyTile * 2;
constexpr int64_t kMostKeysPerWarp16Bit = 8192;
constexpr int64_t kMostKeysPerWarpFloat32 = 2048;

inline int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

inline int64_t choose_splits(const DecodeProblem& decoding, int64_t processors) {
  const AttentionProblem& problem = decoding.attention;
  int64_t span = problem.keys;  // what the rows of a block can see at most
  const int64_t right = problem.causal ? 0 : problem.window_right;
  if (problem.window_left >= 0 && right >= 0) span = core::smaller(span, problem.window_left + right + problem.queries);
  const bool is_float32 = problem.dtype == DType::kFloat32;
  const int64_t longest = kWarps * (is_float32 ? kMostKeysPerWarpFloat32 : kMostKeysPerWarp16Bit);
  const int64_t fewest = core::larger(divide_up(span, longest), 1);
  const int64_t most = core::larger(divide_up(span, kFewestKeysPerSplit), 1);
  const int64_t blocks = core::larger(problem.batch * problem.key_heads * row_blocks(problem), 1);
  const int64_t wanted = processors * blocks_per_processor(is_float32, kernel_width(decoding)) / blocks;
  return core::larger(fewest, core::smaller(wanted, most));
}

inline bool is_aligned(const HeadsView& view, int64_t width, int64_t element_bytes) {
  const auto whole = [&](int64_t elements) { return elements * element_bytes % 16 == 0; };
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && whole(view.batch_stride) && whole(view.head_stride) &&
         whole(view.row_stride) && whole(width);
}

// Sets everything but the pointers into the workspace; `splits` 0: as many as suit the machine.
inline void plan_decode(DecodeProblem& problem, int64_t processors, int64_t splits) {
  const AttentionProblem& attention = problem.attention;
  const int64_t bytes = attention.dtype == DType::kFloat32 ? 4 : 2;
  problem.vectorized = is_aligned(attention.key, attention.head_width, bytes) &&
                       is_aligned(attention.value, attention.value_width, bytes);
  problem.splits = splits > 0 ? splits : choose_splits(problem, processors);
}

// Cuts the workspace into its arrays and returns its size; with a null base only the size.
inline int64_t lay_out_workspace(DecodeProblem& problem, char* base) {
  const AttentionProblem& attention = problem.attention;
  const bool reweights = attention.reweight.power > 0.0f;
  const int64_t rows = packed_rows(attention);
  int64_t used = 0;
  const auto take = [&](int64_t bytes) -> char* {
    char* start = base == nullptr || bytes == 0 ? nullptr : base + used;
    used += core::round_up(bytes, 256);
    return start;
  };
  constexpr auto kPartialBytes = static_cast<int64_t>(sizeof(RowPartial));
  problem.row_partials = reinterpret_cast<RowPartial*>(take(rows * problem.splits * kPartialBytes));
  problem.weight_partials = reinterpret_cast<RowPartial*>(take(reweights ? rows * problem.splits * kPartialBytes : 0));
  problem.value_partials = reinterpret_cast<float*>(take(rows * problem.splits * attention.value_width * 4));
  problem.scores = reinterpret_cast<float*>(take(reweights ? rows * score_stride(attention) * 4 : 0));
  const bool counts = attention.key_mask != nullptr && counts_keys(attention);
  problem.visible_keys = reinterpret_cast<int32_t*>(take(counts ? attention.batch * attention.queries * 4 : 0));
  return used;
}

}  // namespace sightline::cuda
