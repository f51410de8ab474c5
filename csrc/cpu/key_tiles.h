// A tile of keys made ready for the products of forward: widened, split into parts or transposed, with the factors of
// its keys. For one unit tile by tile, or once for all units of a key head.
#pragma once

#include "cpu/score_tile.h"
#include "cpu/split_product.h"
#include "cpu/workspace.h"

namespace sightline::SIGHTLINE_ISA_NS {

// Widths as the products pad them, and how far the parts of a tile are apart.
struct KeyTileSizes {
  int64_t padded_depth, padded_width, key_part, column_part;

  explicit KeyTileSizes(const AttentionProblem& problem)
      : padded_depth(core::round_up(problem.head_width, kPairDepth)),
        padded_width(core::round_up(problem.value_width, Vec::kWidth)),
        key_part(kKeyTile * padded_depth),
        column_part(kKeyTile * padded_width) {}
};

// Where a tile may put what it cannot read as it lies.
struct KeyTileMemory {
  float* keys;              // (kKeyTile, padded_depth)
  float* values;            // (kKeyTile, padded_width)
  uint16_t* key_bits;       // (parts, kKeyTile, padded_depth)
  uint16_t* value_columns;  // (parts, padded_width, kKeyTile)
};

// Keys of one part: where they lie when nothing needs padding and, if they are to be read often, they are dense.
[[maybe_unused]] static void set_up_key_bits(const AttentionProblem& problem, const KeyTileSizes& sizes,
                                             const uint16_t* keys, bool often, const KeyTileMemory& memory,
                                             KeyTile& tile) {
  if (sizes.padded_depth == problem.head_width && tile.count % kPairRows == 0 &&
      (!often || problem.key.row_stride == problem.head_width)) {
    tile.key_bits = keys;
    tile.key_bits_stride = problem.key.row_stride;
    return;
  }
  const auto bytes = static_cast<size_t>(problem.head_width) * sizeof(uint16_t);
  const auto padded_bytes = static_cast<size_t>(sizes.padded_depth) * sizeof(uint16_t);
  uint16_t* rows = memory.key_bits;
  for (int64_t j = 0; j < core::round_up(tile.count, kPairRows); ++j) {
    uint16_t* row = rows + j * sizes.padded_depth;
    const size_t filled = j < tile.count ? bytes : 0;
    __builtin_memcpy(row, keys + (filled != 0 ? j * problem.key.row_stride : 0), filled);
    __builtin_memset(reinterpret_cast<char*>(row) + filled, 0, padded_bytes - filled);
  }
  tile.key_bits = rows;
  tile.key_bits_stride = sizes.padded_depth;
}

// Widens rows of keys or values, with zeros up to `padded_width`.
[[maybe_unused]] static void widen_rows(const void* rows, int64_t row_stride, DType dtype, int64_t count, int64_t width,
                                        float* to, int64_t padded_width) {
  for (int64_t row = 0; row < count; ++row) {
    widen(advance(rows, row * row_stride, dtype), dtype, to + row * padded_width, width);
    zero(to + row * padded_width + width, padded_width - width);
  }
}

// Keys [first, first + kKeyTile) of a key head. `often`: for many units. `known`, if not null, has their factors.
template <int kParts>
static void load_keys(const AttentionProblem& problem, const KeyTileSizes& sizes, int64_t batch, int64_t key_head,
                      int64_t first, bool often, const KeyTile* known, const KeyTileMemory& memory, KeyTile& tile) {
  if (known != nullptr) tile = *known;
  tile.first = first;
  tile.count = static_cast<int>(core::smaller(kKeyTile, problem.keys - first));
  const void* keys = row_of(problem.key, problem.dtype, batch, key_head, first);
  const bool direct = problem.dtype == DType::kFloat32;
  tile.keys = direct ? static_cast<const float*>(keys) : memory.keys;
  tile.key_stride = direct ? problem.key.row_stride : sizes.padded_depth;
  // One part is read as it is, but norms are taken of fp32.
  if (!direct && (kParts != 1 || (problem.normalize_qk && known == nullptr)))
    widen_rows(keys, problem.key.row_stride, problem.dtype, tile.count, problem.head_width, memory.keys,
               sizes.padded_depth);
  tile.key_bits_part = sizes.key_part;
  if constexpr (kParts == 1) set_up_key_bits(problem, sizes, static_cast<const uint16_t*>(keys), often, memory, tile);
  if constexpr (kParts > 1) {
    split_rows<kParts>(tile.keys, tile.key_stride, tile.count, sizes.padded_depth,
                       core::round_up(tile.count, kPairRows), memory.key_bits, sizes.padded_depth, sizes.key_part);
    tile.key_bits = memory.key_bits;
    tile.key_bits_stride = sizes.padded_depth;
  }
  if (known == nullptr) set_up_key_factors(problem, batch, tile);
}

// The values of a tile whose keys are loaded.
template <int kParts>
static void load_values(const AttentionProblem& problem, const KeyTileSizes& sizes, int64_t batch, int64_t key_head,
                        const KeyTileMemory& memory, KeyTile& tile) {
  const void* values = row_of(problem.value, problem.dtype, batch, key_head, tile.first);
  const int64_t row_stride = problem.value.row_stride;
  const bool direct = problem.dtype == DType::kFloat32 && sizes.padded_width == problem.value_width;
  tile.values = direct ? static_cast<const float*>(values) : memory.values;
  tile.value_stride = direct ? row_stride : sizes.padded_width;
  tile.value_columns = memory.value_columns;
  if constexpr (kParts == 1)
    return transpose_bfloat16(static_cast<const uint16_t*>(values), row_stride, tile.count, problem.value_width,
                              memory.value_columns, kKeyTile);
  if (!direct)
    widen_rows(values, row_stride, problem.dtype, tile.count, problem.value_width, memory.values, sizes.padded_width);
  if constexpr (kParts > 1)
    transpose_to_rows<kParts>(tile.values, tile.value_stride, tile.count, sizes.padded_width, memory.value_columns,
                              kKeyTile, sizes.column_part);
}

// The key tiles of a few key heads at a time, made ready once for all their units, by all threads.
//
// A unit of many tiles of rows reads its own packing of keys and values from a nearer cache than a shared one: it takes
// the factors of the keys alone. A unit of few, as re-weighting has them, would pack as much as it multiplies.
class PackedKeys {
 public:
  // As many heads as fit kPackedBytes; none where they have too few units for all threads, where a head has one unit
  // alone, or where nothing is to be done.
  PackedKeys(const AttentionProblem& problem, int parts, int64_t units, int64_t tiles_per_unit, int64_t threads)
      : problem_(problem),
        parts_(parts),
        sizes_(problem),
        tiles_((problem.keys + kKeyTile - 1) / kKeyTile),
        reads_directly_(problem.dtype == DType::kFloat32 && sizes_.padded_width == problem.value_width),
        complete_(parts > 0 ? tiles_per_unit <= kFewTilesPerUnit : reads_directly_),
        heads_(count_heads(units, threads)),
        memory_(layout(nullptr)) {
    layout(memory_.get());
  }

