// What one call of an attention kernel is given: sizes, pointers with strides, and options. Plain data, no torch.
//
// Strides count elements. Symbols as in MATH.md: B batch, H query heads, Hk key heads, M queries, N keys, D and Dv
// widths.
#pragma once

#include <cstdint>

#include "core/weights.h"

namespace sightline {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16 };
enum class MaskKind : int32_t { kNone, kBool, kFloat32, kFloat16, kBFloat16 };

// A (batch, head, row, column) tensor whose last axis is contiguous.
struct HeadsView {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 0;
};

// attn_mask as it came; a broadcast axis has stride 0.
struct MaskView {
  const void* data = nullptr;
  MaskKind kind = MaskKind::kNone;
  int64_t strides[4] = {0, 0, 0, 0};
};

// What a tile of a mask leaves visible.
enum class TileShows : uint8_t { kNothing, kSome, kEverything };

// A boolean attn_mask in tiles of 64 rows by 64 keys, tiles of keys within tiles of rows; null where it is not packed.
struct MaskTiles {
  const uint64_t* lanes = nullptr;           // (tiles,64): bit r of a key: row r of the tile sees it
  const int32_t* seen_before = nullptr;      // (tiles,64): how many keys a row sees in earlier tiles
  const TileShows* shows = nullptr;          // (tiles,)
  int64_t batch_stride = 0, row_stride = 0;  // in tiles
};

// Section 2 of MATH.md; power 0 means no re-weighting.
struct ReweightOptions {
  float power = 0.0f;
  float offset = 1.0f;
  int64_t exempt_rows = 3;
};

// Columns of `saved_rows`, what backward needs to know of a row. The last four only under re-weighting.
enum SavedRow : int {
  kSavedShift = 0,       // subtracted from every score before exp (softmax), 0 for softplus
  kSavedNormalizer = 1,  // Z of the shifted scores in the weight function's unit, 0 where the row sees no key
  kSavedMean = 2,        // mu
  kSavedPeak = 3,        // m
  kSavedWeightSum = 4,   // S; 0 marks a flat row, which is plain attention
  kSavedResponse = 5,    // R
};
constexpr int kSavedWidthPlain = 2;
constexpr int kSavedWidthReweight = 6;

struct AttentionProblem {
  int64_t batch = 0, heads = 0, key_heads = 0, queries = 0, keys = 0, head_width = 0, value_width = 0;
  DType dtype = DType::kFloat32;
  HeadsView query, key, value, output;
  float* log_normalizer = nullptr;  // (B,H,M)
  float* saved_rows = nullptr;      // (B,H,M,2 or 6), null when no gradient is needed
  float* saved_values = nullptr;    // (B,H,M,Dv), U of section 2, null unless re-weighting with gradients

  const int64_t* key_lengths = nullptr;  // (B,), already clamped to [0, N]
  const uint8_t* key_mask = nullptr;     // (B,N) with these strides
  int64_t key_mask_strides[2] = {0, 0};
  const int32_t* visible_prefix = nullptr;  // (B,N+1): how many keys before j take part; with key_mask only
  MaskView attn_mask;
  MaskTiles mask_tiles;                 // of attn_mask, made by the kernels for themselves
  const float* alibi_slopes = nullptr;  // (H,)
  const float* sinks = nullptr;         // (H,)
  const float* scales = nullptr;        // (H,), always given
  const int32_t* cu_seqlens_q = nullptr;
  const int32_t* cu_seqlens_k = nullptr;
  int64_t documents = 0;

  bool causal = false;
  int64_t window_left = -1, window_right = -1;  // -1: unlimited
  WeightFunction weight_function = WeightFunction::kSoftmax;
  bool length_scale = false;
  bool normalize_qk = false;
  float softcap = 0.0f;  // 0: none
  ReweightOptions reweight;

  bool dropout = false;
  uint32_t dropout_threshold = 0;  // a weight is kept when its hash is at least this
  float dropout_scale = 1.0f;      // 1 / (1 - p)
  uint64_t dropout_seed = 0;
};

// Backward reads the problem (its output, saved rows and saved values included) and these.
struct AttentionGradients {
  HeadsView grad_output;
  const float* grad_log_normalizer = nullptr;  // (B,H,M) or null
  HeadsView grad_query, grad_key, grad_value;  // written, in the query's dtype
  // One of these where a mask wants its gradient, zeroed by the caller: a mask with an entry for each score, or one
  // that is broadcast, whose entries sum up to B * H * M * N numbers each.
  float* grad_mask = nullptr;
  double* grad_mask_sums = nullptr;
  int64_t grad_mask_strides[4] = {0, 0, 0, 0};
  float* grad_sinks = nullptr;   // (H,), written
  float* grad_scales = nullptr;  // (H,), written
};

// Threads are the caller's: `run` calls body(context, index) on up to `threads` threads at once, at least one, and
// returns when all have returned. Bodies take their work from shared counters, so it does not matter how many there
// are. The index is below `threads`; a runner that keeps its threads gives each the same one in every call.
struct Parallel {
  void (*run)(void (*body)(void* context, int64_t thread), void* context, void* state) = nullptr;
  void* state = nullptr;
  int threads = 1;
};

}  // namespace sightline
