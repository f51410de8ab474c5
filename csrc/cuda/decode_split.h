// Attention of up to 16 query rows over one split of the keys: the kernel in which decoding spends its time.
//
// A block takes one (batch, key head, 16 rows, split). Its four warps take the split's tiles of 16 keys in turn and
// each gathers weights and weighted values of its own (warp_rows.h), in registers; K and V are read once, for all rows
// of the group. At the end the warps' sums are added in a fixed order and go to the workspace, where merge_splits.h
// finds them. Nothing depends on timing, so results repeat bit by bit.
//
// Re-weighting (MATH.md section 2) needs the row's mean and peak before any weight: the first sweep reads the keys and
// leaves the scores in the workspace, at most a quarter of what the keys take; the second reads scores and values.
//
// Infinities and NaN: a warp whose sums are not finite walks its tiles again, with the non-finite numbers of V taken
// out of the products and given only to the rows that weigh their key; finite data pays nothing.
#pragma once

#include <type_traits>

#include "cuda/products_16bit.h"
#include "cuda/products_float32.h"
#include "cuda/warp_rows.h"

namespace sightline::cuda {

enum class Sweep { kWhole, kScores, kWeights };

template <class T, int kWidth, bool kVector, Sweep kSweep>
struct DecodeSplit {
  static constexpr bool kReadsKeys = kSweep != Sweep::kWeights;
  static constexpr bool kReadsValues = kSweep != Sweep::kScores;
  static constexpr bool kIsFloat32 = std::is_same_v<T, Float32>;
  using Products =
      std::conditional_t<kIsFloat32, ProductsFloat32<kWidth, kVector, kReadsValues>, Products16Bit<T, kWidth, kVector>>;
  static constexpr int kBlockThreads = kThreads;
  static constexpr int kBlocksPerProcessor = blocks_per_processor(kIsFloat32, kWidth);
  static constexpr int kMergeStride = kWidthStep + 4;

  struct alignas(8) Floats2 {
    float x, y;
  };
  using ScoreBuffer = Floats2[4][kWarpThreads];

  struct Shared {
    RowInfo rows[kRowBlock];
    RowTotal totals[kRowBlock];
    RowPeak peaks[kRowBlock];
    RowPartial partials[kWarps][kRowBlock];
    ScoreBuffer scores[kReadsKeys ? 1 : kWarps][2];
    union {
      typename Products::Shared products;
      float merged[kWarps][kRowBlock * kMergeStride];
    };
  };

  SIGHTLINE_DEVICE void run(const DecodeProblem& problem, Shared& shared) {
    const AttentionProblem& attention = problem.attention;
    const BlockPlace place = place_of_block(attention);
    const Lane lane = this_lane();
    if (thread_index() < kRowBlock) set_up_row(problem, place, thread_index(), shared.rows[thread_index()]);
    sync_block();
    const KeyRange range = keys_of_block(shared.rows, place, problem.splits);
    if constexpr (kReadsKeys) {
      Products::set_up_queries(attention, place.batch, place.rows, shared.rows, shared.products);
      if (attention.normalize_qk) divide_by_norms(attention, place, lane, shared);
    } else {
      find_peaks(problem, place, lane, shared);
    }
    sync_block();

    WarpRows<kWidth> state;
    for (bool again = false;; again = true) {
      float largest[2] = {-INFINITY, -INFINITY};
      if (!kReadsKeys)
        for (int r = 0; r < 2; ++r) largest[r] = shared.totals[lane.g + r * 8].largest;
      start_rows(state, largest, attention.weight_function);
      sweep(problem, place, range, lane, again, shared, state);
      if (again || !kReadsValues || !any_in_warp(!all_finite(state))) break;
    }
    finish(problem, place, range, lane, shared, state);
  }

