// The sizes of all tiles, in one place: what a micro-kernel keeps in registers, what is near in a cache while it is
// used, how long sums of one precision may grow, and how work is cut into units for threads. The caches meant are those
// of Sapphire Rapids, 48 KiB and 2 MiB per core.
#pragma once

#include "cpu/vec.h"

namespace sightline::SIGHTLINE_ISA_NS {

// The sums that a micro-kernel keeps: rows of A by vectors of B.
struct RegisterTile {
  int rows, vectors;
};

// Of one instruction set, for products of fp32 (product.h) and of pairs of bfloat16 (pair_product.h).
struct RegisterTiles {
  RegisterTile product, pairs;
};

// Sums, one row of vectors of B and one number of A share 16 registers: 8 + 2 + 1, and one for a product that is not
// fused with its sum.
constexpr RegisterTiles kGenericTiles{.product = {4, 2}, .pairs = {}};
// 12 + 2 + 1 of 16.
constexpr RegisterTiles kAvx2Tiles{.product = {6, 2}, .pairs = {}};
// 24 + 4 + 1 of 32; pairs 16 + 4 + 1: their rows come in sixteens (kPairRows), which six do not divide.
constexpr RegisterTiles kAvx512Tiles{.product = {6, 4}, .pairs = {4, 4}};

constexpr RegisterTiles kRegisterTiles = Vec::kWidth == 16  ? kAvx512Tiles
                                         : Vec::kWidth == 8 ? kAvx2Tiles
                                                            : kGenericTiles;

// The tile unit multiplies 16 rows by 16 lanes over a depth of 32; of its eight tiles four are sums, two by two
// (vec_tile.h). Operands of products of pairs are padded to that, whether a machine has the unit or not.
constexpr int64_t kPairRows = 16;
constexpr int64_t kPairDepth = 32;
constexpr int64_t kPanelLanes = 16;
static_assert(kPairRows % kAvx512Tiles.pairs.rows == 0);

// Products sum over this much of their depth at a time and add these sums up: the error of one long chain grows with
// its length.
constexpr int64_t kDepthChunk = 128;

// Results of at least so much are written past the caches where the kernel has nothing to wait for but memory
// (result_rows.h): a second-level cache of them.
constexpr int64_t kLineBytes = 64;
constexpr int64_t kStreamedBytes = 2 * 1024 * 1024;

// Attention, both ways. 64 x 64: a score tile (16 KiB) and a tile of V at D = 64 share the 48 KiB first-level cache.
constexpr int kRowTile = 64;
constexpr int kKeyTile = 64;
// Units of work for each thread, so that all threads end together.
constexpr int64_t kUnitsPerThread = 4;

// Attention, forward. More rows per unit read K and V less often, and load or transpose them less often where they are
// not used as they lie; a unit's state should stay in a second-level cache.
constexpr int64_t kMaxTilesPerUnit = 8;
constexpr int64_t kUnitStateBytes = 512 * 1024;
// Weights kept from one sweep of re-weighting to the next: a unit has so few tiles of rows that they fit a second-level
// cache with the keys and values beside them. From a cache further out they still come sooner than they are computed
// again.
constexpr int64_t kKeptBytes = 1024 * 1024;
constexpr int64_t kMostKeptBytes = 4 * 1024 * 1024;
// Weighted values are summed over so many keys, and these sums added up: the error must not grow with their number.
constexpr int64_t kChunkKeys = 2048;
// Key tiles that a tile of rows goes through before their weights meet the values, with products of pairs: sums of
// products are read and written once for all of them.
constexpr int64_t kPairKeyTiles = 4;
static_assert(kChunkKeys % (kPairKeyTiles * kKeyTile) == 0);

// Keys made ready once for all units of a key head (key_tiles.h): of as many heads as fit this memory, so many tiles by
// a thread at a time. A unit of more than a few tiles of rows reads its own from a nearer cache instead.
constexpr int64_t kPackedBytes = 32 * 1024 * 1024;
constexpr int64_t kPackedBlock = 8;
constexpr int64_t kFewTilesPerUnit = 2;

// A boolean mask packed once for all heads takes a fifth of its own size, at most this much: one that repeats itself
// may be far larger in tiles. Rows of it are asked for so many tiles before they are packed.
constexpr int64_t kPackedMaskBytes = 64 * 1024 * 1024;
constexpr int64_t kPackedMaskTilesAhead = 4;

// Attention, backward. Enough units for this many threads when there are few heads; more would cost a partial dQ each.
constexpr int64_t kWantedUnits = 8;
// dK and dV are summed over this many rows, and these sums added up, as weighted values are.
constexpr int64_t kGradientRows = 2048;
// Row tiles that go through the keys of a unit together, and the bytes of their operands and of dQ: with a tile of
// keys, its values and their gradients (up to 160 KiB at D = 128) they stay in a second-level cache of 1 MiB.
constexpr int64_t kMostRowTilesTogether = 8;
constexpr int64_t kRowTilesBytes = 640 * 1024;
static_assert(kGradientRows % (kMostRowTilesTogether * kRowTile) == 0);

// Decoding. Beyond so many rows per key head the tiles of attention are full enough.
constexpr int64_t kMaxDecodeRows = 8;
// Columns are taken two vectors at a time.
constexpr int64_t kColumnGroup = 2 * Vec::kWidth;
// Rows that are computed together: their sums live in registers.
constexpr int kRowGroup = 4;
// Registers for the sums of weighted values.
constexpr int kValueSums = Vec::kWidth == 16 ? 16 : 8;
// Values of so many keys stay in the first-level cache while all rows use them.
constexpr int64_t kValueTile = 64;
// Keys of a unit: long enough to hide what a unit costs besides, short enough that one long head keeps all threads
// busy.
constexpr int64_t kDecodeChunk = 2048;
// Rows are asked for so far ahead of their use, into the second-level cache: into the first, they would wait for its
// few line buffers and hold up the loads behind them.
constexpr int64_t kKeyBytesAhead = 8 * 1024;
constexpr int64_t kValueBytesAhead = 32 * 1024;

// The additive recurrence. Products with the state cost Dk Dv per row whatever the chunk, those within it rows / 2 (Dk
// + Dv); the state is read from the second-level cache once per chunk.
constexpr int kChunkRows = 64;
// Rows of a triangular product that share their number of columns.
constexpr int kTriangleRows = 16;
static_assert(kChunkRows % kTriangleRows == 0 && kTriangleRows % Vec::kWidth == 0);
// Scores are summed in short chains: in a sequence of a few rows a gradient of the query is little more than one of
// them, and a chain as long as the width has twice the error of the dot product that it is compared with.
constexpr int64_t kScoreDepth = 16;
// A chunk of fewer rows, as steep keys make it, costs less in fp32 than its state costs to be split for the tile unit.
constexpr int kLeastSplitRows = 16;
// Steps of a product's depth between two times that it asks for memory: about a hundred cycles of full
// tiles.
constexpr int64_t kAskDepth = 192 / (kRegisterTiles.product.rows * kRegisterTiles.product.vectors);
// Columns of a state that stay in the second-level cache at Dk = 512.
constexpr int64_t kLargestBlock = 256;
// Without order a long sequence is cut into segments, at most so many of all heads together, of at least so many rows:
// the states of the segments, which are merged, then cost a few percent of their products.
constexpr int64_t kSegmentUnits = 32;
constexpr int64_t kSegmentRows = 2048;
// Its backward pass keeps inverse normalisers and q dq products of so many rows between the sweep forward and the sweep
// back: longer sequences store the state at the start of every segment, and compute the rest of it again.
constexpr int64_t kKeptRows = 16384;
// With order, where there are fewer heads than threads, chunks that the threads go through together: enough for a phase
// to last longer than they take to meet, and few enough to stay in their second-level caches. With 16 on two threads
// both passes cost a fifth more processor time.
constexpr int kLeastWindow = 8;
constexpr int kLargestWindow = 64;
constexpr int64_t kLeastWindowRows = 8 * kChunkRows;
// The share of one thread's time up to which windows pay (suits_windows()). Less where a forward pass can go by blocks
// of a head's values instead, each with all weights of its own, and where products are fast, on the tile unit: there
// what windows copy weighs more than a second thread brings.
constexpr double kMostWindowShare = 0.4;
constexpr double kMostSlowWindowShare = 0.65;
// One row after the other, as in decoding: query heads whose outputs stay in registers while the state passes, and the
// vectors of the state that are under way, twice as many where there is one head, so that a row of 128 columns is one
// run of memory under AVX-512.
constexpr int kStepHeads = 4;
constexpr int kStepVectors = kRegisterTiles.product.vectors;
// Rows of a new state that are asked for ahead, to be written: 4 KiB of 128 columns.
constexpr int64_t kStepRowsAhead = 8;

}  // namespace sightline::SIGHTLINE_ISA_NS
