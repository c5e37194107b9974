// The attribution of many small tensors in one launch, so that none pays for a launch of its own.
#pragma once

#include "kernels.cuh"
#include "launches.h"

namespace attrfast::cuda {

// A tap as the kernel reads it.
struct TapWork {
  const void *x, *g;
  void* s;
  int64_t n, c, p;
  int64_t stride;      // from one sample's sums to the next one's, in elements of s
  int64_t first_item;  // items are numbered through all taps
  Cut cut;             // here a block finishes what it begins: `pieces` are worked off one after another
  int32_t dtype;
  int32_t aligned;
};

// All taps of a launch. They travel as its argument, not through memory: nothing has to outlive the call,
// and a CUDA graph that captures the launch keeps them.
constexpr int kMostTaps = 64;
struct TapTable {
  TapWork taps[kMostTaps];
  int count;
};

template <class Op, int V>
__device__ void tap_columns(const Op& op, const TapWork& tap, int64_t item, unsigned char* shared) {
  using C = typename Op::C;
  C* s = static_cast<C*>(tap.s);
  const Place place(tap.cut.width, tap.cut.height);
  const int64_t n = quotient(item, tap.cut.chunks), chunk = item - n * tap.cut.chunks;
  const int64_t c = (chunk * tap.cut.width + place.x) * V;
  double totals[V] = {};
  for (int64_t begin = 0; begin < tap.p; begin += tap.cut.length) {
    const int64_t end = begin + tap.cut.length < tap.p ? begin + tap.cut.length : tap.p;
    column_piece<V>(op, place, tap.cut.width, tap.cut.height, n, c, tap.p, tap.c, begin, end,
                    tap.aligned, shared, totals);
  }
  if (place.y == 0 && c < tap.c)
#pragma unroll
    for (int j = 0; j < V; ++j) write(s + n * tap.stride + c + j, static_cast<C>(totals[j]));
}

template <class T>
__device__ void tap_item(const TapWork& tap, int64_t item, bool absolute, unsigned char* shared) {
  using Op = AttributionOp<T, false>;
  using C = Compute<T>;
  const Op op({tap.x, tap.g, tap.s, absolute});
  C* s = static_cast<C*>(tap.s);
  if (tap.cut.path == kColumns) {
    if (tap.cut.lanes == 1)
      tap_columns<Op, 1>(op, tap, item, shared);
    else
      tap_columns<Op, kLanes<T>>(op, tap, item, shared);
    return;
  }
  if (tap.cut.path == kPacked) {
    const int64_t rows = tap.n * tap.c, first = item * tap.cut.rows;
    const int64_t last = first + tap.cut.rows < rows ? first + tap.cut.rows : rows;
    packed_rows(op, first, last, static_cast<int>(tap.p), tap.c, tap.cut.group, tap.aligned, shared,
                [&](int64_t row, double total) {
                  const int64_t n = quotient(row, tap.c);
                  write(s + n * tap.stride + (row - n * tap.c), static_cast<C>(total));
                });
    return;
  }
  const int64_t n = quotient(item, tap.c), c = item - n * tap.c;
  const int64_t begin = item * tap.p, end = begin + tap.p;
  double total = 0;
  for (int64_t from = begin; from < end; from += tap.cut.length) {
    const int64_t to = from + tap.cut.length < end ? from + tap.cut.length : end;
    total += row_piece(op, from, to, c, tap.aligned, reinterpret_cast<double*>(shared));
  }
  if (threadIdx.x == 0) write(s + n * tap.stride + c, static_cast<C>(total));
}

// Where a block keeps the line of the table that it works on, before the shared memory of its sums.
struct alignas(16) TapHeader {
  TapWork tap;
  int line;
};

// Blocks take items in a fixed order, and each item is summed the same way whoever takes it.
__global__ void __launch_bounds__(kThreads)
    many_taps_kernel(const __grid_constant__ TapTable table, int64_t items, bool absolute) {
  TapHeader* header = reinterpret_cast<TapHeader*>(shared_memory());
  unsigned char* shared = shared_memory() + sizeof(TapHeader);
  const TapWork& tap = header->tap;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    if (threadIdx.x == 0) {
      int low = 0, high = table.count;  // the last tap that begins at or before the item
      while (high - low > 1) {
        const int middle = low + (high - low) / 2;
        if (table.taps[middle].first_item <= item)
          low = middle;
        else
          high = middle;
      }
      header->line = low;
    }
    __syncthreads();
    constexpr int kWords = sizeof(TapWork) / sizeof(uint64_t);
    if (threadIdx.x < kWords)
      reinterpret_cast<uint64_t*>(header)[threadIdx.x] =
          reinterpret_cast<const uint64_t*>(table.taps + header->line)[threadIdx.x];
    __syncthreads();
    const int64_t own = item - tap.first_item;
    switch (tap.dtype) {
      case kFloat: tap_item<float>(tap, own, absolute, shared); break;
      case kDouble: tap_item<double>(tap, own, absolute, shared); break;
      case kBFloat16: tap_item<BFloat16>(tap, own, absolute, shared); break;
      case kHalf: tap_item<Half>(tap, own, absolute, shared); break;
    }
    __syncthreads();  // the next item's tap, of another type perhaps, goes to the same memory
  }
}

}  // namespace attrfast::cuda