  // Whether of_head() has all of a tile, or what load_keys() takes as known.
  bool complete() const { return complete_; }
  int64_t heads() const { return heads_; }

  // The tiles of a key head; `index` counts from the first one packed.
  const KeyTile* of_head(int64_t index) const { return key_tiles_ + index * tiles_; }

  void pack(const Parallel& parallel, int64_t first_head, int64_t heads) {
    const int64_t blocks = (tiles_ + kPackedBlock - 1) / kPackedBlock;
    for_each_unit<Buffers>(
        parallel, heads * blocks, *this, [this, first_head, blocks](int64_t index, Buffers& buffers) {
          const int64_t head = index / blocks;
          const core::KeyInterval seen = seen_keys((first_head + head) / problem_.key_heads);
          const int64_t begin = core::larger(index % blocks * kPackedBlock, seen.first / kKeyTile);
          const int64_t end =
              core::smaller(core::smaller(tiles_, (index % blocks + 1) * kPackedBlock), seen.last / kKeyTile + 1);
          for (int64_t tile = begin; tile < end; ++tile)
            with_pair_parts(parts_, [&](auto parts) { pack_tile<parts>(first_head, head, tile, buffers); });
        });
  }

 private:
  struct Buffers {
    explicit Buffers(const PackedKeys& packed) : memory(layout(packed.sizes_, nullptr)) {
      layout(packed.sizes_, memory.get());
    }
    int64_t layout(const KeyTileSizes& sizes, char* base) {
      Arena arena(base);
      keys = arena.take<float>(sizes.key_part);
      values = arena.take<float>(sizes.column_part);
      return arena.used();
    }
    Allocation memory;
    float *keys = nullptr, *values = nullptr;
  };

