// The products of a chunk of the additive recurrence's backward pass on the tile unit (split_product.h).
//
// Values and gradients of the output are what they are: bfloat16, or float16 in two parts. What fp32 has computed, the
// keys' weights, the queries over their normaliser, the state, G and the scores, takes part with sixteen bits: with
// eight the gradients would be a fifth faster and have twice the error that rounding them leaves. A chunk with a number
// that is not finite goes through products in fp32, in which it reaches those rows alone that see it.
#pragma once

#include "cpu/recurrence_gradients.h"

namespace sightline::SIGHTLINE_ISA_NS {

constexpr int64_t kRowPanel = kChunkRows / 2 * kPanelLanes;  // of pairs of rows

// The products of a chunk that is loaded, of the operands that its steps need.
template <int kParts, int kValueParts>
class SplitBackward {
 public:
  explicit SplitBackward(BackwardScratch& scratch)
      : scratch_(scratch),
        chunk_(scratch.chunk),
        split_(scratch.split),
        keys_(scratch.chunk.stride),
        values_(scratch.value_stride),
        rows_(core::round_up(scratch.chunk.rows, kPairRows)),
        depth_(core::round_up(scratch.chunk.rows, kPairDepth)) {}

  // What the sweep forward multiplies with: values as lanes, weights and the state before the chunk in pairs.
  void load_forward() const {
    load_value_lanes();
    pair_weights({0, keys_});
    split_to_pairs<kParts>(scratch_.transposed_state, keys_, nullptr, values_, keys_, split_.state, value_panel(),
                           split_.value_depth / 2 * keys_);
  }

  // received = S_t do_t in the chunk's unit, from `grad_outputs`.
  void multiply_state(Prefetches& next) const {
    next.products = 3;
    load_grad_rows();
    pair_product<kValueParts, kParts, false>(grad_rows(), {split_.state, value_panel(), split_.value_depth / 2 * keys_},
                                             scratch_.received, keys_, rows_, keys_, split_.value_depth, next);
    multiply_responses(next);
    split_scores<kParts>(scratch_.responses, chunk_.rows, split_.triangle);
    pair_product<kParts, kParts, true>(triangle(), {split_.gained_pairs, kRowPanel, kChunkRows / 2 * keys_},
                                       scratch_.received, keys_, rows_, keys_, depth_, next);
  }

  // The weights of these channels in pairs of rows.
  void pair_weights(Channels channels) const {
    split_to_pairs<kParts>(chunk_.gained + channels.begin, keys_, nullptr, chunk_.rows, channels.end - channels.begin,
                           split_.gained_pairs + channels.begin / kPanelLanes * kRowPanel, kRowPanel,
                           kChunkRows / 2 * keys_);
  }

  // transposed state += values^T weights, these channels of it, whose weights are in pairs.
  void join_state(Channels channels, Prefetches& next) const {
    transpose_to_rows<kValueParts>(scratch_.values, values_, chunk_.rows, values_, split_.value_columns, kChunkRows,
                                   values_ * kChunkRows);
    pair_product<kValueParts, kParts, true>(
        {split_.value_columns, kChunkRows, values_ * kChunkRows},
        {split_.gained_pairs + channels.begin / kPanelLanes * kRowPanel, kRowPanel, kChunkRows / 2 * keys_},
        scratch_.transposed_state + channels.begin, keys_, values_, channels.end - channels.begin, depth_, next);
  }

  // What the sweep back multiplies with; dv and G v of the rows from what comes after the chunk.
  void receive_from_later_rows(Prefetches& next) const {
    next.products = 2;
    load_value_lanes();
    transpose_to_pairs<kParts>(chunk_.gained, keys_, keys_, split_.gained_lanes, key_panel(),
                               split_.key_depth / 2 * kChunkRows, chunk_.rows);
    split_rows<kParts>(chunk_.gained, keys_, chunk_.rows, keys_, rows_, split_.key_rows, split_.key_depth,
                       kChunkRows * split_.key_depth);
    split_to_pairs<kParts>(scratch_.state_gradient, values_, nullptr, keys_, values_, split_.state, key_panel(),
                           split_.key_depth / 2 * values_);
    pair_product<kParts, kParts, false>({split_.key_rows, split_.key_depth, kChunkRows * split_.key_depth},
                                        {split_.state, key_panel(), split_.key_depth / 2 * values_},
                                        scratch_.grad_values, values_, rows_, values_, split_.key_depth, next);
    split_rows<kValueParts>(scratch_.values, values_, chunk_.rows, values_, rows_, split_.value_rows,
                            split_.value_depth, kChunkRows * split_.value_depth);
    transpose_to_pairs<kParts>(scratch_.state_gradient, values_, values_, split_.state, value_panel(),
                               split_.value_depth / 2 * keys_, keys_);
    pair_product<kValueParts, kParts, false>({split_.value_rows, split_.value_depth, kChunkRows * split_.value_depth},
                                             {split_.state, value_panel(), split_.value_depth / 2 * keys_},
                                             scratch_.received, keys_, rows_, keys_, split_.value_depth, next);
  }

