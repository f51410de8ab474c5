// A long sequence in order with more threads than heads: windows of chunks, each in phases that all threads share.
//
// The weights of a window's keys, by blocks of channels; the state before each of its chunks, by blocks of channels;
// then whatever reads those, chunk by chunk. Nothing is computed twice, and every number as one thread computes it, so
// that neither the number of threads nor the size of a window changes a bit. Only where a chunk ends is found by every
// thread for itself, because that takes the keys of all channels.
#pragma once

#include "cpu/recurrence_chunk.h"

namespace sightline::SIGHTLINE_ISA_NS {

// Channels in blocks of whole tiles, one for each thread where there are enough.
struct ChannelBlocks {
  int64_t stride, size, count;

  ChannelBlocks(int64_t all, int threads)
      : stride(all), size(core::round_up((all + threads - 1) / threads, 32)), count((all + size - 1) / size) {}
  Channels channels(int64_t index) const { return {index * size, core::smaller(stride, (index + 1) * size)}; }
};

// Whether heads are too few for the threads, and long enough for windows. Heads go through windows one after the other,
// a third of their work by blocks of channels and the rest by chunks; `most` is the share of the time of one thread up
// to which that pays.
[[maybe_unused]] static bool suits_windows(const RecurrenceProblem& problem, int threads, double most) {
  const int64_t heads = problem.sequences() * problem.key_heads;
  if (!problem.causal || heads == 0 || heads >= threads) return false;
  const auto blocks = static_cast<double>(ChannelBlocks(padded(problem.key_width), threads).count);
  const double share = (1.0 / blocks + 2.0 / core::smaller(threads, kLargestWindow)) / 3.0;
  if (static_cast<double>(heads) * share > most) return false;
  return problem.length >= kLeastWindowRows * (problem.cuts == nullptr ? 1 : problem.documents);
}

// Scratch memory of every thread, made once for many short phases. A thread's tile unit is its own in every phase.
template <class Scratch>
class ScratchPool {
 public:
  // Memory first and alone: where a scratch cannot be made, those before it are destroyed.
  template <class Plan>
  ScratchPool(const Plan& plan, int threads) : ScratchPool(plan.parts.factors > 0, static_cast<int64_t>(threads)) {
    for (; made_ < threads; ++made_) new (at(made_)) Scratch(plan);
  }
  ~ScratchPool() {
    for (int index = 0; index < made_; ++index) at(index)->~Scratch();
  }
  ScratchPool(const ScratchPool&) = delete;
  ScratchPool& operator=(const ScratchPool&) = delete;

  template <class Unit>
  void for_each(const Parallel& parallel, int64_t count, Unit unit) {
    taken_ = 0;
    for_each_unit<Lease>(parallel, count, *this, [&unit](int64_t index, Lease& lease) { unit(index, *lease.scratch); });
  }

 private:
  ScratchPool(bool wants_tiles, int64_t threads)
      : wants_tiles_(wants_tiles), memory_(static_cast<int64_t>(sizeof(Scratch)) * threads) {}

  struct Lease {
    TileUnit tile_unit;
    Scratch* scratch;
    explicit Lease(const ScratchPool& pool)
        : tile_unit(pool.wants_tiles_), scratch(pool.at(__atomic_fetch_add(&pool.taken_, 1, __ATOMIC_RELAXED))) {}
  };
  Scratch* at(int index) const { return reinterpret_cast<Scratch*>(memory_.get()) + index; }

  bool wants_tiles_;
  int made_ = 0;
  mutable int taken_ = 0;
  Allocation memory_;
};

struct Window {
  int capacity;   // chunks
  int count;      // of them in use
  int64_t first;  // row
  int64_t end;    // one past the last row
  KeyChunk chunks[kLargestWindow];
  Normalizer starts[kLargestWindow];  // before each chunk, in its unit
  Normalizer before, after;           // the window

