// The poolings that have kernels of their own.
#pragma once

#include "max_pool.cuh"

namespace attrfast::cuda {

inline bool is_window(const Pool& pool, int64_t kernel, int64_t stride, int64_t padding) {
  for (int axis = 0; axis < 2; ++axis)
    if (pool.kernel[axis] != kernel || pool.stride[axis] != stride || pool.padding[axis] != padding)
      return false;
  return true;
}

// Whether every place of the input is in a window.
inline bool covers(const Pool& pool) {
  const int64_t size[] = {pool.h, pool.w}, windows[] = {pool.rows, pool.columns};
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t end = (windows[axis] - 1) * pool.stride[axis] - pool.padding[axis] + pool.kernel[axis];
    if (pool.kernel[axis] < pool.stride[axis] || end < size[axis]) return false;
  }
  return true;
}

template <class Body>
void by_window(const Pool& pool, Body body) {
  if (is_window(pool, 2, 2, 0)) return body(FixedWindow<2, 2, 0>(pool));
  if (is_window(pool, 3, 2, 1)) return body(FixedWindow<3, 2, 1>(pool));
  body(AnyWindow(pool));
}

}  // namespace attrfast::cuda
