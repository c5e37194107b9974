#include "launch.cuh"

namespace attrfast::cuda {

void affine_relu(Dtype dtype, const Shape& shape, const AffineRelu& op, double* scratch,
                 const Queue& queue) {
  const bool aligned = all_aligned(op.z, op.residual, op.y);
  const Call call = {"affine_relu", dtype, shape};
  by_dtype(dtype, [&](auto type) {
    using T = Pointee<decltype(type)>;
    if (op.count)
      run_op<AffineReluOp<T, true>>(call, op, op.count, scratch, aligned, queue);
    else
      run_op<AffineReluOp<T, false>>(call, op, nullptr, nullptr, aligned, queue);
  });
}

}  // namespace attrfast::cuda