 private:
  // 1 / |q_i| into the rows' factors, four rows by each warp.
  SIGHTLINE_DEVICE void divide_by_norms(const AttentionProblem& problem, const BlockPlace& place, const Lane& lane,
                                        Shared& shared) {
    for (int row = lane.warp; row < place.rows; row += kWarps) {
      const char* query = query_row(problem, place.batch, shared.rows[row], T::kBytes);
      float squares = 0.0f;
      for (int column = lane.index; column < problem.head_width; column += kWarpThreads) {
        const float value = load_element<T>(query, column);
        squares = fmaf(value, value, squares);
      }
      for (int mask = 1; mask < kWarpThreads; mask *= 2) squares += shuffle_xor(squares, mask);
      if (lane.index == 0) shared.rows[row].factor *= inverse_of_norm(squares);
    }
  }

  // Between the sweeps: mean and peak of each row, from what all splits found. Four rows by each warp.
  SIGHTLINE_DEVICE void find_peaks(const DecodeProblem& problem, const BlockPlace& place, const Lane& lane,
                                   Shared& shared) {
    const WeightFunction function = problem.attention.weight_function;
    for (int row = lane.warp; row < kRowBlock; row += kWarps) {
      RowTotal total{};
      total.largest = -INFINITY;
      if (row < place.rows)
        total = total_of_splits(problem.row_partials + packed_row(problem.attention, place, row) * problem.splits,
                                problem.splits, function, -INFINITY);
      if (lane.index != 0) continue;
      shared.totals[row] = total;
      shared.peaks[row] = find_peak(problem.attention.reweight, shared.rows[row].visible, total_of(total.weights),
                                    relative_weight(function, total.largest, reference_of(function, total.largest)));
    }
  }

  // Two groups of copies are under way at any time: in the whole sweep the keys and the values of a tile, each asked
  // for again as soon as the last ones are used; in the others this tile and the next.
  SIGHTLINE_DEVICE void sweep(const DecodeProblem& problem, const BlockPlace& place, const KeyRange& range,
                              const Lane& lane, bool finite_only, Shared& shared, WarpRows<kWidth>& state) {
    const AttentionProblem& attention = problem.attention;
    const HeadRows keys = head_rows<T>(attention.key, place.batch, place.key_head, attention.head_width, range.end);
    const HeadRows values =
        head_rows<T>(attention.value, place.batch, place.key_head, attention.value_width, range.end);
    constexpr int32_t kStep = kWarps * kKeyTile;
    constexpr bool kWhole = kSweep == Sweep::kWhole;
    const int32_t first = range.begin + lane.warp * kKeyTile;
    const auto live_at = [&](int32_t tile) { return live_keys(attention, place.batch, lane, tile, range.end); };
    const auto fetch_group = [&](int32_t tile, int buffer) {
      if (tile < range.end) {
        if constexpr (kReadsKeys)
          Products::fetch_keys(shared.products, lane, keys, tile, buffer);
        else
          fetch_scores(problem, place, lane, tile, shared.scores[lane.warp][buffer]);
        if constexpr (kSweep == Sweep::kWeights)
          Products::fetch_values(shared.products, lane, values, tile, live_at(tile), buffer);
      }
      end_copy_group();
    };
    const auto fetch_values = [&](int32_t tile, const OfKeys<bool>& live) {
      if (tile < range.end) Products::fetch_values(shared.products, lane, values, tile, live, 1);
      end_copy_group();
    };

    OfKeys<bool> live = live_at(first);
    int buffer = 0;
    fetch_group(first, 0);
    if constexpr (kWhole)
      fetch_values(first, live);
    else
      fetch_group(first + kStep, 1);
    for (int32_t tile = first; tile < range.end; tile += kStep) {
      ScoreTile scores;
      wait_for_all_but_newest_group();
      if constexpr (kReadsKeys) {
        OfKeys<float> inverse_norms;
        Products::key_products(shared.products, lane, keys, tile, buffer, attention.normalize_qk, scores,
                               inverse_norms);
        fetch_group(tile + (kWhole ? kStep : 2 * kStep), buffer);
        finish_scores(attention, shared.rows, lane, tile, live, inverse_norms, scores);
        raise_references(attention.weight_function, scores, state);
        if constexpr (kSweep == Sweep::kScores) store_scores(problem, place, lane, tile, scores);
      } else {
        take_scores(place, lane, shared.scores[lane.warp][buffer], scores);
      }
      const RowPeak* peaks = kReadsKeys ? nullptr : shared.peaks;
      core::with_weight(attention.weight_function,
                        [&](auto weight) { weigh<decltype(weight)>(attention.reweight, peaks, lane, scores, state); });
      if constexpr (kReadsValues) {
        const Words4 packed = Products::pack_weights(scores);
        add_divisors(scores, state);
        if constexpr (kWhole) wait_for_all_but_newest_group();
        Products::value_products(shared.products, lane, values, tile, live, kWhole ? 1 : buffer, packed, scores,
                                 finite_only, state.values);
        if (finite_only) add_non_finite_values<T>(values, lane, tile, live, scores, state);
      }
      live = live_at(tile + kStep);
      if constexpr (kWhole) fetch_values(tile + kStep, live);
      if constexpr (kSweep == Sweep::kWeights) fetch_group(tile + 2 * kStep, buffer);
      if constexpr (!kWhole) buffer ^= 1;
    }
  }

