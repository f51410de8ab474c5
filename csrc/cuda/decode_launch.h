// Which kernels decoding launches, in which order, for one element type. Shared by the launches on a GPU and by their
// emulation, which a Launcher tells apart: launcher.template launch<Kernel>(x, y, z, problem).
#pragma once

#include "cuda/decode_split.h"
#include "cuda/merge_splits.h"

namespace sightline::cuda {

template <class T, int kWidth, bool kVector, class Launcher>
void launch_splits(const DecodeProblem& problem, Launcher& launcher) {
  const AttentionProblem& attention = problem.attention;
  const int64_t y = attention.key_heads * row_blocks(attention), z = attention.batch;
  if (attention.reweight.power > 0.0f) {
    launcher.template launch<DecodeSplit<T, kWidth, kVector, Sweep::kScores>>(problem.splits, y, z, problem);
    launcher.template launch<DecodeSplit<T, kWidth, kVector, Sweep::kWeights>>(problem.splits, y, z, problem);
  } else {
    launcher.template launch<DecodeSplit<T, kWidth, kVector, Sweep::kWhole>>(problem.splits, y, z, problem);
  }
}

template <class T, class Launcher>
void launch_decode(const DecodeProblem& problem, Launcher& launcher) {
  const AttentionProblem& attention = problem.attention;
  if (packed_rows(attention) == 0) return;
  if (problem.visible_keys != nullptr)
    launcher.template launch<CountVisibleKeys>(attention.queries, attention.batch, 1, problem);
  const int64_t width = kernel_width(problem);
  if (!problem.vectorized)
    launch_splits<T, kWidestHead, false>(problem, launcher);
  else if (width == 64)
    launch_splits<T, 64, true>(problem, launcher);
  else if (width == 128)
    launch_splits<T, 128, true>(problem, launcher);
  else
    launch_splits<T, kWidestHead, true>(problem, launcher);
  launcher.template launch<MergeSplits<T>>(packed_rows(attention), 1, 1, problem);
}

}  // namespace sightline::cuda