  int64_t count_heads(int64_t units, int64_t threads) const {
    const bool has_work = problem_.normalize_qk || (complete_ && parts_ > 0);
    if (units < 2 || tiles_ == 0 || !has_work) return 0;
    const int64_t bytes = tiles_ * (static_cast<int64_t>(sizeof(KeyTile)) + 2 * (key_bits() + column_bits()));
    const int64_t all = problem_.batch * problem_.key_heads, heads = core::smaller(all, kPackedBytes / bytes);
    // Threads wait for each other after the units of so many heads.
    return heads < all && heads * units < kUnitsPerThread * threads ? 0 : heads;
  }

  // What the rows of a batch entry see lies between these keys: without documents, intervals move on with the queries.
  core::KeyInterval seen_keys(int64_t batch) const {
    core::KeyInterval seen;
    seen.last = problem_.keys - 1;
    if (problem_.cu_seqlens_q != nullptr) return seen;
    const core::KeyInterval first = core::visible_interval(problem_, batch, 0);
    const core::KeyInterval last = core::visible_interval(problem_, batch, problem_.queries - 1);
    if (first.last >= first.first) seen.first = core::larger(first.first, 0);
    if (last.last >= last.first) seen.last = core::smaller(last.last, seen.last);
    return seen;
  }

  // Of a tile, in numbers.
  int64_t key_bits() const { return complete_ ? parts_ * sizes_.key_part : 0; }
  int64_t column_bits() const { return complete_ ? parts_ * sizes_.column_part : 0; }

  int64_t layout(char* base) {
    Arena arena(base);
    key_tiles_ = arena.take<KeyTile>(heads_ * tiles_);
    key_bits_ = arena.take<uint16_t>(heads_ * tiles_ * key_bits());
    value_columns_ = arena.take<uint16_t>(heads_ * tiles_ * column_bits());
    return arena.used();
  }

  template <int kParts>
  void pack_tile(int64_t first_head, int64_t head, int64_t tile, const Buffers& buffers) {
    const int64_t batch = (first_head + head) / problem_.key_heads, key_head = (first_head + head) % problem_.key_heads;
    const int64_t place = head * tiles_ + tile;
    const KeyTileMemory memory{buffers.keys, buffers.values, key_bits_ + place * key_bits(),
                               value_columns_ + place * column_bits()};
    KeyTile& target = key_tiles_[place];
    if (!complete_)
      return load_keys<0>(problem_, sizes_, batch, key_head, tile * kKeyTile, true, nullptr, memory, target);
    load_keys<kParts>(problem_, sizes_, batch, key_head, tile * kKeyTile, true, nullptr, memory, target);
    load_values<kParts>(problem_, sizes_, batch, key_head, memory, target);
  }

  const AttentionProblem& problem_;
  int parts_;
  KeyTileSizes sizes_;
  int64_t tiles_;
  bool reads_directly_, complete_;
  int64_t heads_;
  Allocation memory_;
  KeyTile* key_tiles_ = nullptr;
  uint16_t *key_bits_ = nullptr, *value_columns_ = nullptr;
};

}  // namespace sightline::SIGHTLINE_ISA_NS
