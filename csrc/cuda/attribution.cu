#include "launch.cuh"

namespace attrfast::cuda {

int64_t sums_scratch(Dtype dtype, const Shape& shape) {
  if (empty(shape)) return 0;
  const Cut cut = cut_of(shape, element_bytes(dtype), kWarp);
  return cut.pieces == 1 ? 0 : shape.n * shape.c * cut.pieces;
}

void attribution(Dtype dtype, const Shape& shape, const Attribution& op, double* scratch,
                 const Queue& queue) {
  const bool aligned = all_aligned(op.x, op.g);
  by_dtype(dtype, [&](auto type) {
    using T = Pointee<decltype(type)>;
    if (op.g)
      run_op<AttributionOp<T, false>>({"attribution", dtype, shape}, op, op.s, scratch, aligned, queue);
    else
      run_op<AttributionOp<T, true>>({"count_nonzero", dtype, shape}, op, op.s, scratch, aligned, queue);
  });
}

}  // namespace attrfast::cuda
