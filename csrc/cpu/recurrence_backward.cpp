// The additive linear recurrence, backward (MATH.md section 4).
//
// A unit of work is one key head of one sequence. A sweep forward walks the chunks as the forward pass does, with the
// state transposed, and gives dq; a sweep back carries G and r, in the unit of the chunk that it is in, and gives dx,
// dv and the gain's gradient. No gradient of a gate is formed. Between the sweeps stand, for one segment of rows, the
// chunks' normalisers and q dq per row and channel; a longer sequence takes its segments from the last to the first,
// each from a state stored on a first walk, so that memory does not grow with the sequence but for one state per
// segment. With order, chunks of 16-bit inputs go through the tile unit where there is one
// (recurrence_split_backward.h). Without order there are three walks over the rows (recurrence_unordered_backward.h),
// each over all segments of a long sequence at once. With order a long sequence of fewer heads than threads goes
// through all of them, window by window, where that pays (recurrence_windows.h).
#include "cpu/kernel_table.h"
#include "cpu/recurrence_causal_backward.h"
#include "cpu/recurrence_gradient_segments.h"
#include "cpu/recurrence_windows.h"

namespace sightline::SIGHTLINE_ISA_NS {
namespace {

// Walks `begin` to `end` for the state alone.
void advance_state(const Head& head, int64_t begin, int64_t end, BackwardScratch& scratch) {
  KeyChunk& chunk = scratch.chunk;
  for (int64_t first = begin; first < end; first += chunk.rows) {
    open_chunk(head, first, end, scratch);
    weigh_keys<false>(head.problem, head.sequence.batch, head.key_head, chunk, scratch.normalizer);
    const bool finite = load_values(head, first, chunk.rows, scratch);
    add_chunk_to_transposed_state(head, finite, {0, chunk.stride}, scratch, next_keys_and_values(head, end, chunk));
  }
}

// The sweep forward over a segment; returns its number of chunks.
template <int kParts, int kValueParts>
int64_t sweep_forward(const Head& head, int64_t begin, int64_t end, BackwardScratch& scratch) {
  const RecurrenceProblem& problem = head.problem;
  KeyChunk& chunk = scratch.chunk;
  int64_t chunks = 0;
  for (int64_t first = begin; first < end; first += chunk.rows, ++chunks) {
    open_chunk(head, first, end, scratch);
    scratch.chunk_rows[chunks] = chunk.rows;
    scratch.chunk_start(chunks).copy_from(scratch.normalizer, problem.key_width);
    weigh_keys<true>(problem, head.sequence.batch, head.key_head, chunk, scratch.normalizer);
    const bool finite_values = load_values(head, first, chunk.rows, scratch);
    float* query_responses = scratch.query_responses + (first - begin) * chunk.stride;
    if (kParts > 0 && suits_tile_unit(scratch, finite_values)) {
      split_read_chunk_state<kParts, kValueParts>(head, first, end, query_responses, scratch);
      split_add_chunk<kParts, kValueParts>(head, end, {0, chunk.stride}, scratch);
    } else {
      read_chunk_state(head, first, end, query_responses, scratch);
      add_chunk_to_transposed_state(head, finite_values, {0, chunk.stride}, scratch,
                                    next_keys_and_values(head, end, chunk));
    }
  }
  return chunks;
}

// The sweep back over a segment that the sweep forward has just walked.
template <int kParts, int kValueParts>
void sweep_back(const Head& head, int64_t begin, int64_t end, int64_t chunks, BackwardScratch& scratch) {
  const RecurrenceProblem& problem = head.problem;
  KeyChunk& chunk = scratch.chunk;
  int64_t first = end;
  for (int64_t index = chunks - 1; index >= 0; --index) {
    const int rows = scratch.chunk_rows[index];
    first -= rows;
    load_keys(problem, head.sequence.batch, head.key_head, first, rows, chunk);
    const Normalizer start = scratch.chunk_start(index);
    change_gradient_unit(scratch, start.shift, {0, chunk.stride});
    weigh_keys<true>(problem, head.sequence.batch, head.key_head, chunk, start);
    const bool finite_values = load_values(head, first, rows, scratch);
    zero(scratch.received_within, rows * chunk.stride);
    const float* query_responses = scratch.query_responses + (first - begin) * chunk.stride;
    if (kParts > 0 && suits_tile_unit(scratch, finite_values))
      split_receive_chunk<kParts, kValueParts>(head, first, begin, query_responses, true, scratch);
    else
      receive_chunk(head, first, begin, query_responses, true, scratch);
    write_key_gradients(head, query_responses, scratch);
  }
}

template <int kParts, int kValueParts>
void run_causal(const Head& head, BackwardScratch& scratch) {
  const Sequence& sequence = head.sequence;
  const int64_t segments = (sequence.end - sequence.begin + kKeptRows - 1) / kKeptRows;
  const int64_t state_size = scratch.value_stride * scratch.chunk.stride;
  const auto segment_begin = [&](int64_t segment) { return sequence.begin + segment * kKeptRows; };
  start_transposed_state(head, true, scratch);
  for (int64_t segment = 0; segment + 1 < segments; ++segment) {
    scratch.segment_start(segment).copy_from(scratch.normalizer, head.problem.key_width);
    __builtin_memcpy(scratch.segment_states + segment * state_size, scratch.transposed_state,
                     static_cast<size_t>(state_size) * sizeof(float));
    advance_state(head, segment_begin(segment), segment_begin(segment + 1), scratch);
  }
  for (int64_t segment = segments - 1; segment >= 0; --segment) {
    const int64_t begin = segment_begin(segment), end = core::smaller(segment_begin(segment + 1), sequence.end);
    if (segment + 1 < segments) {
      scratch.normalizer.copy_from(scratch.segment_start(segment), head.problem.key_width);
      __builtin_memcpy(scratch.transposed_state, scratch.segment_states + segment * state_size,
                       static_cast<size_t>(state_size) * sizeof(float));
    }
    const int64_t chunks = sweep_forward<kParts, kValueParts>(head, begin, end, scratch);
    if (segment + 1 == segments) {
      zero(scratch.state_gradient, state_size);
      start_gradient(head, scratch);
    }
    sweep_back<kParts, kValueParts>(head, begin, end, chunks, scratch);
  }
  write_initial_gradients(head, scratch);
}

// One head in order with all threads, window by window.
template <int kParts, int kValueParts>
class HeadInWindows {
 public:
  HeadInWindows(const BackwardPlan& plan, const Head& head, const Parallel& parallel)
      : head_(head),
        parallel_(parallel),
        through_(plan),
        pool_(plan.without_rows(), parallel.threads),
        window_(head.problem, state_size(), parallel.threads),
        blocks_(through_.chunk.stride, parallel.threads) {}

