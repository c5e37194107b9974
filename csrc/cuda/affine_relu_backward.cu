#include "launch.cuh"

namespace attrfast::cuda {

void affine_relu_backward(Dtype dtype, const Shape& shape, const AffineReluBackward& op, double* scratch,
                          const Queue& queue) {
  const bool aligned = all_aligned(op.a, op.g, op.residual, op.g1, op.gz);
  by_dtype(dtype, [&](auto type) {
    run_op<BackwardOp<Pointee<decltype(type)>>>({"affine_relu_backward", dtype, shape}, op,
                                                op.attribute == kNone ? nullptr : op.s, scratch, aligned,
                                                queue);
  });
}

}  // namespace attrfast::cuda
