// Weighted attention, backward (MATH.md sections 1 and 2), in one pass of five products.
//
// Work: one unit is the rows of one key head (all its query heads) against every `splits`-th key tile. A unit walks its
// row tiles, a few together, and with them its key tiles: scores and <do, v> (lanes are rows, see product.h), from both
// the weights W and the score gradients dS, then dV += W^T dO, dK += dS^T Q, dQ += dS K. dK and dV of the unit's keys
// are gathered in fp32 scratch; of a long context it fits no cache, and passes once for all row tiles that go together.
// With several splits every split writes its own partial dQ and these are added in a fixed order, so the result does
// not depend on the number of threads.
//
// dS is kept without the row's factor c_i / |q_i|: the copy of Q that meets it carries the factor instead, and the
// gradient of a scale of 0 stays defined. bfloat16 goes through products of pairs where the machine has them, and on
// the tile unit float16 as two matrices of bfloat16 (backward_pairs.h), but for row tiles with non-finite numbers. The
// gradient of a broadcast attn_mask adds up over heads or batch entries: units that share a mask entry run one after
// the other in one group.
#include <cmath>

#include "cpu/backward_unit.h"
#include "cpu/kernel_table.h"
#include "cpu/packed_mask.h"

namespace sightline::SIGHTLINE_ISA_NS {
namespace {

// A key of infinite or undefined norm has a factor of 0 or NaN; rows that do not see it keep their 0.
void scale_by_key_factors(const RowTile& rows, const KeyTile& keys, float* score_gradients) {
  const Vec zeros = Vec::broadcast(0.0f);
  for (int j = 0; j < keys.count; ++j)
    for (int lane = 0; lane < rows.lanes; lane += Vec::kWidth) {
      float* entry = score_gradients + j * rows.lanes + lane;
      const Vec gradient = Vec::load(entry);
      store(entry, select(equal(gradient, zeros), zeros, gradient * Vec::broadcast(keys.factor[j])));
    }
}

template <class Sum>
void add_mask_gradients(Sum* mask, const int64_t* strides, const RowTile& rows, const KeyTile& keys,
                        const float* score_gradients) {
  for (int lane = 0; lane < rows.rows; ++lane) {
    Sum* row = mask + rows.batch * strides[0] + rows.head[lane] * strides[1] + rows.query[lane] * strides[2] +
               keys.first * strides[3];
    for (int j = 0; j < keys.count; ++j) row[j * strides[3]] += score_gradients[j * rows.lanes + lane];
  }
}

// Through the normalisation q^ = q / |q|: takes off the part along q^.
SIGHTLINE_INLINE void project_out(float* gradient, const float* vector, float inverse_norm, int64_t width) {
  const float along = dot(gradient, vector, width) * inverse_norm * inverse_norm;
  for (int64_t d = 0; d < width; ++d) gradient[d] -= vector[d] * along;
}

// A finished fp32 row of dQ (the factor of the row not yet applied): factor, projection, rounding.
void write_query_gradient(const AttentionBackwardPlan& plan, int64_t batch, int64_t head, int64_t query,
                          float* gradient, const float* vector, float factor, float inverse_norm, bool floored) {
  const AttentionProblem& problem = *plan.problem;
  // No gradient stays none, whatever the vector holds.
  if (floored) zero(gradient, problem.head_width);
  if (!is_zero(gradient, problem.head_width)) {
    for (int64_t d = 0; d < problem.head_width; ++d) gradient[d] *= factor;
    if (problem.normalize_qk) project_out(gradient, vector, inverse_norm, problem.head_width);
  }
  narrow(gradient, writable_row_of(plan.gradients->grad_query, problem.dtype, batch, head, query), problem.dtype,
         problem.head_width);
}

void finish_row_tile(const AttentionBackwardPlan& plan, AttentionBackwardScratch& scratch, const BackwardRows& at,
                     int64_t batch, int64_t key_head, int64_t begin, int64_t split) {
  const AttentionProblem& problem = *plan.problem;
  const RowTile& rows = *at.rows;
  const RowGradients& state = *at.row_gradients;
  for (int lane = 0; lane < rows.rows; ++lane) {
    const int64_t head_index = batch * problem.heads + rows.head[lane];
    float* gradient = at.query_gradients + lane * plan.key_width;
    widen(row_of(problem.query, problem.dtype, batch, rows.head[lane], rows.query[lane]), problem.dtype, scratch.row,
          problem.head_width);
    if (plan.partial_scales != nullptr && state.inverse_normalizer[lane] != 0.0f)
      plan.partial_scales[split * problem.batch * problem.heads + head_index] +=
          rows.unit_factor[lane] * static_cast<double>(dot(gradient, scratch.row, problem.head_width));
    if (plan.partial_sinks != nullptr && split == 0 && state.inverse_normalizer[lane] != 0.0f) {
      const double share = std::exp(static_cast<double>(problem.sinks[rows.head[lane]]) - state.shift[lane]) *
                           state.inverse_normalizer[lane];
      plan.partial_sinks[head_index] += share * (state.log_gradient[lane] - state.delta[lane]);
    }
    if (plan.partial_queries == nullptr) {
      write_query_gradient(plan, batch, rows.head[lane], rows.query[lane], gradient, scratch.row, rows.factor[lane],
                           rows.inverse_norm[lane], rows.norm_floored[lane]);
    } else {
      const int64_t row = ((split * problem.batch + batch) * problem.key_heads + key_head) * plan.rows + begin + lane;
      float* target = plan.partial_queries + row * problem.head_width;
      for (int64_t d = 0; d < problem.head_width; ++d) target[d] = gradient[d];
    }
  }
}

void write_key_gradients(const AttentionBackwardPlan& plan, AttentionBackwardScratch& scratch, int64_t batch,
                         int64_t key_head, int64_t split) {
  const AttentionProblem& problem = *plan.problem;
  float* key_gradients = scratch.key_totals != nullptr ? scratch.key_totals : scratch.key_gradients;
  const float* value_gradients = scratch.key_totals != nullptr ? scratch.value_totals : scratch.value_gradients;
  int64_t local = 0;
  for (int64_t tile = split; tile < plan.key_tiles; tile += plan.splits, local += kKeyTile) {
    const KeyTile& keys = scratch.key_tiles[local / kKeyTile];
    for (int64_t j = 0; j < keys.count; ++j) {
      float* key_gradient = key_gradients + (local + j) * plan.key_width;
      if (problem.normalize_qk) {
        if (keys.norm_floored[j]) zero(key_gradient, problem.head_width);
        if (!is_zero(key_gradient, problem.head_width))
          project_out(key_gradient, keys.keys + j * keys.key_stride, keys.factor[j], problem.head_width);
      }
      narrow(key_gradient, writable_row_of(plan.gradients->grad_key, problem.dtype, batch, key_head, keys.first + j),
             problem.dtype, problem.head_width);
      narrow(value_gradients + (local + j) * plan.padded_value_width,
             writable_row_of(plan.gradients->grad_value, problem.dtype, batch, key_head, keys.first + j), problem.dtype,
             problem.value_width);
    }
  }
}

// Products to rounded weights and score gradients.
template <class Weight, int kParts>
void differentiate_pair_tile(const AttentionProblem& problem, const AttentionBackwardScratch& scratch,
                             const BackwardRows& at, const KeyTile& keys) {
  const RowTile& rows = *at.rows;
  const auto run = [&](auto differentiate) {
    differentiate(problem, rows, *at.row_gradients, keys, scratch.scores, scratch.score_gradients, at.pairs);
  };
  const bool reweighted = problem.reweight.power > 0.0f;
  if (has_masked_entries(problem, rows, keys)) {
    alignas(64) float largest[kRowTile];
    finish_tile(problem, rows, keys, scratch.bias, scratch.scores, largest);
    if (reweighted)
      run(differentiate_to_pairs<Weight, kParts, true, TileHolds::kScores>);
    else
      run(differentiate_to_pairs<Weight, kParts, false, TileHolds::kScores>);
  } else {
    if (reweighted)
      run(differentiate_to_pairs<Weight, kParts, true, TileHolds::kProducts>);
    else
      run(differentiate_to_pairs<Weight, kParts, false, TileHolds::kProducts>);
  }
}

// Scores to weights and <do, v> to score gradients, both in place, and what the mask gets of them.
template <class Weight>
void differentiate_scores(const AttentionBackwardPlan& plan, const AttentionBackwardScratch& scratch,
                          const BackwardRows& at, const KeyTile& keys) {
  const AttentionProblem& problem = *plan.problem;
  const AttentionGradients& gradients = *plan.gradients;
  const RowTile& rows = *at.rows;
  if (problem.reweight.power > 0.0f)
    differentiate<Weight, true>(problem, rows, *at.row_gradients, keys, scratch.scores, scratch.score_gradients);
  else
    differentiate<Weight, false>(problem, rows, *at.row_gradients, keys, scratch.scores, scratch.score_gradients);
  if (gradients.grad_mask != nullptr)
    add_mask_gradients(gradients.grad_mask, gradients.grad_mask_strides, rows, keys, scratch.score_gradients);
  if (gradients.grad_mask_sums != nullptr)
    add_mask_gradients(gradients.grad_mask_sums, gradients.grad_mask_strides, rows, keys, scratch.score_gradients);
  if (problem.normalize_qk) scale_by_key_factors(rows, keys, scratch.score_gradients);
}

// What a tile of scores adds to all gradients; `local` is the place of its keys among those of the unit.
template <class Weight>
void add_tile(const AttentionBackwardPlan& plan, const AttentionBackwardScratch& scratch, const BackwardRows& at,
              const KeyTile& keys, int64_t local) {
  const AttentionProblem& problem = *plan.problem;
  const RowTile& rows = *at.rows;
  alignas(64) float largest[kRowTile];
  compute_scores(problem, rows, keys, at.transposed_queries, scratch.bias, scratch.scores, largest);
  product<false>({keys.values, keys.value_stride, 1}, at.transposed_output_gradients, rows.lanes,
                 scratch.score_gradients, rows.lanes, keys.count, rows.lanes, problem.value_width);
  differentiate_scores<Weight>(plan, scratch, at, keys);
  accumulate_product(at.finite, {scratch.scores, rows.lanes, 1}, at.output_gradients, plan.padded_value_width,
                     scratch.value_gradients + local * plan.padded_value_width, plan.padded_value_width, keys.count,
                     plan.padded_value_width, rows.rows);
  accumulate_product(at.finite, {scratch.score_gradients, rows.lanes, 1}, at.queries, plan.key_width,
                     scratch.key_gradients + local * plan.key_width, plan.key_width, keys.count, plan.key_width,
                     rows.rows);
  accumulate_product(at.finite, {scratch.score_gradients, 1, rows.lanes}, keys.keys, plan.key_width, at.query_gradients,
                     plan.key_width, rows.rows, plan.key_width, keys.count);
}

// The same in products of pairs.
template <class Weight, int kParts>
void add_tile_in_pairs(const AttentionBackwardPlan& plan, const AttentionBackwardScratch& scratch,
                       const BackwardRows& at, const KeyTile& keys, int64_t local) {
  const AttentionProblem& problem = *plan.problem;
  const RowTile& rows = *at.rows;
  const int64_t tile = local / kKeyTile;
  multiply_with_keys<kParts>(at.pairs, tile, keys.count, rows.lanes, scratch.scores, scratch.score_gradients);
  if (plan.in_one_pass) {
    differentiate_pair_tile<Weight, kParts>(problem, scratch, at, keys);
  } else {
    alignas(64) float largest[kRowTile];
    finish_tile(problem, rows, keys, scratch.bias, scratch.scores, largest);
    differentiate_scores<Weight>(plan, scratch, at, keys);
    round_score_gradients<kParts>(rows, keys, scratch.scores, scratch.score_gradients, at.pairs);
  }
  add_pair_gradients<kParts>(at.pairs, tile, keys.count, rows.lanes,
                             scratch.value_gradients + local * plan.padded_value_width,
                             scratch.key_gradients + local * plan.key_width);
}

// Makes the tile of rows ready that begins with `begin`.
template <int kParts>
void load_rows(const AttentionBackwardPlan& plan, AttentionBackwardScratch& scratch, int64_t batch, int64_t key_head,
               int64_t begin, BackwardRows& at) {
  const AttentionProblem& problem = *plan.problem;
  set_up_rows(problem, batch, key_head, begin, static_cast<int>(core::smaller(kRowTile, plan.rows - begin)), *at.rows,
              at.queries, plan.key_width, at.transposed_queries);
  at.finite = scratch.finite;
  at.in_pairs = load_row_gradients(plan, scratch, at) && kParts > 0;
  // Of one part the bare query meets the score gradients, else the one with the factor of its row.
  if constexpr (kParts == 1)
    if (at.in_pairs) load_pair_rows<kParts>(problem, scratch, at);
  for (int lane = 0; lane < at.rows->lanes; ++lane)
    scale_row(at.queries + lane * plan.key_width, at.rows->factor[lane], plan.key_width);
  if constexpr (kParts > 1)
    if (at.in_pairs) load_pair_rows<kParts>(problem, scratch, at);
  zero(at.query_gradients, at.rows->lanes * plan.key_width);
}

template <class Weight, int kParts>
void differentiate_unit(const AttentionBackwardPlan& plan, AttentionBackwardScratch& scratch, int64_t batch,
                        int64_t key_head, int64_t split) {
  const AttentionProblem& problem = *plan.problem;
  scratch.finite = scratch.finite_values = true;
  load_keys<kParts>(plan, scratch, batch, key_head, split);
  const int64_t step = plan.tiles_together * kRowTile;
  for (int64_t begin = 0; begin < plan.rows; begin += step) {
    const int64_t end = core::smaller(begin + step, plan.rows);
    BackwardRows* at = scratch.row_tiles;
    for (int64_t row = begin; row < end; row += kRowTile) load_rows<kParts>(plan, scratch, batch, key_head, row, *at++);
    BackwardRows* const last = at;
    int64_t local = 0;
    for (int64_t tile = split; tile < plan.key_tiles; tile += plan.splits, local += kKeyTile) {
      const KeyTile& keys = scratch.key_tiles[local / kKeyTile];
      for (at = scratch.row_tiles; at < last; ++at) {
        if (!tile_is_visible_to_any(problem, *at->rows, keys.first, keys.count)) continue;
        if constexpr (kParts > 0)
          if (at->in_pairs) {
            add_tile_in_pairs<Weight, kParts>(plan, scratch, *at, keys, local);
            continue;
          }
        add_tile<Weight>(plan, scratch, *at, keys, local);
      }
    }
    at = scratch.row_tiles;
    for (int64_t row = begin; row < end; row += kRowTile, ++at) {
      if (at->in_pairs)
        move_transposed(at->pairs.query_gradients, plan.key_width, at->rows->lanes, at->query_gradients);
      finish_row_tile(plan, scratch, *at, batch, key_head, row, split);
    }
    const bool chunk_ends = end % kGradientRows == 0 || end == plan.rows;
    if (scratch.key_totals != nullptr && chunk_ends) finish_chunk(plan, scratch);
  }
  write_key_gradients(plan, scratch, batch, key_head, split);
}

// Adds the partial dQ of all splits in order, then factor, projection and rounding. One unit is a tile of rows.
void reduce_query_gradients(const AttentionBackwardPlan& plan, AttentionBackwardScratch& scratch, int64_t head_index,
                            int64_t begin) {
  const AttentionProblem& problem = *plan.problem;
  const int64_t batch = head_index / problem.key_heads, key_head = head_index % problem.key_heads;
  const BackwardRows& at = *scratch.row_tiles;
  RowTile& rows = *at.rows;
  set_up_rows(problem, batch, key_head, begin, static_cast<int>(core::smaller(kRowTile, plan.rows - begin)), rows,
              at.queries, plan.key_width, at.transposed_queries);
  for (int lane = 0; lane < rows.rows; ++lane) {
    zero(scratch.row, problem.head_width);
    for (int64_t split = 0; split < plan.splits; ++split) {
      const int64_t row = (split * problem.batch * problem.key_heads + head_index) * plan.rows + begin + lane;
      const float* part = plan.partial_queries + row * problem.head_width;
      for (int64_t d = 0; d < problem.head_width; ++d) scratch.row[d] += part[d];
    }
    write_query_gradient(plan, batch, rows.head[lane], rows.query[lane], scratch.row,
                         at.queries + lane * plan.key_width, rows.factor[lane], rows.inverse_norm[lane],
                         rows.norm_floored[lane]);
  }
}

// Units that add into the same entries of a broadcast mask form a group and run one after the other.
struct Groups {
  int64_t batches, key_heads;
};

}  // namespace

void attention_backward(const AttentionProblem& given, const AttentionGradients& gradients, const Parallel& parallel) {
  const PackedMask mask(given, parallel);
  const AttentionProblem problem = mask.problem();
  const int64_t key_heads = problem.batch * problem.key_heads;
  const int64_t heads = problem.batch * problem.heads;
  AttentionBackwardPlan plan{};
  plan.problem = &problem;
  plan.gradients = &gradients;
  plan.rows = problem.heads / problem.key_heads * problem.queries;
  plan.key_width = core::round_up(problem.head_width, Vec::kWidth);
  plan.padded_value_width = core::round_up(problem.value_width, Vec::kWidth);
  plan.key_tiles = (problem.keys + kKeyTile - 1) / kKeyTile;
  plan.parts = pair_parts(problem.dtype);
  plan.in_one_pass = !has_extras(problem) && !problem.dropout;

  const bool sums_mask = gradients.grad_mask_sums != nullptr;
  const bool mask_shared_by_keys = sums_mask && gradients.grad_mask_strides[3] == 0;
  const bool mask_shared_by_batch = sums_mask && gradients.grad_mask_strides[0] == 0;
  const bool mask_shared_by_heads = sums_mask && gradients.grad_mask_strides[1] == 0;
  const Groups groups{mask_shared_by_batch ? 1 : problem.batch, mask_shared_by_heads ? 1 : problem.key_heads};
  const int64_t parallel_heads = core::larger(groups.batches * groups.key_heads, 1);
  plan.splits = mask_shared_by_keys ? 1 : core::larger(1, core::smaller(plan.key_tiles, kWantedUnits / parallel_heads));
  plan.tiles_per_split = (plan.key_tiles + plan.splits - 1) / plan.splits;

  plan.tiles_together = rows_together(plan);

  const bool has_rows = plan.rows > 0 && key_heads > 0;
  const bool partial = plan.splits > 1;
  const Allocation partials(
      partial ? plan.splits * key_heads * plan.rows * problem.head_width * static_cast<int64_t>(sizeof(float)) : 0);
  const Allocation scale_sums((gradients.grad_scales != nullptr ? plan.splits * heads : 0) *
                              static_cast<int64_t>(sizeof(double)));
  const Allocation sink_sums((gradients.grad_sinks != nullptr ? heads : 0) * static_cast<int64_t>(sizeof(double)));
  if (partial) plan.partial_queries = reinterpret_cast<float*>(partials.get());
  if (gradients.grad_scales != nullptr) {
    plan.partial_scales = reinterpret_cast<double*>(scale_sums.get());
    for (int64_t index = 0; index < plan.splits * heads; ++index) plan.partial_scales[index] = 0.0;
  }
  if (gradients.grad_sinks != nullptr) {
    plan.partial_sinks = reinterpret_cast<double*>(sink_sums.get());
    for (int64_t index = 0; index < heads; ++index) plan.partial_sinks[index] = 0.0;
  }

  for_each_unit<AttentionBackwardScratch>(
      parallel, plan.splits * groups.batches * groups.key_heads, plan,
      [&plan, groups](int64_t index, AttentionBackwardScratch& scratch) {
        const AttentionProblem& task = *plan.problem;
        const int64_t split = index % plan.splits;
        const int64_t group = index / plan.splits;
        const int64_t group_batch = group / groups.key_heads, group_head = group % groups.key_heads;
        for (int64_t batch = group_batch; batch < task.batch; batch += groups.batches)
          for (int64_t head = group_head; head < task.key_heads; head += groups.key_heads) {
            with_pair_parts(plan.parts, [&](auto parts) {
              core::with_weight(task.weight_function, [&](auto weight) {
                differentiate_unit<decltype(weight), parts>(plan, scratch, batch, head, split);
              });
            });
          }
      });
  const int64_t row_tiles = (plan.rows + kRowTile - 1) / kRowTile;
  if (partial && has_rows)
    for_each_unit<AttentionBackwardScratch>(
        parallel, key_heads * row_tiles, plan, [&plan, row_tiles](int64_t index, AttentionBackwardScratch& scratch) {
          reduce_query_gradients(plan, scratch, index / row_tiles, index % row_tiles * kRowTile);
        });

  for (int64_t head = 0; head < problem.heads; ++head) {
    double scale_sum = 0.0, sink_sum = 0.0;
    for (int64_t batch = 0; batch < problem.batch; ++batch) {
      const int64_t head_index = batch * problem.heads + head;
      if (gradients.grad_scales != nullptr)
        for (int64_t split = 0; split < plan.splits; ++split)
          scale_sum += plan.partial_scales[split * heads + head_index];
      if (gradients.grad_sinks != nullptr) sink_sum += plan.partial_sinks[head_index];
    }
    if (gradients.grad_scales != nullptr) gradients.grad_scales[head] = static_cast<float>(scale_sum);
    if (gradients.grad_sinks != nullptr) gradients.grad_sinks[head] = static_cast<float>(sink_sum);
  }
}

}  // namespace sightline::SIGHTLINE_ISA_NS
