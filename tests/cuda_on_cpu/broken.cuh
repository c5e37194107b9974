// Kernels with faults that the emulated GPU must catch, and the same without.
#pragma once

#include "../../csrc/cuda/kernels.cuh"

namespace attrfast::cuda {

enum Fault : int { kNoFault, kNoBarrier, kNoSecondBarrier, kPastTheEnd, kLonelyBarrier, kMisaligned };

// block_sum of reduce.cuh, but for the barriers that a fault leaves out.
template <class C>
double faulty_block_sum(C value, double* shared, Fault fault) {
  value = warp_sum(value);
  if (lane() == 0) shared[warp()] = value;
  if (fault != kNoBarrier) __syncthreads();
  double total = 0;
  if (threadIdx.x == 0)
    for (int i = 0; i < kThreads / kWarp; ++i) total += shared[i];
  if (fault != kNoSecondBarrier) __syncthreads();
  return total;
}

inline void faulty_kernel(const float* x, float* s, int64_t rows, int64_t p, Fault fault) {
  double* shared = reinterpret_cast<double*>(shared_memory());
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    float sum = 0;
    const int64_t end = (row + 1) * p + (fault == kPastTheEnd);
    for (int64_t i = row * p + threadIdx.x; i < end; i += kThreads) sum += read(x + i);
    if (fault == kMisaligned) read16(reinterpret_cast<const char*>(x) + 4);
    if (fault == kLonelyBarrier && threadIdx.x < kWarp) __syncthreads();
    const double total = faulty_block_sum(sum, shared, fault);
    if (threadIdx.x == 0) write(s + row, static_cast<float>(total));
  }
}

}  // namespace attrfast::cuda
