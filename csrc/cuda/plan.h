// How the work of a launch is cut into items, one block each at a time: by shape and element size alone,
// never by the machine, so that sums are the same bits everywhere.
#pragma once

#include <cstdint>

#include "../attribution.h"

namespace attrfast::cuda {

constexpr int kThreads = 256;  // of every block

// Terms that a thread adds up in the compute type before they go into a tree of threads and a double:
// keeps float sums exact to a few ulp however large the map.
constexpr int kChain = 16;

// Rows (the positions of one sample and channel) up to this length share a block.
constexpr int kLongestPacked = 1024;
constexpr int kPackedElements = 2 * kLongestPacked;

// Items of a launch that keep a large GPU busy.
constexpr int64_t kManyItems = 1024;

enum Path : int {
  kRows = 0,     // an item is a piece of one row
  kPacked = 1,   // an item is several whole rows
  kColumns = 2,  // channels-last: an item is some positions of a sample, in some of its channels
};

struct Cut {
  Path path;
  int64_t items;
  int64_t pieces;  // of one row's sum
  int64_t length;  // kRows: elements of a piece; kColumns: positions of a piece
  int rows;        // kPacked: rows of an item
  int group;       // kPacked: neighbouring threads that add up a row
  int lanes;       // kColumns: channels of a slot, 1 where slots don't divide the channels
  int width;       // kColumns: slots side by side in a block
  int height;      // kColumns: positions at once in a block
  int64_t chunks;  // kColumns: items side by side that cover all channels
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Channels-last: narrower blocks where wide ones are too few to fill the GPU, but never less than the 128
// bytes that a GPU fetches together.
inline Cut columns_cut(int64_t n, int64_t c, int64_t p, int element) {
  const int slot = 16 / element;
  Cut cut = {};
  cut.path = kColumns;
  cut.lanes = c % slot == 0 ? slot : 1;
  const int64_t slots = c / cut.lanes;
  for (int bytes = 512; bytes >= 128; bytes /= 2) {
    cut.chunks = ceil_div(slots, bytes / (cut.lanes * element));
    cut.width = static_cast<int>(ceil_div(slots, cut.chunks));
    cut.height = kThreads / cut.width;
    cut.length = int64_t{cut.height} * kChain;
    cut.pieces = ceil_div(p, cut.length);
    cut.items = n * cut.pieces * cut.chunks;
    if (cut.items >= kManyItems) break;
  }
  return cut;
}

// Threads that add up a row of p elements: 4 each and more.
inline int group_of(int64_t p, int warp) {
  int group = 1;
  while (group < warp && group * 8 <= p) group *= 2;
  return group;
}

inline Cut cut_of(const Shape& shape, int element, int warp) {
  const int64_t rows = shape.n * shape.c;
  Cut cut = {};
  cut.pieces = cut.length = 1;
  if (shape.p == 0) {  // every sum is 0, in any layout
    cut.path = kRows;
    cut.items = rows;
    return cut;
  }
  if (shape.layout == kChannelsLast) return columns_cut(shape.n, shape.c, shape.p, element);
  if (shape.p <= kLongestPacked) {
    cut.path = kPacked;
    cut.rows = static_cast<int>(kPackedElements / shape.p);
    cut.group = group_of(shape.p, warp);
    cut.items = ceil_div(rows, cut.rows);
    return cut;
  }
  cut.path = kRows;
  // Few long rows are cut finer, so that there are blocks enough.
  for (int chain = kChain; chain >= 2; chain /= 2) {
    cut.length = int64_t{kThreads} * (16 / element) * chain;
    cut.pieces = ceil_div(shape.p, cut.length);
    cut.items = rows * cut.pieces;
    if (cut.items >= kManyItems / 2) break;
  }
  return cut;
}

// Bytes of shared memory of a block; elements are summed in `compute` bytes. Packed rows need one slot
// more, because the first row may begin inside a slot.
inline int shared_of(const Cut& cut, int element, int compute) {
  const int slot = 16 / element;
  if (cut.path == kPacked) return (kPackedElements + 2 * slot) * compute;
  if (cut.path == kColumns) return kThreads * cut.lanes * compute;
  return 32 * static_cast<int>(sizeof(double));
}

// -- max-pooling -----------------------------------------------------------------------------------

// Input that the forward keeps in shared memory, and windows that the backward does.
constexpr int kStagedBytes = 16384;
constexpr int kStagedWindows = 1536;

struct PoolCut {
  // Channels-first, an item's tensors pass through shared memory: several whole planes (the positions of
  // one sample and channel), or a band of one. Where not even one row of windows has room there, and
  // channels-last, threads read what they need from global memory, as `direct` says.
  bool staged;
  int64_t items, pieces;  // pieces: of one plane
  int64_t planes;         // of an item
  int64_t band;           // rows of windows of an item
  int group;  // neighbouring threads that add up a plane: its input forward, its windows back
  Cut direct;
};

// Planes of `size` elements, or bands of `band` rows where that is too much for `room`.
inline PoolCut staged_cut(int64_t all_planes, int64_t size, int64_t room, int64_t band, int64_t rows) {
  PoolCut cut = {};
  cut.staged = true;
  if (size <= room) {
    const int64_t enough = ceil_div(all_planes, kManyItems);
    cut.planes = larger(1, smaller(room / size, enough));
    cut.band = rows;
    cut.pieces = 1;
    cut.items = ceil_div(all_planes, cut.planes);
    return cut;
  }
  cut.planes = 1;
  cut.band = band;
  cut.pieces = ceil_div(rows, larger(1, band));
  cut.items = all_planes * cut.pieces;
  cut.staged = band >= 1;
  return cut;
}

inline PoolCut direct_cut(const Shape& shape, int64_t positions, int element) {
  PoolCut cut = {};
  cut.direct = shape.layout == kChannelsLast ? columns_cut(shape.n, shape.c, positions, element)
                                             : columns_cut(shape.n * shape.c, 1, positions, element);
  cut.items = cut.direct.items;
  cut.pieces = cut.direct.pieces;
  return cut;
}

inline PoolCut pool_cut(const Shape& shape, const Pool& pool, int element, int warp) {
  const int64_t room = kStagedBytes / element;
  const int64_t inputs = room / pool.w - pool.kernel[0];  // rows of input beside the first window's
  PoolCut cut = {};
  if (shape.layout == kChannelsFirst)
    cut = staged_cut(shape.n * shape.c, pool.h * pool.w, room,
                     inputs < 0 ? 0 : inputs / pool.stride[0] + 1, pool.rows);
  cut.group = group_of(pool.h * pool.w, warp);
  return cut.staged ? cut : direct_cut(shape, pool.rows * pool.columns, element);
}

inline PoolCut pool_backward_cut(const Shape& shape, const Pool& pool, int element, int warp) {
  const int64_t above = (pool.kernel[0] - 1) / pool.stride[0];  // rows of windows that reach into a band
  PoolCut cut = {};
  if (shape.layout == kChannelsFirst)
    cut = staged_cut(shape.n * shape.c, pool.rows * pool.columns, kStagedWindows,
                     kStagedWindows / pool.columns - above, pool.rows);
  cut.group = group_of(pool.rows * pool.columns, warp);
  return cut.staged ? cut : direct_cut(shape, pool.h * pool.w, element);
}

// Bytes of shared memory, with room for the slots at both ends.
inline int pool_shared(const PoolCut& cut, int element, int compute, bool count) {
  const int outgoing = kThreads * (16 / element) * (element + 1);
  if (cut.staged) return outgoing + kStagedBytes + 32;
  return count ? kThreads * cut.direct.lanes * compute : 0;
}

inline int pool_backward_shared(const PoolCut& cut, int element, int compute) {
  if (!cut.staged) return kThreads * cut.direct.lanes * compute;
  return (kStagedWindows + 2 * (16 / element)) * (2 * compute + 1) + 16 + 32 * 8;
}

}  // namespace attrfast::cuda
