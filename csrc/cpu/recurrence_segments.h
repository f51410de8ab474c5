// The states that the segments of a sequence leave, where they are gathered apart and merged.
#pragma once

#include <cstring>

#include "cpu/recurrence_unit.h"

namespace sightline::SIGHTLINE_ISA_NS {

class SegmentStates {
 public:
  SegmentStates(const Plan& plan, int64_t columns)
      : width_(plan.problem->key_width),
        rows_(padded(plan.problem->key_width)),
        state_size_(rows_ * state_stride(plan.block)),
        bytes_(carve(nullptr).bytes),
        memory_(bytes_ * columns * plan.segments.count) {}

  void put(int64_t index, const ForwardScratch& scratch, int64_t stride) const {
    const Slot slot = carve(memory_.get() + index * bytes_);
    slot.normalizer.copy_from(scratch.normalizer, width_);
    std::memcpy(slot.state, scratch.state, bytes_of(stride));
  }
  void get(int64_t index, int64_t stride, ForwardScratch& scratch) const {
    const Slot slot = carve(memory_.get() + index * bytes_);
    scratch.normalizer.copy_from(slot.normalizer, width_);
    std::memcpy(scratch.state, slot.state, bytes_of(stride));
  }
  // The state after the rows of both, in place of the first.
  void merge(int64_t into, int64_t from, int64_t stride) const {
    const Slot all = carve(memory_.get() + into * bytes_), more = carve(memory_.get() + from * bytes_);
    for (int64_t d = 0; d < width_; ++d) {
      const Merge merge = merge_channel(all.normalizer, more.normalizer, d);
      float* row = all.state + d * stride;
      scale_row(row, merge.kept, stride);
      if (merge.added == 0.0f) continue;
      const float* others = more.state + d * stride;
      for (int64_t column = 0; column < stride; column += Vec::kWidth)
        store(row + column, fma(Vec::broadcast(merge.added), Vec::load(others + column), Vec::load(row + column)));
    }
  }

 private:
  struct Slot {
    Normalizer normalizer;
    float* state;
    int64_t bytes;
  };
  Slot carve(char* start) const {
    Arena arena(start);
    Slot slot{{arena.take<float>(rows_), arena.take<double>(rows_)}, arena.take<float>(state_size_), 0};
    slot.bytes = arena.used();
    return slot;
  }
  size_t bytes_of(int64_t stride) const { return static_cast<size_t>(rows_ * stride) * sizeof(float); }

  int64_t width_, rows_, state_size_, bytes_;
  Allocation memory_;
};

}  // namespace sightline::SIGHTLINE_ISA_NS
