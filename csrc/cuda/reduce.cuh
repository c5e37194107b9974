// Sums over the threads of a group, a warp and a block, in an order that the shape alone decides.
#pragma once

#include "element.cuh"
#include "plan.h"

namespace attrfast::cuda {

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / kWarp; }

// Over `group` neighbouring threads, a power of two; all of them get the sum. Every thread of the warp
// must come here.
template <class C>
__device__ __forceinline__ C group_sum(C value, int group) {
  for (int far = group / 2; far > 0; far /= 2) value += __shfl_xor_sync(kAllLanes, value, far);
  return value;
}

template <class C>
__device__ __forceinline__ C warp_sum(C value) {
  return group_sum(value, kWarp);
}

// Over the block: within warps in the compute type, between them in double. Thread 0 gets the sum.
template <class C>
__device__ __forceinline__ double block_sum(C value, double* shared) {
  value = warp_sum(value);
  if (lane() == 0) shared[warp()] = value;
  __syncthreads();
  double total = 0;
  if (threadIdx.x == 0)
    for (int i = 0; i < kThreads / kWarp; ++i) total += shared[i];
  __syncthreads();  // `shared` may be written again
  return total;
}

// The quotient of two numbers that are not negative: the hardware divides neither, but 64 bits take
// several times as long as 32.
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  if ((a | b) >> 32) return a / b;
  return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

// Where sums go: to s, or, where a sum has several pieces, to `partial` for add_pieces.
template <class C>
struct Sums {
  C* s;
  double* partial;
  int64_t pieces;
  __device__ __forceinline__ void put(int64_t row, int64_t piece, double total) const {
    if (pieces == 1)
      write(s + row, static_cast<C>(total));
    else
      write(partial + row * pieces + piece, total);
  }
};

// The second stage of sums: a warp adds the pieces of one row.
template <class C>
__global__ void __launch_bounds__(kThreads)
    add_pieces_kernel(const double* partial, C* s, int64_t rows, int64_t pieces) {
  constexpr int kWarps = kThreads / kWarp;
  for (int64_t start = blockIdx.x * int64_t{kWarps}; start < rows;
       start += gridDim.x * int64_t{kWarps}) {
    const int64_t row = start + warp();
    double total = 0;
    if (row < rows)
      for (int64_t i = lane(); i < pieces; i += kWarp) total += read(partial + row * pieces + i);
    total = warp_sum(total);
    if (lane() == 0 && row < rows) write(s + row, static_cast<C>(total));
  }
}

}  // namespace attrfast::cuda
