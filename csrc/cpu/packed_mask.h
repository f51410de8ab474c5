// A boolean attn_mask that the query heads share, packed once for all of them: bits of tiles as kernels use them, which
// tiles hide nothing or everything, and how many keys each row sees before each tile. Bytes of a mask as large as the
// scores, whose rows lie far apart, would otherwise be waited for once per head.
#pragma once

#include "cpu/tile_visibility.h"
#include "cpu/workspace.h"

namespace sightline::SIGHTLINE_ISA_NS {

class PackedMask {
 public:
  PackedMask(const AttentionProblem& problem, const Parallel& parallel)
      : problem_(problem),
        batches_(problem.attn_mask.strides[0] == 0 ? 1 : problem.batch),
        row_tiles_((problem.queries + kRowTile - 1) / kRowTile),
        key_tiles_((problem.keys + kKeyTile - 1) / kKeyTile),
        tiles_(pays(problem) ? batches_ * row_tiles_ * key_tiles_ : 0),
        memory_(layout(nullptr)) {
    if (tiles_ == 0) return;
    layout(memory_.get());
    for_each_unit<NoScratch>(parallel, batches_ * row_tiles_, *this,
                             [this](int64_t index, NoScratch&) { pack(index / row_tiles_, index % row_tiles_); });
  }

  // The problem as given, with its mask in tiles where they are packed.
  AttentionProblem problem() const {
    AttentionProblem with_tiles = problem_;
    if (tiles_ > 0) with_tiles.mask_tiles = {lanes_, seen_before_, shows_, row_tiles_ * key_tiles_, key_tiles_};
    if (batches_ == 1) with_tiles.mask_tiles.batch_stride = 0;
    return with_tiles;
  }

 private:
  // Tiles of rows must be tiles of the mask: they are numbered through the query heads of a key head.
  bool pays(const AttentionProblem& problem) const {
    const bool aligned = problem.heads == problem.key_heads || problem.queries % kRowTile == 0;
    constexpr int64_t kMostTiles = kPackedMaskBytes / (kKeyTile * 12 + 1);
    return masks_with_bytes(problem) && problem.attn_mask.strides[1] == 0 && problem.heads > 1 && aligned &&
           batches_ * row_tiles_ * key_tiles_ <= kMostTiles;
  }

  int64_t layout(char* base) {
    Arena arena(base);
    lanes_ = arena.take<uint64_t>(tiles_ * kKeyTile);
    seen_before_ = arena.take<int32_t>(tiles_ * kRowTile);
    shows_ = arena.take<TileShows>(tiles_);
    return arena.used();
  }

  // The key tiles that rows [begin, end) may see, in any batch entry that has this mask: intervals move on with the
  // rows but for documents.
  core::KeyInterval seen_tiles(int64_t batch, int64_t begin, int64_t end) const {
    core::KeyInterval tiles{0, key_tiles_ - 1};
    if (problem_.cu_seqlens_q != nullptr) return tiles;
    tiles.first = key_tiles_;
    tiles.last = -1;
    const int64_t entries = batches_ == 1 ? problem_.batch : batch + 1;
    for (int64_t entry = batches_ == 1 ? 0 : batch; entry < entries; ++entry) {
      const int64_t first = core::larger(core::visible_interval(problem_, entry, begin).first, 0);
      const int64_t last = core::smaller(core::visible_interval(problem_, entry, end - 1).last, problem_.keys - 1);
      if (last < first) continue;
      tiles.first = core::smaller(tiles.first, first / kKeyTile);
      tiles.last = core::larger(tiles.last, last / kKeyTile);
    }
    return tiles;
  }

  void pack(int64_t batch, int64_t row_tile) {
    const int64_t begin = row_tile * kRowTile, end = core::smaller(problem_.queries, begin + kRowTile);
    const core::KeyInterval seen = seen_tiles(batch, begin, end);
    int32_t before[kRowTile] = {};
    for (int64_t key_tile = seen.first; key_tile <= seen.last; ++key_tile) {
      const int64_t first = key_tile * kKeyTile, count = core::smaller(kKeyTile, problem_.keys - first);
      const int64_t tile = (batch * row_tiles_ + row_tile) * key_tiles_ + key_tile;
      uint64_t rows[kRowTile];
      uint64_t any = 0, all = ~uint64_t{0} >> (kKeyTile - count);
      const uint64_t complete = all;
      for (int64_t row = 0; row < kRowTile; ++row) {
        seen_before_[tile * kRowTile + row] = before[row];
        rows[row] = 0;
        if (begin + row >= end) continue;
        prefetch_mask(problem_.attn_mask, batch, 0, begin + row, first + kPackedMaskTilesAhead * kKeyTile, kKeyTile);
        rows[row] = mask_bits(problem_, batch, 0, begin + row, first, count);
        before[row] += __builtin_popcountll(rows[row]);
        any |= rows[row];
        all &= rows[row];
      }
      shows_[tile] = any == 0 ? TileShows::kNothing : all == complete ? TileShows::kEverything : TileShows::kSome;
      transpose_bits(rows);
      __builtin_memcpy(lanes_ + tile * kKeyTile, rows, sizeof rows);
    }
  }

  const AttentionProblem& problem_;
  int64_t batches_, row_tiles_, key_tiles_, tiles_;
  Allocation memory_;
  uint64_t* lanes_ = nullptr;
  int32_t* seen_before_ = nullptr;
  TileShows* shows_ = nullptr;
};

}  // namespace sightline::SIGHTLINE_ISA_NS