  // A row of the workspace's scores holds whole tiles, also past the last key.
  SIGHTLINE_DEVICE float* score_row(const DecodeProblem& problem, const BlockPlace& place, int row, int32_t tile) {
    return problem.scores + packed_row(problem.attention, place, row) * score_stride(problem.attention) + tile;
  }

  SIGHTLINE_DEVICE void store_scores(const DecodeProblem& problem, const BlockPlace& place, const Lane& lane,
                                     int32_t tile, const ScoreTile& scores) {
    SIGHTLINE_UNROLL
    for (int r = 0; r < 2; ++r) {
      if (lane.g + r * 8 >= place.rows) continue;
      float* row = score_row(problem, place, lane.g + r * 8, tile);
      SIGHTLINE_UNROLL
      for (int n = 0; n < 2; ++n)
        *reinterpret_cast<Floats2*>(row + key_in_tile(lane, n, 0)) = {scores.entries[n][r * 2],
                                                                      scores.entries[n][r * 2 + 1]};
    }
  }

  SIGHTLINE_DEVICE void fetch_scores(const DecodeProblem& problem, const BlockPlace& place, const Lane& lane,
                                     int32_t tile, ScoreBuffer& to) {
    SIGHTLINE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int row = lane.g + r * 8;
      SIGHTLINE_UNROLL
      for (int n = 0; n < 2; ++n)
        copy_8_bytes(&to[n * 2 + r][lane.index],
                     score_row(problem, place, row < place.rows ? row : 0, tile) + key_in_tile(lane, n, 0),
                     row < place.rows);
    }
  }

  SIGHTLINE_DEVICE void take_scores(const BlockPlace& place, const Lane& lane, const ScoreBuffer& from,
                                    ScoreTile& scores) {
    SIGHTLINE_UNROLL
    for (int r = 0; r < 2; ++r) {
      const bool is_live = lane.g + r * 8 < place.rows;
      SIGHTLINE_UNROLL
      for (int n = 0; n < 2; ++n) {
        const Floats2 pair = from[n * 2 + r][lane.index];
        scores.entries[n][r * 2] = is_live ? pair.x : -INFINITY;
        scores.entries[n][r * 2 + 1] = is_live ? pair.y : -INFINITY;
      }
    }
  }