  Window(const RecurrenceProblem& problem, int64_t state_size, int threads)
      : capacity(static_cast<int>(
            core::smaller(kLargestWindow, core::larger(kLeastWindow, 2 * static_cast<int64_t>(threads))))),
        width_(problem.key_width),
        state_size_(state_size),
        memory_(carve(problem, nullptr)) {
    carve(problem, memory_.get());
  }
  // The state before a chunk; on the way back G after it, with r.
  float* state_before(int64_t index) const { return states_ + index * state_size_; }
  double* response(int64_t index) const { return responses_ + index * padded(width_); }
  void begin_at(int64_t row) {
    first = row;
    before.copy_from(after, width_);
  }

 private:
  int64_t carve(const RecurrenceProblem& problem, char* start) {
    Arena arena(start);
    const int64_t stride = padded(problem.key_width);
    for (int index = 0; index < capacity; ++index) {
      chunks[index].carve(arena, problem);
      starts[index] = {arena.take<float>(stride), arena.take<double>(stride)};
    }
    before = {arena.take<float>(stride), arena.take<double>(stride)};
    after = {arena.take<float>(stride), arena.take<double>(stride)};
    states_ = arena.take<float>(capacity * state_size_);
    responses_ = arena.take<double>(capacity * stride);
    return arena.used();
  }

  int64_t width_, state_size_;
  float* states_;
  double* responses_;
  Allocation memory_;
};

// The chunks of the window, with the weights of these channels; through a thread's own `scratch` and `normalizer`.
// Calls then(index, chunk) after each, where the chunk has its weights in these channels alone.
template <class Then>
static void weigh_window(const RecurrenceProblem& problem, const Sequence& sequence, int64_t key_head,
                         Channels channels, const KeyChunk& scratch, const Normalizer& normalizer, Window& window,
                         Then then) {
  normalizer.copy_from(window.before, problem.key_width);
  int64_t first = window.first;
  int count = 0;
  for (; count < window.capacity && first < sequence.end; ++count) {
    // Where keys and factors of all channels go; what is kept of these channels goes to the window.
    KeyChunk chunk = scratch;
    KeyChunk& kept = window.chunks[count];
    chunk.weights = kept.weights, chunk.gained = kept.gained, chunk.inverse = kept.inverse;
    load_keys(problem, sequence.batch, key_head, first,
              static_cast<int>(core::smaller(kChunkRows, sequence.end - first)), chunk);
    const bool lifted = lift_and_cut(chunk, normalizer);
    for (int64_t d = channels.begin; d < channels.end; ++d) {
      kept.factors[d] = lifted ? chunk.factors[d] : 1.0f;
      window.starts[count].shift[d] = normalizer.shift[d];
      window.starts[count].sum[d] = normalizer.sum[d];
    }
    weigh_keys<true>(problem, sequence.batch, key_head, chunk, normalizer, channels);
    if (channels.begin == 0) {
      kept.first = first;
      kept.rows = chunk.rows;
      for (int row = 0; row < chunk.rows; ++row) kept.takes_part[row] = chunk.takes_part[row];
    }
    chunk.keys = kept.keys, chunk.factors = kept.factors;
    then(count, chunk);
    first += chunk.rows;
  }
  for (int64_t d = channels.begin; d < channels.end; ++d) {
    window.after.shift[d] = normalizer.shift[d];
    window.after.sum[d] = normalizer.sum[d];
  }
  if (channels.begin == 0) {
    window.count = count;
    window.end = first;
  }
}

// The weights of these channels once more, of chunks that are known.
[[maybe_unused]] static void weigh_window_again(const RecurrenceProblem& problem, int64_t batch, int64_t key_head,
                                                Channels channels, const KeyChunk& scratch, Window& window) {
  for (int index = 0; index < window.count; ++index) {
    KeyChunk chunk = scratch;
    KeyChunk& kept = window.chunks[index];
    chunk.weights = kept.weights, chunk.gained = kept.gained, chunk.inverse = kept.inverse;
    load_keys(problem, batch, key_head, kept.first, kept.rows, chunk);
    weigh_keys<true>(problem, batch, key_head, chunk, window.starts[index], channels);
    if (channels.begin == 0)
      for (int row = 0; row < chunk.rows; ++row) kept.takes_part[row] = chunk.takes_part[row];
  }
}

}  // namespace sightline::SIGHTLINE_ISA_NS
