#include "launch.cuh"
#include "max_pool.cuh"
#include "window.cuh"

namespace attrfast::cuda {

int64_t pool_backward_scratch(Dtype dtype, const Shape& shape, const Pool& pool) {
  if (empty(shape)) return 0;
  const PoolCut cut = pool_backward_cut(shape, pool, element_bytes(dtype), kWarp);
  return cut.pieces == 1 ? 0 : shape.n * shape.c * cut.pieces;
}

void affine_relu_max_pool_backward(Dtype dtype, const Shape& shape, const Pool& pool,
                                   const AffineReluMaxPoolBackward& op, void* s, double* scratch,
                                   const Queue& queue) {
  const Call call = {"affine_relu_max_pool_backward", dtype, shape};
  check_sizes(call, pool);
  if (empty(shape)) return;
  const bool aligned = all_aligned(op.p, op.g, op.code, op.gz);
  const PoolCut cut = pool_backward_cut(shape, pool, element_bytes(dtype), kWarp);
  const int shared = pool_backward_shared(cut, element_bytes(dtype), compute_bytes(dtype));
  by_dtype(dtype, [&](auto type) {
    using T = Pointee<decltype(type)>;
    const Sums<Compute<T>> sums = {static_cast<Compute<T>*>(s), scratch, cut.pieces};
    const auto staged = [&](auto window) {
      run(call, queue, pool_backward_staged_kernel<T, decltype(window)>, cut.items, shared, op, shape,
          pool, cut, window, aligned, sums);
    };
    const auto direct = [&](auto window) {
      run(call, queue, pool_backward_direct_kernel<T, kLanes<T>, decltype(window)>, cut.items, shared,
          op, shape, pool, cut.direct, window, aligned, sums);
    };
    if (cut.staged)
      by_window(pool, staged);
    else if (cut.direct.lanes > 1)
      by_window(pool, direct);
    else
      run(call, queue, pool_backward_direct_kernel<T, 1, AnyWindow>, cut.items, shared, op, shape, pool,
          cut.direct, AnyWindow(pool), aligned, sums);
    add_pieces(call, queue, sums);
  });
}

}  // namespace attrfast::cuda
