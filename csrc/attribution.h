// The contract of the native kernels: what each launch reads, writes and means.
//
// Tensors are (N, C, P), P positions, in one of two layouts: kChannelsFirst stores a channel's positions
// next to each other, kChannelsLast a position's channels. All tensors of a call share one layout, and
// none overlap unless a comment allows it. float, bfloat16 and half compute in float, double in double:
// that is the *compute type*, in which scale, shift and the sums s are stored.
//
// Sums are the same bits for any number of threads: work is cut into pieces by shape alone, each piece
// is summed by one thread, and the pieces are added in order.
//
// The meaning of every op, in plain PyTorch, is attrfast/reference.py.
#pragma once

#include <cstdint>

namespace attrfast {

enum Dtype : int { kFloat = 0, kDouble = 1, kBFloat16 = 2, kHalf = 3 };
enum Layout : int { kChannelsFirst = 0, kChannelsLast = 1 };
enum Attribute : int { kNone = 0, kOutput = 1, kBranch = 2 };

struct Shape {
  int64_t n, c, p;
  Layout layout;
};

// y = clamp(z * scale + shift + residual, lower, upper). y may be z. Null means 1, 0 and 0.
// count[n, c] = how many elements of y, as they are stored, are not zero; NaN where one is not finite. It
// has the compute type. Null: it is not wanted.
struct AffineRelu {
  const void *z, *scale, *shift, *residual;
  void *y, *count;
  double lower, upper;
};

// g1 = where(lower < a < upper [and g > 0], g, 0); gz = g1 * scale.
// s[n, c] = sum over p of a * g (kOutput) or (a - residual) * g1 (kBranch).
// Both bounds are first rounded to the element type, as what the forward clamped was; an infinite one is none.
// g1 may be null or g; gz may be g where g1 is null; s is read with kNone by nobody.
struct AffineReluBackward {
  const void *a, *g, *scale, *residual;
  void *g1, *gz, *s;
  double lower, upper;
  bool guided;
  Attribute attribute;
};

// s[n, c] = sum over p of x * g, or of |x * g|; where g is null, a count of x, as of AffineRelu's y.
struct Attribution {
  const void *x, *g;
  void* s;
  bool absolute;
};

// Geometry of a 2-d max-pooling: input (h, w), output (rows, columns).
struct Pool {
  int64_t h, w, rows, columns;
  int64_t kernel[2], stride[2], padding[2];
};

// p = max over each window of clamp(z * scale + shift); code = place of the maximum in its window.
// Values are compared in the compute type, before they are rounded. count: as of AffineRelu, of the whole
// input of the pooling, with what no window covers; null: it is not wanted.
struct AffineReluMaxPool {
  const void *z, *scale, *shift;
  void* p;
  uint8_t* code;
  void* count;
  double lower, upper;
};

// gz = scale * where(clamp passes, sum of the g of the windows whose maximum is here, 0). A code that
// no such pooling gives is left out.
struct AffineReluMaxPoolBackward {
  const void *p, *g, *scale;
  const uint8_t* code;
  void* gz;
  double lower, upper;
  bool guided;
};

enum Norm : int { kL2 = 0, kMean = 1, kMax = 2 };  // of the absolute values

// out[i] = theta[i] / norm of its segment; segment l is offsets[l] to offsets[l + 1]. A segment of zeros
// stays zero. Its largest value is divided out first, so that no square overflows or vanishes.
struct SegmentNormalize {
  const void* theta;
  const int64_t* offsets;
  int64_t segments;
  void* out;
  Norm kind;
};

// y = clamp(conv(x, weight) * scale + shift + residual, lower, upper), 3x3 with stride 1, channels-last, in
// float. Null means 1, 0 and 0; y may be residual.
// Weight element (o, i, tap) lies at o * weight_out + i * weight_in + tap * weight_tap; flipped reads tap
// 8 - tap in its place, which with in and out exchanged is the input gradient. scratch holds
// winograd_floats() floats.
struct Winograd {
  const float *x, *weight, *scale, *shift, *residual;
  float *y, *scratch;
  int64_t n, h, w, channels_in, channels_out;
  int64_t padding[2];
  int64_t weight_out, weight_in, weight_tap;
  bool flipped;
  float lower, upper;
};

// y = clamp(x * weight * scale + shift + residual, lower, upper): a 1x1 convolution with stride 1 of n samples of
// `positions`, channels-last, of floats or bfloat16. Null means 1, 0 and 0; y may be residual.
// Weight element (o, i) lies at o * weight_out + i * weight_in, and is multiplied by factor[i], if there is one.
// scratch holds pointwise_floats() floats.
struct Pointwise {
  const void *x, *weight, *residual;
  const float *factor, *scale, *shift;
  void* y;
  float* scratch;
  int64_t n, positions, channels_in, channels_out;
  int64_t weight_out, weight_in;
  float lower, upper;
};

// g1 and s as of AffineReluBackward, with g = product.x; product.y is the convolution of g1. g1 may be null or g,
// and product has neither scale, shift and residual nor bounds of its own. scratch holds pointwise_floats() floats,
// of the backward.
struct PointwiseBackward {
  Pointwise product;
  const void *a, *residual;
  void* g1;
  float* s;
  double lower, upper;
  bool guided;
  Attribute attribute;
};

// y = clamp(conv(x, weight) * scale + shift + residual, lower, upper), depthwise: channel c of x and a kernel x
// kernel window of its own, kernel 3, 5 or 7, stride 1 or 2, channels-last, of floats or bfloat16. Null means 1, 0 and
// 0; y may be residual. With transposed, x is a gradient for such a convolution's output and y one for its input.
// input and output are rows and columns of x and y; padding is the convolution's and less than kernel. Weight
// element (c, row, column) lies at c * weight_channel + row * weight_row + column * weight_column, and is multiplied
// by factor[c], if there is one. scratch holds depthwise_floats() floats.
struct Depthwise {
  const void *x, *weight, *residual;
  const float *factor, *scale, *shift;
  void* y;
  float* scratch;
  int64_t n, channels;
  int64_t input[2], output[2], padding[2];
  int64_t kernel, stride;
  int64_t weight_channel, weight_row, weight_column;
  bool transposed;
  float lower, upper;
};

// g1 and s as of AffineReluBackward with kOutput, with g = product.x; product.y is the gradient that g1 brings. Null:
// s is not wanted. product is transposed and has neither scale, shift and residual nor bounds of its own.
struct DepthwiseBackward {
  Depthwise product;
  const void* a;
  float* s;
  double lower, upper;
  bool guided;
};

// y = clamp(x * scale + shift, lower, upper) of a map x that is joined along the channels from `count` parts: part i
// has channels[i] channels, which add up to the shape's, and is dense in the launch's layout.
struct Joined {
  const void* const* x;
  const int64_t* channels;
  int64_t count;
  const void *scale, *shift;
  double lower, upper;
};

// g1 and s as of AffineReluBackward with kOutput, where a is the y of `joined`, which is computed once more.
// gx[i], like part i, gets its channels of g1 * scale, or has them added to what it holds where adds[i] is not zero;
// null: they are not wanted. s null: it is not wanted.
struct JoinedBackward {
  Joined joined;
  const void* g;
  void* const* gx;
  const uint8_t* adds;
  void* s;
  bool guided;
};

// One set of kernels, compiled for one instruction set.
struct Kernels {
  const char* isa;
  void (*affine_relu)(Dtype, const Shape&, const AffineRelu&, int threads);
  void (*affine_relu_backward)(Dtype, const Shape&, const AffineReluBackward&, int threads);
  void (*attribution)(Dtype, const Shape&, const Attribution&, int threads);
  // Here the shape's p is that of the pooled tensor.
  void (*affine_relu_max_pool)(Dtype, const Shape&, const Pool&, const AffineReluMaxPool&, int threads);
  void (*affine_relu_max_pool_backward)(Dtype, const Shape&, const Pool&,
                                        const AffineReluMaxPoolBackward&, int threads);
  void (*segment_normalize)(Dtype, const SegmentNormalize&, int threads);
  void (*winograd)(const Winograd&, int threads);
  int64_t (*winograd_floats)(const Winograd&, int threads);
  // Convolutions are of kFloat or kBFloat16.
  void (*pointwise)(Dtype, const Pointwise&, int threads);
  int64_t (*pointwise_floats)(Dtype, const Pointwise&, bool backward, int threads);
  void (*pointwise_backward)(Dtype, const PointwiseBackward&, int threads);
  void (*depthwise)(Dtype, const Depthwise&, int threads);
  int64_t (*depthwise_floats)(const Depthwise&, int threads);
  void (*depthwise_backward)(Dtype, const DepthwiseBackward&, int threads);
  // Here the shape's c is that of the joined map.
  void (*joined)(Dtype, const Shape&, const Joined&, void* y, int threads);
  void (*joined_backward)(Dtype, const Shape&, const JoinedBackward&, int threads);
};

const Kernels* baseline_kernels();
const Kernels* avx2_kernels();         // null where the compiler has no such target
const Kernels* avx512_kernels();       // likewise
const Kernels* avx512_bf16_kernels();  // null where the compiler does not know it, too

}  // namespace attrfast
