#include "launch.cuh"

namespace attrfast::cuda {

void affine_relu(Dtype dtype, const Shape& shape, const AffineRelu& op, const Queue& queue) {
  const bool aligned = all_aligned(op.z, op.residual, op.y);
  by_dtype(dtype, [&](auto type) {
    run_op<AffineReluOp<Pointee<decltype(type)>>>({"affine_relu", dtype, shape}, op, nullptr, nullptr,
                                                  aligned, queue);
  });
}

}  // namespace attrfast::cuda
