#include "launch.cuh"
#include "max_pool.cuh"
#include "window.cuh"

namespace attrfast::cuda {

int64_t pool_scratch(Dtype dtype, const Shape& shape, const Pool& pool) {
  if (empty(shape)) return 0;
  const PoolCut cut = pool_cut(shape, pool, element_bytes(dtype), kWarp);
  return cut.pieces == 1 ? 0 : shape.n * shape.c * cut.pieces;
}

template <class T, bool kCount>
void launch_pool(const Call& call, const Pool& pool, const AffineReluMaxPool& op, double* scratch,
                 const Queue& queue) {
  const bool aligned = all_aligned(op.z, op.p, op.code);
  const PoolCut cut = pool_cut(call.shape, pool, sizeof(T), kWarp);
  const int shared = pool_shared(cut, sizeof(T), sizeof(Compute<T>), kCount);
  const Sums<Compute<T>> sums = {static_cast<Compute<T>*>(op.count), scratch, cut.pieces};
  const auto staged = [&](auto window) {
    run(call, queue, pool_staged_kernel<T, decltype(window), kCount>, cut.items, shared, op, call.shape,
        pool, cut, window, aligned, sums);
  };
  const auto direct = [&](auto window) {
    run(call, queue, pool_direct_kernel<T, kLanes<T>, decltype(window), kCount>, cut.items, shared, op,
        call.shape, pool, cut.direct, window, aligned, sums);
  };
  if (cut.staged)
    by_window(pool, staged);
  else if (cut.direct.lanes == 1)
    run(call, queue, pool_direct_kernel<T, 1, AnyWindow, kCount>, cut.items, shared, op, call.shape,
        pool, cut.direct, AnyWindow(pool), aligned, sums);
  else if (kCount && !covers(pool))
    direct(AnyWindow(pool));
  else
    by_window(pool, direct);
  add_pieces(call, queue, sums);
}

void affine_relu_max_pool(Dtype dtype, const Shape& shape, const Pool& pool, const AffineReluMaxPool& op,
                          double* scratch, const Queue& queue) {
  const Call call = {"affine_relu_max_pool", dtype, shape};
  check_sizes(call, pool);
  if (empty(shape)) return;
  by_dtype(dtype, [&](auto type) {
    using T = Pointee<decltype(type)>;
    if (op.count)
      launch_pool<T, true>(call, pool, op, scratch, queue);
    else
      launch_pool<T, false>(call, pool, op, scratch, queue);
  });
}

}  // namespace attrfast::cuda