  // run_causal() with phases in the place of chunks.
  void run() {
    const Sequence& sequence = head_.sequence;
    const int64_t segments = (sequence.end - sequence.begin + kKeptRows - 1) / kKeptRows;
    const auto segment_begin = [&](int64_t segment) { return sequence.begin + segment * kKeptRows; };
    start_transposed_state(head_, true, through_);
    for (int64_t segment = 0; segment + 1 < segments; ++segment) {
      save_state(segment);
      sweep_forward(segment_begin(segment), segment_begin(segment + 1), false);
    }
    for (int64_t segment = segments - 1; segment >= 0; --segment) {
      const int64_t begin = segment_begin(segment), end = core::smaller(segment_begin(segment + 1), sequence.end);
      if (segment + 1 < segments) restore_state(segment);
      const int64_t chunks = sweep_forward(begin, end, true);
      if (segment + 1 == segments) {
        zero(through_.state_gradient, state_size());
        start_gradient(head_, through_);
      }
      sweep_back(begin, end, chunks);
    }
    write_initial_gradients(head_, through_);
  }

 private:
  int64_t state_size() const { return through_.value_stride * through_.chunk.stride; }
  float* query_responses(int64_t row, int64_t begin) const {
    return through_.query_responses + (row - begin) * through_.chunk.stride;
  }
  void save_state(int64_t segment) {
    through_.segment_start(segment).copy_from(through_.normalizer, head_.problem.key_width);
    std::memcpy(through_.segment_states + segment * state_size(), through_.transposed_state,
                static_cast<size_t>(state_size()) * sizeof(float));
  }
  void restore_state(int64_t segment) {
    through_.normalizer.copy_from(through_.segment_start(segment), head_.problem.key_width);
    std::memcpy(through_.transposed_state, through_.segment_states + segment * state_size(),
                static_cast<size_t>(state_size()) * sizeof(float));
  }
  // Calls work(scratch) on a thread's scratch memory, whose chunk and pointers are its own again afterwards.
  template <class Work>
  void for_each(int64_t count, Work work) {
    pool_.for_each(parallel_, count, [&](int64_t index, BackwardScratch& scratch) {
      const KeyChunk chunk = scratch.chunk;
      float *state = scratch.transposed_state, *gradient = scratch.state_gradient;
      double* response = scratch.key_response;
      work(index, scratch);
      scratch.chunk = chunk;
      scratch.transposed_state = state, scratch.state_gradient = gradient, scratch.key_response = response;
    });
  }