  // What the rows of one query head add to dv and to G v within the chunk, from `queries` and `grad_outputs`. Leaves a
  // part of `next` to join_gradient().
  void receive_from_head(Prefetches& next) const {
    next.products = 5;
    split_rows<kParts>(scratch_.queries, keys_, chunk_.rows, keys_, rows_, split_.key_rows, split_.key_depth,
                       kChunkRows * split_.key_depth);
    pair_product<kParts, kParts, false>({split_.key_rows, split_.key_depth, kChunkRows * split_.key_depth},
                                        {split_.gained_lanes, key_panel(), split_.key_depth / 2 * kChunkRows},
                                        scratch_.scores, kChunkRows, rows_, rows_, split_.key_depth, next);
    load_grad_rows();
    multiply_responses(next);
    pair_grad_outputs();
    transpose_triangle(scratch_.scores);
    pair_product<kParts, kValueParts, true>(triangle(), grad_pairs(), scratch_.grad_values, values_, rows_, values_,
                                            depth_, next);
    split_to_pairs<kParts>(scratch_.queries, keys_, nullptr, chunk_.rows, keys_, split_.query_pairs, kRowPanel,
                           kChunkRows / 2 * keys_);
    transpose_triangle(scratch_.responses);
    pair_product<kParts, kParts, true>(triangle(), {split_.query_pairs, kRowPanel, kChunkRows / 2 * keys_},
                                       scratch_.received_within, keys_, rows_, keys_, depth_, next);
  }

  // The gradients of the output in pairs of rows.
  void pair_grad_outputs() const {
    split_to_pairs<kValueParts>(scratch_.grad_outputs, values_, nullptr, chunk_.rows, values_, split_.grad_pairs,
                                kRowPanel, kChunkRows / 2 * values_);
  }

  // What those rows, whose gradients of the output are in pairs, add to these channels of G.
  void join_gradient(Channels channels, Prefetches& next) const {
    const int64_t count = channels.end - channels.begin;
    transpose_to_rows<kParts>(scratch_.queries + channels.begin, keys_, chunk_.rows, count, split_.query_columns,
                              kChunkRows, keys_ * kChunkRows);
    pair_product<kParts, kValueParts, true>({split_.query_columns, kChunkRows, keys_ * kChunkRows}, grad_pairs(),
                                            scratch_.state_gradient + channels.begin * values_, values_, count, values_,
                                            depth_, next);
  }

 private:
  BackwardScratch& scratch_;
  const KeyChunk& chunk_;
  const SplitGradients& split_;
  const int64_t keys_, values_;  // padded Dk and Dv
  const int64_t rows_, depth_;   // of the chunk, padded for tiles of rows and for products over the rows

  int64_t key_panel() const { return split_.key_depth / 2 * kPanelLanes; }
  int64_t value_panel() const { return split_.value_depth / 2 * kPanelLanes; }
  SplitRows grad_rows() const { return {split_.grad_rows, split_.value_depth, kChunkRows * split_.value_depth}; }
  SplitPairs grad_pairs() const { return {split_.grad_pairs, kRowPanel, kChunkRows / 2 * values_}; }
  SplitRows triangle() const { return {split_.triangle, kChunkRows, kChunkRows * kChunkRows}; }

  void load_value_lanes() const {
    transpose_to_pairs<kValueParts>(scratch_.values, values_, values_, split_.value_lanes, value_panel(),
                                    split_.value_depth / 2 * kChunkRows, chunk_.rows);
  }
  void load_grad_rows() const {
    split_rows<kValueParts>(scratch_.grad_outputs, values_, chunk_.rows, values_, rows_, split_.grad_rows,
                            split_.value_depth, kChunkRows * split_.value_depth);
  }
  // responses = <do_u, v_t>, those of later keys too.
  void multiply_responses(Prefetches& next) const {
    pair_product<kValueParts, kValueParts, false>(
        grad_rows(), {split_.value_lanes, value_panel(), split_.value_depth / 2 * kChunkRows}, scratch_.responses,
        kChunkRows, rows_, rows_, split_.value_depth, next);
  }
  // The entries on and below the diagonal, transposed; the others become 0.
  void transpose_triangle(float* entries) const {
    for (int64_t row = 0; row < chunk_.rows; ++row) zero(entries + row * kChunkRows + row + 1, rows_ - row - 1);
    transpose_to_rows<kParts>(entries, kChunkRows, chunk_.rows, rows_, split_.triangle, kChunkRows,
                              kChunkRows * kChunkRows);
  }
};

}  // namespace sightline::SIGHTLINE_ISA_NS
