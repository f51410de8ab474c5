// A long sequence without order, cut into segments: what they leave behind between the walks of
// recurrence_unordered_backward.h, and how it is put together, in the order of the segments.
#pragma once

#include <cstring>

#include "cpu/recurrence_unordered_backward.h"

namespace sightline::SIGHTLINE_ISA_NS {

class SegmentGradients {
 public:
  SegmentGradients(const BackwardPlan& plan, int64_t units)
      : width_(plan.problem->key_width),
        stride_(padded(plan.problem->key_width)),
        value_stride_(padded(plan.problem->value_width)),
        bytes_(carve(nullptr).bytes),
        memory_(bytes_ * units) {}

  void put_state(int64_t index, const BackwardScratch& scratch) const {
    const Slot slot = at(index);
    slot.normalizer.copy_from(scratch.normalizer, width_);
    std::memcpy(slot.state, scratch.transposed_state, size());
  }
  void get_state(int64_t index, BackwardScratch& scratch) const {
    const Slot slot = at(index);
    scratch.normalizer.copy_from(slot.normalizer, width_);
    std::memcpy(scratch.transposed_state, slot.state, size());
  }
  void put_gradient(int64_t index, const BackwardScratch& scratch) const {
    const Slot slot = at(index);
    std::memcpy(slot.gradient, scratch.state_gradient, size());
    std::memcpy(slot.response, scratch.key_response, static_cast<size_t>(stride_) * sizeof(double));
  }
  void get_gradient(int64_t index, BackwardScratch& scratch) const {
    const Slot slot = at(index);
    scratch.normalizer.copy_from(slot.normalizer, width_);
    std::memcpy(scratch.state_gradient, slot.gradient, size());
    std::memcpy(scratch.key_response, slot.response, static_cast<size_t>(stride_) * sizeof(double));
  }

  // The state after the rows of both, in place of the first.
  void merge_states(int64_t into, int64_t from) const {
    const Slot all = at(into), more = at(from);
    for (int64_t d = 0; d < stride_; ++d) {
      const Merge merge = merge_channel(all.normalizer, more.normalizer, d);
      all.kept[d] = merge.kept;
      all.added[d] = merge.added;
    }
    for (int64_t c = 0; c < value_stride_; ++c)
      for (int64_t d = 0; d < stride_; d += Vec::kWidth) {
        float* entry = all.state + c * stride_ + d;
        const Vec kept = Vec::load(all.kept + d), added = Vec::load(all.added + d), nothing = Vec::broadcast(0.0f);
        // A factor of 0 forgets what was, NaN included.
        const Vec before = select(equal(kept, nothing), nothing, Vec::load(entry) * kept);
        const Vec other = Vec::load(more.state + c * stride_ + d);
        store(entry, select(equal(added, nothing), before, fma(added, other, before)));
      }
  }
  void add_gradient(int64_t index, BackwardScratch& scratch) const {
    const float* gradient = at(index).gradient;
    for (int64_t entry = 0; entry < stride_ * value_stride_; entry += Vec::kWidth)
      store(scratch.state_gradient + entry, Vec::load(scratch.state_gradient + entry) + Vec::load(gradient + entry));
  }

 private:
  struct Slot {
    Normalizer normalizer;
    float *kept, *added;  // what merging multiplies the channels with
    float* state;         // transposed, (padded Dv, padded Dk)
    float* gradient;      // (padded Dk, padded Dv): the sum of q do^T, at last G
    double* response;     // r
    int64_t bytes;
  };
  Slot carve(char* start) const {
    Arena arena(start);
    Slot slot{{arena.take<float>(stride_), arena.take<double>(stride_)},
              arena.take<float>(stride_),
              arena.take<float>(stride_),
              arena.take<float>(stride_ * value_stride_),
              arena.take<float>(stride_ * value_stride_),
              arena.take<double>(stride_),
              0};
    slot.bytes = arena.used();
    return slot;
  }
  Slot at(int64_t index) const { return carve(memory_.get() + index * bytes_); }
  size_t size() const { return static_cast<size_t>(stride_ * value_stride_) * sizeof(float); }

  int64_t width_, stride_, value_stride_, bytes_;
  Allocation memory_;
};

}  // namespace sightline::SIGHTLINE_ISA_NS
