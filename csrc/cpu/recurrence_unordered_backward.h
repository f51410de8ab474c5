// The backward pass of the additive recurrence without order (MATH.md section 4), where every row reads the state S of
// the whole sequence.
//
// Three walks over the rows: the state; dq = scale S do / Delta with the sum of all q do^T, which becomes G when it is
// divided by Delta, once; then dx, dv and the gain's gradient from G, with one r for all rows. Every walk can be cut
// into segments: states are merged and sums added between the walks (recurrence_gradient_segments.h).
//
// In products of pairs queries, values and gradients of the output are what they are. The keys' weights are rounded to
// bfloat16 and divided by their own sum, the state and G rounded once for all rows, as in the forward pass; for float16
// all take part with sixteen bits.
#pragma once

#include "cpu/recurrence_backward_rows.h"

namespace sightline::SIGHTLINE_ISA_NS {

// Adds the rows' q do^T to their sum, and leaves both loaded.
[[maybe_unused]] static void add_query_products(const Head& head, int64_t query_head, int64_t first, int rows,
                                                BackwardScratch& scratch, Prefetches& next) {
  const int64_t keys = scratch.chunk.stride, values = scratch.value_stride;
  const bool finite = load_grad_outputs(head, query_head, first, rows, scratch);
  load_rows(head.problem.query, head.problem.dtype, head.sequence.batch, query_head, first, 0, rows,
            head.problem.key_width, scratch.queries, keys);
  accumulate_product(finite, {scratch.queries, 1, keys}, scratch.grad_outputs, values, scratch.state_gradient, values,
                     head.problem.key_width, values, rows, AskFor{next});
}

[[maybe_unused]] static bool are_finite_bfloat16(const uint16_t* from, int64_t row_stride, int rows, int64_t width) {
  uint32_t non_finite = 0;
  for (int row = 0; row < rows; ++row)
    for (int64_t column = 0; column < width; column += 2 * Vec::kWidth)
      non_finite |= non_finite_bits(load_numbers(from + row * row_stride + column, width - column));
  return non_finite == 0;
}

// Rows of a tensor as the first factor of a product over their `width` columns, padded to `depth`: where they lie, or
// in `to`. `wide` takes them as fp32.
template <int kValueParts>
static SplitRows tile_rows(const Head& head, const HeadsView& view, int64_t of_head, int64_t first, int rows,
                           int64_t width, int64_t depth, float* wide, int64_t stride, uint16_t* to) {
  const DType dtype = head.problem.dtype;
  if (kValueParts == 1 && width == depth && rows % kPairRows == 0)
    return {static_cast<const uint16_t*>(row_of(view, dtype, head.sequence.batch, of_head, first)), view.row_stride, 0};
  load_rows(view, dtype, head.sequence.batch, of_head, first, 0, rows, width, wide, stride);
  split_rows<kValueParts>(wide, stride, rows, stride, core::round_up(rows, kPairRows), to, depth, kChunkRows * depth);
  return {to, depth, kChunkRows * depth};
}

// The same, transposed: the rows become the depth.
template <int kValueParts>
static SplitRows tile_columns(const Head& head, const HeadsView& view, int64_t of_head, int64_t first, int rows,
                              int64_t width, float* wide, int64_t stride, uint16_t* to) {
  const DType dtype = head.problem.dtype;
  if (kValueParts == 1) {
    const int64_t depth = core::round_up(rows, kPairDepth);
    transpose_bfloat16(static_cast<const uint16_t*>(row_of(view, dtype, head.sequence.batch, of_head, first)),
                       view.row_stride, rows, width, to, depth);
    return {to, depth, 0};
  }
  load_rows(view, dtype, head.sequence.batch, of_head, first, 0, rows, width, wide, stride);
  transpose_to_rows<kValueParts>(wide, stride, rows, stride, to, kChunkRows, stride * kChunkRows);
  return {to, kChunkRows, stride * kChunkRows};
}

// The rows in pairs, as the second factor. Whether all of them are finite.
template <int kValueParts>
static bool tile_pairs(const Head& head, const HeadsView& view, int64_t of_head, int64_t first, int rows, int64_t width,
                       float* wide, int64_t stride, uint32_t* to) {
  const DType dtype = head.problem.dtype;
  if (kValueParts == 1)
    return pair_up_rows(static_cast<const uint16_t*>(row_of(view, dtype, head.sequence.batch, of_head, first)),
                        view.row_stride, rows, width, stride, to);
  load_rows(view, dtype, head.sequence.batch, of_head, first, 0, rows, width, wide, stride);
  split_to_pairs<kValueParts>(wide, stride, nullptr, rows, stride, to, kValuePanel, kChunkRows / 2 * stride);
  return is_finite(wide, rows * stride);
}

// The chunk joins the transposed state; false where one of its values is not finite, and nothing was done.
template <int kParts, int kValueParts>
static bool tile_add_chunk(const Head& head, BackwardScratch& scratch) {
  const HeadsView& value = head.problem.value;
  const KeyChunk& chunk = scratch.chunk;
  const SplitGradients& split = scratch.split;
  const int64_t width = head.problem.value_width, stride = scratch.value_stride;
  const int64_t depth = core::round_up(chunk.rows, kPairDepth);
  SplitRows values{split.value_columns, depth, 0};
  const auto* from =
      static_cast<const uint16_t*>(row_of(value, head.problem.dtype, head.sequence.batch, head.key_head, chunk.first));
  if (kValueParts == 1 && are_finite_bfloat16(from, value.row_stride, chunk.rows, width)) {
    transpose_bfloat16(from, value.row_stride, chunk.rows, width, split.value_columns, depth);
  } else {
    if (!load_values(head, chunk.first, chunk.rows, scratch)) return false;
    values = {split.value_columns, kChunkRows, stride * kChunkRows};
    transpose_to_rows<kValueParts>(scratch.values, stride, chunk.rows, stride, split.value_columns, values.stride,
                                   values.part);
  }
  split_to_pairs<kParts>(chunk.gained, chunk.stride, nullptr, chunk.rows, chunk.stride, split.gained_pairs, kValuePanel,
                         kChunkRows / 2 * chunk.stride);
  pair_product<kValueParts, kParts, true>(values, {split.gained_pairs, kValuePanel, kChunkRows / 2 * chunk.stride},
                                          scratch.transposed_state, chunk.stride, stride, chunk.stride, depth,
                                          next_keys_and_values(head, head.sequence.end, chunk));
  return true;
}

// The state of all rows times scale / Delta, as tile_read_rows() multiplies with it.
template <int kParts>
static void tile_split_state(const Head& head, BackwardScratch& scratch) {
  const KeyChunk& chunk = scratch.chunk;
  const Vec scale = Vec::broadcast(head.problem.scale);
  for (int64_t c = 0; c < scratch.value_stride; ++c)
    for (int64_t d = 0; d < chunk.stride; d += Vec::kWidth)
      store(scratch.transposed_gradient + c * chunk.stride + d,
            Vec::load(scratch.transposed_state + c * chunk.stride + d) * Vec::load(chunk.inverse + d) * scale);
  const SplitGradients& split = scratch.split;
  split_to_pairs<kParts>(scratch.transposed_gradient, chunk.stride, nullptr, scratch.value_stride, chunk.stride,
                         split.state, split.value_depth / 2 * kPanelLanes, split.value_depth / 2 * chunk.stride);
}

// dq of the rows, in `received`, and what they add to the sum of q do^T.
template <int kParts, int kValueParts>
static void tile_read_rows(const Head& head, int64_t query_head, int64_t first, int rows, BackwardScratch& scratch) {
  const RecurrenceProblem& problem = head.problem;
  const HeadsView& grad_output = head.gradients.grad_output;
  const SplitGradients& split = scratch.split;
  const int64_t keys = scratch.chunk.stride, values = scratch.value_stride;
  Prefetches next = next_rows_of_query_head(head, query_head, first, rows);
  next.products = 2;
  const SplitRows rows_of_gradient =
      tile_rows<kValueParts>(head, grad_output, query_head, first, rows, problem.value_width, split.value_depth,
                             scratch.grad_outputs, values, split.grad_rows);
  pair_product<kValueParts, kParts, false>(
      rows_of_gradient, {split.state, split.value_depth / 2 * kPanelLanes, split.value_depth / 2 * keys},
      scratch.received, keys, core::round_up(rows, kPairRows), keys, split.value_depth, next);
  if (!tile_pairs<kValueParts>(head, grad_output, query_head, first, rows, problem.value_width, scratch.grad_outputs,
                               values, split.grad_pairs))
    return add_query_products(head, query_head, first, rows, scratch, next);
  const SplitRows queries = tile_columns<kValueParts>(head, problem.query, query_head, first, rows, problem.key_width,
                                                      scratch.queries, keys, split.query_columns);
  pair_product<kValueParts, kValueParts, true>(queries, {split.grad_pairs, kValuePanel, kChunkRows / 2 * values},
                                               scratch.state_gradient, values, keys, values,
                                               core::round_up(rows, kPairDepth), next);
}

// G, either way round, as tile_receive() multiplies with it.
template <int kParts>
static void tile_split_gradient(BackwardScratch& scratch) {
  const SplitGradients& split = scratch.split;
  const int64_t keys = scratch.chunk.stride, values = scratch.value_stride;
  split_to_pairs<kParts>(scratch.state_gradient, values, nullptr, keys, values, split.state,
                         split.key_depth / 2 * kPanelLanes, split.key_depth / 2 * values);
  split_to_pairs<kParts>(scratch.transposed_gradient, keys, nullptr, values, keys, split.transposed_gradient,
                         split.value_depth / 2 * kPanelLanes, split.value_depth / 2 * keys);
}

// dv and G v of the chunk's rows.
template <int kParts, int kValueParts>
static void tile_receive(const Head& head, BackwardScratch& scratch) {
  const RecurrenceProblem& problem = head.problem;
  const KeyChunk& chunk = scratch.chunk;
  const SplitGradients& split = scratch.split;
  const int64_t keys = chunk.stride, values = scratch.value_stride, rows = core::round_up(chunk.rows, kPairRows);
  Prefetches next = next_keys_and_gradients(head, chunk);
  next.products = 2;
  split_rows<kParts>(chunk.gained, keys, chunk.rows, keys, core::round_up(chunk.rows, kPairRows), split.key_rows,
                     split.key_depth, kChunkRows * split.key_depth);
  pair_product<kParts, kParts, false>({split.key_rows, split.key_depth, kChunkRows * split.key_depth},
                                      {split.state, split.key_depth / 2 * kPanelLanes, split.key_depth / 2 * values},
                                      scratch.grad_values, values, rows, values, split.key_depth, next);
  const SplitRows values_of_rows =
      tile_rows<kValueParts>(head, problem.value, head.key_head, chunk.first, chunk.rows, problem.value_width,
                             split.value_depth, scratch.values, values, split.value_rows);
  pair_product<kValueParts, kParts, false>(
      values_of_rows, {split.transposed_gradient, split.value_depth / 2 * kPanelLanes, split.value_depth / 2 * keys},
      scratch.received, keys, rows, keys, split.value_depth, next);
}

// The state after the rows of `head`, on top of what is there.
template <int kParts, int kValueParts>
static void gather_state(const Head& head, BackwardScratch& scratch) {
  const RecurrenceProblem& problem = head.problem;
  KeyChunk& chunk = scratch.chunk;
  for (int64_t first = head.sequence.begin; first < head.sequence.end; first += chunk.rows) {
    open_chunk(head, first, head.sequence.end, scratch);
    weigh_keys<false, kParts == 1>(problem, head.sequence.batch, head.key_head, chunk, scratch.normalizer);
    if constexpr (kParts > 0)
      if (chunk.rows >= kLeastSplitRows && tile_add_chunk<kParts, kValueParts>(head, scratch)) continue;
    add_chunk_to_transposed_state(head, load_values(head, first, chunk.rows, scratch), {0, chunk.stride}, scratch,
                                  next_keys_and_values(head, head.sequence.end, chunk));
  }
}

// dq of all rows of `head`, and the sum of their q do^T in `state_gradient`.
template <int kParts, int kValueParts>
static void read_rows(const Head& head, BackwardScratch& scratch) {
  const RecurrenceProblem& problem = head.problem;
  const KeyChunk& chunk = scratch.chunk;
  const int64_t end = head.sequence.end;
  const Vec scale = Vec::broadcast(problem.scale), nothing = Vec::broadcast(0.0f);
  bool all_live = true;
  for (int64_t d = 0; d < chunk.stride; ++d) {
    chunk.inverse[d] = d < problem.key_width ? scratch.normalizer.inverse(d) : 0.0f;
    all_live &= d >= problem.key_width || chunk.inverse[d] != 0.0f;
  }
  // A channel that has met no key takes no part, whatever it would be multiplied with.
  const bool on_tiles = kParts > 0 && all_live;
  if (on_tiles) tile_split_state<kParts>(head, scratch);
  zero(scratch.state_gradient, chunk.stride * scratch.value_stride);
  for (int64_t first = head.sequence.begin; first < end; first += kChunkRows) {
    const int rows = static_cast<int>(core::smaller(kChunkRows, end - first));
    head.for_each_query_head([&](int64_t query_head) {
      if (on_tiles) {
        tile_read_rows<kParts, kValueParts>(head, query_head, first, rows, scratch);
      } else {
        Prefetches next = next_rows_of_query_head(head, query_head, first, rows);
        next.products = 2;
        add_query_products(head, query_head, first, rows, scratch, next);
        product<false>({scratch.grad_outputs, scratch.value_stride, 1}, scratch.transposed_state, chunk.stride,
                       scratch.received, chunk.stride, rows, chunk.stride, problem.value_width, AskFor{next});
      }
      for (int row = 0; row < rows && !on_tiles; ++row) {
        float* gradient = scratch.received + row * chunk.stride;
        for (int64_t d = 0; d < chunk.stride; d += Vec::kWidth) {
          const Vec inverse = Vec::load(chunk.inverse + d);
          store(gradient + d, select(equal(inverse, nothing), nothing, Vec::load(gradient + d) * inverse * scale));
        }
      }
      head.grad_queries().write(scratch.received, chunk.stride, head.sequence.batch, query_head, first, rows);
    });
  }
}

// x as tile_split_gradient() splits it, where it is finite.
template <int kParts>
static Vec sum_of_parts(Vec x) {
  const Vec first = rounded_to_bfloat16(x);
  if (kParts == 1) return first;
  const Mask finite = less(absolute(first), Vec::broadcast(INFINITY));
  return first + select(finite, rounded_to_bfloat16(x - first), Vec::broadcast(0.0f));
}

// G and r from the sum of q do^T over all rows; with them what the initial state receives. Rows then receive both from
// a G of the parts that their products have: where <G, S> takes most of G v away, what is left of the
// two is not what rounding took of one.
template <int kParts>
static void finish_state_gradient(const Head& head, BackwardScratch& scratch) {
  for (int64_t d = 0; d < scratch.chunk.stride; ++d) {
    const float inverse = d < head.problem.key_width ? scratch.normalizer.inverse(d) : 0.0f;
    scale_row(scratch.state_gradient + d * scratch.value_stride, inverse * head.problem.scale, scratch.value_stride);
  }
  start_gradient(head, scratch);
  write_initial_gradients(head, scratch);
  if (kParts == 0) return;
  for (int64_t entry = 0; entry < scratch.chunk.stride * scratch.value_stride; entry += Vec::kWidth)
    store(scratch.state_gradient + entry, sum_of_parts<kParts>(Vec::load(scratch.state_gradient + entry)));
  set_response_to_state(head, scratch);
}

// dx, dv and the gain's gradient of the rows of `head` from G and r.
template <int kParts, int kValueParts>
static void give_to_rows(const Head& head, BackwardScratch& scratch) {
  const RecurrenceProblem& problem = head.problem;
  KeyChunk& chunk = scratch.chunk;
  transpose_gradient(scratch);
  if constexpr (kParts > 0) tile_split_gradient<kParts>(scratch);
  for (int64_t first = head.sequence.begin; first < head.sequence.end; first += chunk.rows) {
    load_keys(problem, head.sequence.batch, head.key_head, first,
              static_cast<int>(core::smaller(kChunkRows, head.sequence.end - first)), chunk);
    weigh_keys<false, kParts == 1>(problem, head.sequence.batch, head.key_head, chunk, scratch.normalizer);
    if constexpr (kParts > 0) {
      tile_receive<kParts, kValueParts>(head, scratch);
    } else {
      load_values(head, first, chunk.rows, scratch);
      receive_from_later_rows(head, scratch, next_keys_and_gradients(head, chunk));
    }
    write_key_gradients(head, nullptr, scratch);
  }
}

template <int kParts, int kValueParts>
static void run_without_order(const Head& head, BackwardScratch& scratch) {
  start_transposed_state(head, true, scratch);
  gather_state<kParts, kValueParts>(head, scratch);
  read_rows<kParts, kValueParts>(head, scratch);
  finish_state_gradient<kParts>(head, scratch);
  give_to_rows<kParts, kValueParts>(head, scratch);
}

}  // namespace sightline::SIGHTLINE_ISA_NS