  // Adds up the four warps in order and leaves the block's sums in the workspace.
  SIGHTLINE_DEVICE void finish(const DecodeProblem& problem, const BlockPlace& place, const KeyRange& range,
                               const Lane& lane, Shared& shared, WarpRows<kWidth>& state) {
    const WeightFunction function = problem.attention.weight_function;
    SIGHTLINE_UNROLL
    for (int r = 0; r < 2; ++r) {
      for (int mask = 1; mask <= 2; mask *= 2)
        core::add(state.weights[r], core::CompensatedSum{shuffle_xor(state.weights[r].sum, mask),
                                                         shuffle_xor(state.weights[r].rest, mask)});
      state.divisor[r] = sum_over_row(state.divisor[r]);
      if (lane.t == 0)
        shared.partials[lane.warp][lane.g + r * 8] = {state.largest[r], state.weights[r].sum, state.weights[r].rest,
                                                      state.divisor[r]};
    }
    sync_block();
    float change[2];
    SIGHTLINE_UNROLL
    for (int r = 0; r < 2; ++r)
      change[r] = change_of_reference(function, state.reference[r], block_reference(function, shared, lane.g + r * 8));
    RowPartial* rows = kReadsKeys ? problem.row_partials : problem.weight_partials;
    if (thread_index() < place.rows)
      rows[packed_row(problem.attention, place, thread_index()) * problem.splits + place.split] =
          block_partial(function, shared, thread_index());
    if constexpr (kReadsValues) {
      if (range.end <= range.begin) return;
      SIGHTLINE_UNROLL
      for (int set = 0; set < ValueSums<kWidth>::kSets; ++set) {
        if (set * kWidthStep >= problem.attention.value_width) continue;
        sync_block();  // the sums of the last set have been read
        SIGHTLINE_UNROLL
        for (int e = 0; e < 8; ++e) {
          SIGHTLINE_UNROLL
          for (int entry = 0; entry < 4; ++entry) {
            const int r = entry / 2;
            shared.merged[lane.warp][(lane.g + r * 8) * kMergeStride + column_in_set(lane, entry % 2, e)] =
                rescaled(state.values.sums[set][e][entry], change[r]);
          }
        }
        sync_block();
        store_set(problem, place, set, shared);
      }
    }
  }

  SIGHTLINE_DEVICE float block_reference(WeightFunction function, const Shared& shared, int row) {
    float largest = shared.partials[0][row].largest;
    for (int warp = 1; warp < kWarps; ++warp) largest = fmaxf(largest, shared.partials[warp][row].largest);
    return reference_of(function, largest);
  }

  SIGHTLINE_DEVICE RowPartial block_partial(WeightFunction function, const Shared& shared, int row) {
    const float reference = block_reference(function, shared, row);
    RowPartial sum{shared.partials[0][row].largest, 0.0f, 0.0f, 0.0f};
    core::CompensatedSum weights{0.0f, 0.0f};
    for (int warp = 0; warp < kWarps; ++warp) {
      const RowPartial& partial = shared.partials[warp][row];
      const float change = change_of_reference(function, reference_of(function, partial.largest), reference);
      sum.largest = fmaxf(sum.largest, partial.largest);
      core::add(weights, core::scaled({partial.weights, partial.weights_rest}, change));
      sum.divisor += partial.divisor * change;
    }
    sum.weights = weights.sum;
    sum.weights_rest = weights.rest;
    return sum;
  }

  SIGHTLINE_DEVICE void store_set(const DecodeProblem& problem, const BlockPlace& place, int set,
                                  const Shared& shared) {
    const int64_t width = problem.attention.value_width;
    for (int index = thread_index(); index < place.rows * kWidthStep; index += kThreads) {
      const int row = index / kWidthStep, column = index % kWidthStep;
      if (set * kWidthStep + column >= width) continue;
      float sum = shared.merged[0][row * kMergeStride + column];
      for (int warp = 1; warp < kWarps; ++warp) sum += shared.merged[warp][row * kMergeStride + column];
      const int64_t slot = packed_row(problem.attention, place, row) * problem.splits + place.split;
      problem.value_partials[slot * width + set * kWidthStep + column] = sum;
    }
  }
};

}  // namespace sightline::cuda