  // The state after these rows; with `reads` dq too. Returns the number of chunks.
  int64_t sweep_forward(int64_t begin, int64_t end, bool reads) {
    const RecurrenceProblem& problem = head_.problem;
    Sequence rows = head_.sequence;
    rows.end = end;
    int64_t chunks = 0;
    window_.after.copy_from(through_.normalizer, problem.key_width);
    for (int64_t first = begin; first < end; first = window_.end) {
      window_.begin_at(first);
      for_each(blocks_.count, [&](int64_t index, BackwardScratch& scratch) {
        weigh_window(problem, rows, head_.key_head, blocks_.channels(index), scratch.chunk, scratch.normalizer, window_,
                     [](int, const KeyChunk&) {});
      });
      for_each(blocks_.count, [&](int64_t index, BackwardScratch& scratch) {
        for (int position = 0; position < window_.count; ++position)
          advance(position, end, blocks_.channels(index), reads, scratch);
      });
      if (reads) {
        for (int position = 0; position < window_.count; ++position, ++chunks) {
          through_.chunk_rows[chunks] = window_.chunks[position].rows;
          through_.chunk_start(chunks).copy_from(window_.starts[position], problem.key_width);
        }
        for_each(window_.count, [&](int64_t position, BackwardScratch& scratch) {
          read(static_cast<int>(position), begin, end, scratch);
        });
      }
    }
    through_.normalizer.copy_from(window_.after, problem.key_width);
    return chunks;
  }

  // These channels of the state over a chunk.
  void advance(int position, int64_t end, Channels channels, bool keeps, BackwardScratch& scratch) {
    const KeyChunk& chunk = scratch.chunk = window_.chunks[position];
    scratch.transposed_state = through_.transposed_state;
    float* before = window_.state_before(position);
    for (int64_t c = 0; c < scratch.value_stride; ++c)
      for (int64_t d = channels.begin; d < channels.end; d += Vec::kWidth) {
        const Vec factor = Vec::load(chunk.factors + d);
        float* entry = scratch.transposed_state + c * chunk.stride + d;
        const Vec state = select(equal(factor, Vec::broadcast(0.0f)), factor, Vec::load(entry) * factor);
        store(entry, state);
        if (keeps) store(before + c * chunk.stride + d, state);
      }
    const bool finite = load_values(head_, chunk.first, chunk.rows, scratch);
    // Without dq the state is that of advance_state(), in fp32.
    if (kParts > 0 && keeps && suits_tile_unit(scratch, finite))
      split_pair_and_add_chunk<kParts, kValueParts>(head_, end, channels, scratch);
    else
      add_chunk_to_transposed_state(head_, finite, channels, scratch);
  }

  void read(int position, int64_t begin, int64_t end, BackwardScratch& scratch) {
    const KeyChunk& chunk = scratch.chunk = window_.chunks[position];
    scratch.transposed_state = window_.state_before(position);
    const bool finite = load_values(head_, chunk.first, chunk.rows, scratch);
    float* responses = query_responses(chunk.first, begin);
    if (kParts > 0 && suits_tile_unit(scratch, finite))
      split_read_chunk_state<kParts, kValueParts>(head_, chunk.first, end, responses, scratch);
    else
      read_chunk_state(head_, chunk.first, end, responses, scratch);
  }

