// Divides each segment of a vector by its own norm, all segments in one launch.
#pragma once

#include "reduce.cuh"

namespace attrfast::cuda {

// The larger one; NaN is the largest.
template <class C>
__device__ __forceinline__ C at_least(C a, C b) {
  return (b > a) | (b != b) ? b : a;
}

// Over the block; every thread gets it.
template <class C>
__device__ C block_max(C value, C* shared) {
  for (int far = kWarp / 2; far > 0; far /= 2)
    value = at_least(value, __shfl_xor_sync(kAllLanes, value, far));
  if (lane() == 0) shared[warp()] = value;
  __syncthreads();
  for (int i = 0; i < kThreads / kWarp; ++i) value = at_least(value, shared[i]);
  __syncthreads();
  return value;
}

// A segment is one layer's importance: short, and read three times out of the cache. It is divided by
// its largest value first, so that large and small ones neither overflow nor vanish.
template <class T>
__global__ void __launch_bounds__(kThreads) segment_normalize_kernel(SegmentNormalize op) {
  using E = Element<T>;
  using C = Compute<T>;
  const T* theta = static_cast<const T*>(op.theta);
  T* out = static_cast<T*>(op.out);
  double* shared = reinterpret_cast<double*>(shared_memory());
  for (int64_t segment = blockIdx.x; segment < op.segments; segment += gridDim.x) {
    const int64_t begin = read(op.offsets + segment), end = read(op.offsets + segment + 1);
    C largest = 0;
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      const C x = E::load(read(theta + i));
      largest = at_least(largest, x < 0 ? -x : x);
    }
    largest = block_max(largest, reinterpret_cast<C*>(shared));
    double sum = 0;
    for (int64_t i = begin + threadIdx.x; op.kind != kMax && largest != 0 && i < end; i += kThreads) {
      const C unit = E::load(read(theta + i)) / largest;
      sum += op.kind == kL2 ? unit * unit : (unit < 0 ? -unit : unit);
    }
    double total = block_sum(sum, shared);
    if (threadIdx.x == 0) {
      if (op.kind == kL2) total = sqrt(total);
      if (op.kind == kMean) total /= static_cast<double>(end - begin);
      if (op.kind == kMax) total = largest != largest ? static_cast<double>(largest) : 1.0;
      shared[0] = total;
    }
    __syncthreads();
    const C size = static_cast<C>(shared[0]);
    __syncthreads();  // the next segment writes there
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      const C x = E::load(read(theta + i));
      write(out + i, E::store(largest == 0 ? x : x / largest / size));
    }
  }
}

}  // namespace attrfast::cuda
