// The GPU's side of ../attribution.h: the same ops over pointers to a GPU's memory, queued on the
// caller's stream. Every function throws std::runtime_error, naming the op and its sizes, where a CUDA
// call fails; what fails later, while the kernel runs, PyTorch reports at the next synchronisation.
//
// `scratch` is memory for as many doubles as the functions ending in _scratch say, and may be null where that
// is 0 and where no sums are wanted. No more than 2^31 - 1 channels.
#pragma once

#include <vector>

#include "../attribution.h"

namespace attrfast::cuda {

struct Queue {
  int device;
  uintptr_t stream;
};

// For affine_relu, affine_relu_backward and attribution.
int64_t sums_scratch(Dtype, const Shape&);
int64_t pool_scratch(Dtype, const Shape&, const Pool&);
int64_t pool_backward_scratch(Dtype, const Shape&, const Pool&);

void affine_relu(Dtype, const Shape&, const AffineRelu&, double* scratch, const Queue&);
void affine_relu_backward(Dtype, const Shape&, const AffineReluBackward&, double* scratch, const Queue&);
void attribution(Dtype, const Shape&, const Attribution&, double* scratch, const Queue&);

// Here the shape's p is that of the pooled tensor.
void affine_relu_max_pool(Dtype, const Shape&, const Pool&, const AffineReluMaxPool&, double* scratch,
                          const Queue&);
// Also s[n, c] = sum over windows of p * g, unless s is null.
void affine_relu_max_pool_backward(Dtype, const Shape&, const Pool&, const AffineReluMaxPoolBackward&,
                                   void* s, double* scratch, const Queue&);

// Here the offsets are in GPU memory too.
void segment_normalize(Dtype, const SegmentNormalize&, const Queue&);

// One tensor of many; s may be some columns of a matrix with `stride` elements a row.
struct Tap {
  Dtype dtype;
  Shape shape;
  const void *x, *g;
  void* s;
  int64_t stride;
};

// s = the attribution of every tap, 64 of them in a launch.
void many_taps(const std::vector<Tap>& taps, bool absolute, const Queue&);

}  // namespace attrfast::cuda