  void sweep_back(int64_t begin, int64_t end, int64_t chunks) {
    const RecurrenceProblem& problem = head_.problem;
    int64_t first = end;
    for (int64_t last = chunks; last > 0; last -= window_.count) {
      window_.count = static_cast<int>(core::smaller(window_.capacity, last));
      for (int position = window_.count - 1; position >= 0; --position) {
        const int64_t index = last - window_.count + position;
        window_.chunks[position].rows = through_.chunk_rows[index];
        window_.chunks[position].first = first -= through_.chunk_rows[index];
        window_.starts[position].copy_from(through_.chunk_start(index), problem.key_width);
      }
      for_each(blocks_.count, [&](int64_t index, BackwardScratch& scratch) {
        weigh_window_again(problem, head_.sequence.batch, head_.key_head, blocks_.channels(index), scratch.chunk,
                           window_);
      });
      for_each(blocks_.count, [&](int64_t index, BackwardScratch& scratch) {
        for (int position = window_.count - 1; position >= 0; --position)
          retreat(position, begin, blocks_.channels(index), scratch);
      });
      for_each(window_.count, [&](int64_t position, BackwardScratch& scratch) {
        receive(static_cast<int>(position), begin, scratch);
      });
    }
  }

  // These channels of G and r over a chunk, back.
  void retreat(int position, int64_t begin, Channels channels, BackwardScratch& scratch) {
    const KeyChunk& chunk = scratch.chunk = window_.chunks[position];
    change_gradient_unit(through_, window_.starts[position].shift, channels);
    const int64_t offset = channels.begin * scratch.value_stride;
    const int64_t count = (channels.end - channels.begin) * scratch.value_stride;
    std::memcpy(window_.state_before(position) + offset, through_.state_gradient + offset,
                static_cast<size_t>(count) * sizeof(float));
    const float* responses = query_responses(chunk.first, begin);
    for (int64_t d = channels.begin; d < channels.end; ++d) {
      window_.response(position)[d] = through_.key_response[d];
      float own = 0.0f;  // in the order of write_key_gradients()
      for (int row = chunk.rows - 1; row >= 0; --row) own += responses[row * chunk.stride + d];
      through_.key_response[d] -= static_cast<double>(own);
    }
    scratch.state_gradient = through_.state_gradient;
    const bool on_tiles = kParts > 0 && suits_tile_unit(scratch, load_values(head_, chunk.first, chunk.rows, scratch));
    head_.for_each_query_head([&](int64_t query_head) {
      const bool finite_outputs = load_grad_outputs(head_, query_head, chunk.first, chunk.rows, scratch);
      const bool finite_queries =
          load_scaled_queries(head_, query_head, chunk.first, chunk.rows, chunk.inverse, chunk.stride, scratch);
      if (on_tiles && finite_outputs && finite_queries)
        split_add_head_to_gradient<kParts, kValueParts>(channels, scratch);
      else
        add_head_to_gradient(head_, finite_outputs, channels, scratch);
    });
  }

  void receive(int position, int64_t begin, BackwardScratch& scratch) {
    const KeyChunk& chunk = scratch.chunk = window_.chunks[position];
    scratch.state_gradient = window_.state_before(position);
    scratch.key_response = window_.response(position);
    const bool finite = load_values(head_, chunk.first, chunk.rows, scratch);
    zero(scratch.received_within, chunk.rows * chunk.stride);
    if (kParts > 0 && suits_tile_unit(scratch, finite))
      split_receive_chunk<kParts, kValueParts>(head_, chunk.first, begin, nullptr, false, scratch);
    else
      receive_chunk(head_, chunk.first, begin, nullptr, false, scratch);
    write_key_gradients(head_, query_responses(chunk.first, begin), scratch);
  }

