#include "launch.cuh"
#include "max_pool.cuh"
#include "window.cuh"

namespace attrfast::cuda {

void affine_relu_max_pool(Dtype dtype, const Shape& shape, const Pool& pool, const AffineReluMaxPool& op,
                          const Queue& queue) {
  const Call call = {"affine_relu_max_pool", dtype, shape};
  check_sizes(call, pool);
  if (empty(shape)) return;
  const bool aligned = all_aligned(op.z, op.p, op.code);
  const PoolCut cut = pool_cut(shape, pool, element_bytes(dtype));
  by_dtype(dtype, [&](auto type) {
    using T = Pointee<decltype(type)>;
    const auto staged = [&](auto window) {
      run(call, queue, pool_staged_kernel<T, decltype(window)>, cut.items, pool_shared(cut, sizeof(T)),
          op, shape, pool, cut, window, aligned);
    };
    const auto direct = [&](auto window) {
      run(call, queue, pool_direct_kernel<T, kLanes<T>, decltype(window)>, cut.items, 0, op, shape, pool,
          cut.direct, window, aligned);
    };
    if (cut.staged)
      by_window(pool, staged);
    else if (cut.direct.lanes > 1)
      by_window(pool, direct);
    else
      run(call, queue, pool_direct_kernel<T, 1, AnyWindow>, cut.items, 0, op, shape, pool, cut.direct,
          AnyWindow(pool), aligned);
  });
}

}  // namespace attrfast::cuda