  const Head& head_;
  const Parallel& parallel_;
  BackwardScratch through_;  // what goes through all windows
  ScratchPool<BackwardScratch> pool_;
  Window window_;
  ChannelBlocks blocks_;
};

// A sequence without rows: the initial state receives what the final state has.
void pass_gradients_on(const Head& head) {
  const RecurrenceProblem& problem = head.problem;
  const RecurrenceGradients& gradients = head.gradients;
  if (gradients.grad_initial_memory == nullptr) return;
  for (int64_t row = head.state_row(0); row < head.state_row(problem.key_width); ++row) {
    gradients.grad_initial_log_normalizer[row] =
        gradients.grad_log_normalizer == nullptr ? 0.0f : gradients.grad_log_normalizer[row];
    for (int64_t index = row * problem.value_width; index < (row + 1) * problem.value_width; ++index)
      gradients.grad_initial_memory[index] = gradients.grad_memory == nullptr ? 0.0f : gradients.grad_memory[index];
  }
}

// A long sequence without order, walk by walk.
template <int kParts, int kValueParts>
void run_segments(const BackwardPlan& plan, const Parallel& parallel) {
  const RecurrenceProblem& problem = *plan.problem;
  const int64_t heads = problem.batch * problem.key_heads, segments = plan.unordered.count;
  const SegmentGradients between(plan, heads * segments);
  const auto head_of = [&](int64_t index) {
    return Head{problem, *plan.gradients, find_sequence(problem, index / problem.key_heads), index % problem.key_heads};
  };
  const auto segment_of = [&](int64_t index) {
    Sequence sequence = head_of(index / segments).sequence;
    sequence.begin = index % segments * plan.unordered.rows;
    sequence.end = core::smaller(problem.length, sequence.begin + plan.unordered.rows);
    return Head{problem, *plan.gradients, sequence, index / segments % problem.key_heads};
  };
  for_each_unit<BackwardScratch>(parallel, heads * segments, plan, [&](int64_t index, BackwardScratch& scratch) {
    const Head segment = segment_of(index);
    start_transposed_state(segment, index % segments == 0, scratch);
    gather_state<kParts, kValueParts>(segment, scratch);
    between.put_state(index, scratch);
  });
  for (int64_t first = 0; first < heads * segments; first += segments)
    for (int64_t index = first + 1; index < first + segments; ++index) between.merge_states(first, index);
  for_each_unit<BackwardScratch>(parallel, heads * segments, plan, [&](int64_t index, BackwardScratch& scratch) {
    between.get_state(index / segments * segments, scratch);
    read_rows<kParts, kValueParts>(segment_of(index), scratch);
    between.put_gradient(index, scratch);
  });
  for_each_unit<BackwardScratch>(parallel, heads, plan, [&](int64_t head, BackwardScratch& scratch) {
    const int64_t first = head * segments;
    between.get_state(first, scratch);
    zero(scratch.state_gradient, scratch.chunk.stride * scratch.value_stride);
    for (int64_t index = first; index < first + segments; ++index) between.add_gradient(index, scratch);
    finish_state_gradient<kParts>(head_of(head), scratch);
    between.put_gradient(first, scratch);
  });
  for_each_unit<BackwardScratch>(parallel, heads * segments, plan, [&](int64_t index, BackwardScratch& scratch) {
    between.get_gradient(index / segments * segments, scratch);
    give_to_rows<kParts, kValueParts>(segment_of(index), scratch);
  });
}

}  // namespace

void recurrence_backward(const RecurrenceProblem& problem, const RecurrenceGradients& gradients,
                         const Parallel& parallel) {
  const BackwardPlan plan(problem, gradients);
  if (plan.unordered.count > 1)
    return with_unordered_parts(plan.parts,
                                [&](auto parts, auto values) { run_segments<parts, values>(plan, parallel); });
  const bool fast = kHasTileUnit && problem.dtype != DType::kFloat32;
  if (suits_windows(problem, parallel.threads, fast ? kMostWindowShare : kMostSlowWindowShare)) {
    const FlushDenormals mode;
    for (int64_t index = 0; index < problem.sequences() * problem.key_heads; ++index) {
      const Head head{problem, gradients, find_sequence(problem, index / problem.key_heads), index % problem.key_heads};
      if (head.sequence.begin == head.sequence.end)
        pass_gradients_on(head);
      else
        with_parts(plan.parts,
                   [&](auto parts, auto values) { HeadInWindows<parts, values>(plan, head, parallel).run(); });
    }
    return;
  }
  for_each_unit<BackwardScratch>(
      parallel, problem.sequences() * problem.key_heads, plan, [&plan](int64_t index, BackwardScratch& scratch) {
        const RecurrenceProblem& task = *plan.problem;
        const Head head{task, *plan.gradients, find_sequence(task, index / task.key_heads), index % task.key_heads};
        if (head.sequence.begin == head.sequence.end)
          pass_gradients_on(head);
        else if (task.causal)
          with_parts(plan.parts, [&](auto parts, auto values) { run_causal<parts, values>(head, scratch); });
        else
          with_unordered_parts(plan.parts,
                               [&](auto parts, auto values) { run_without_order<parts, values>(head, scratch); });
      });
}

}  // namespace sightline::SIGHTLINE_ISA_NS
