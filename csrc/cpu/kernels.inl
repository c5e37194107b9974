// The CPU kernels, compiled once per instruction set: the including file defines ATTRFAST_ISA (a
// namespace name) and ATTRFAST_ISA_NAME, and passes the compiler the set's flags.
//
// Everything lives in that namespace and nothing comes from the standard library's templates, because
// the linker keeps one copy of an inline function and could pick one the processor can't run.
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <cstdint>

#include "../attribution.h"

namespace attrfast {
namespace ATTRFAST_ISA {

#include "scalar.h"

template <class T>
using Compute = typename Element<T>::Compute;

// Positions summed in the compute type before they are added to a double: keeps float sums exact to a
// few ulp however large the map, at no cost that can be measured.
constexpr int64_t kBlock = 512;
// The same for channels-last, where adding to the doubles is a pass over all channels.
constexpr int64_t kRows = 64;

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a channels-last tensor is cut into pieces of whole positions: by shape alone.
struct Pieces {
  int64_t per_sample, positions;
  explicit Pieces(const Shape& s)
      : per_sample(larger(1, smaller(ceil_div(32, larger(1, s.n)), ceil_div(s.p, kRows)))),
        positions(ceil_div(s.p, per_sample)) {}
};

// A per-channel vector, with a constant where there is none.
template <class C>
class PerChannel {
 public:
  PerChannel(const void* given, int64_t channels, C otherwise)
      : own_(given ? nullptr : new C[channels]), data_(given ? static_cast<const C*>(given) : own_) {
    for (int64_t i = 0; own_ && i < channels; ++i) own_[i] = otherwise;
  }
  ~PerChannel() { delete[] own_; }
  PerChannel(const PerChannel&) = delete;
  PerChannel& operator=(const PerChannel&) = delete;
  const C* data() const { return data_; }

 private:
  C* own_;
  const C* data_;
};

// A bound as the element type stores it: what a clamped element compares equal to. `none` is no bound, and
// becomes NaN, to which nothing compares: an infinity that was not clamped lets its gradient pass.
template <class T>
static inline Compute<T> stored_bound(double bound, double none) {
  const Compute<T> stored = Element<T>::load(Element<T>::store(static_cast<Compute<T>>(bound)));
  return stored == none ? stored - stored : stored;
}

// What a missing shift adds: adding 0 would lose the sign of -0.
constexpr float kNoShift = -0.0f;

// s[n, c] = the sum over a sample's parts, in order.
template <class C>
static void add_parts(const double* partial, int64_t samples, int64_t parts, int64_t channels, C* s) {
  for (int64_t n = 0; n < samples; ++n) {
    for (int64_t c = 0; c < channels; ++c) {
      double total = 0;
      for (int64_t i = 0; i < parts; ++i) total += partial[(n * parts + i) * channels + c];
      s[n * channels + c] = static_cast<C>(total);
    }
  }
}

// Sums over positions of a channels-last tensor: block(first, last, acc) adds positions first to last of all
// samples' positions, which are of one sample, into acc (C). s gets the totals.
template <class C, class Block>
static void sum_blocks_channels_last(const Shape& shape, void* s_out, bool wanted, int threads,
                                     Block block) {
  const Pieces pieces(shape);
  const int64_t count = shape.n * pieces.per_sample, channels = shape.c;
  double* partial = wanted ? new double[count * channels] : nullptr;
#pragma omp parallel num_threads(threads)
  {
    C* acc = new C[channels];
#pragma omp for schedule(static)
    for (int64_t piece = 0; piece < count; ++piece) {
      const int64_t n = piece / pieces.per_sample;
      const int64_t first = (piece % pieces.per_sample) * pieces.positions;
      const int64_t last = smaller(first + pieces.positions, shape.p);
      double* sum = partial + piece * channels;
      for (int64_t c = 0; wanted && c < channels; ++c) sum[c] = 0;
      for (int64_t start = first; start < last; start += kRows) {
        for (int64_t c = 0; c < channels; ++c) acc[c] = 0;
        block(n * shape.p + start, n * shape.p + smaller(start + kRows, last), acc);
        if (wanted) {
#pragma omp simd
          for (int64_t c = 0; c < channels; ++c) sum[c] += acc[c];
        }
      }
    }
    delete[] acc;
  }
  if (!wanted) return;
  add_parts(partial, shape.n, pieces.per_sample, channels, static_cast<C*>(s_out));
  delete[] partial;
}

// The same, position by position: body(start, acc) adds the channels of one, which begin at `start`.
template <class C, class Body>
static void sum_channels_last(const Shape& shape, void* s, bool wanted, int threads, Body body) {
  const int64_t channels = shape.c;
  sum_blocks_channels_last<C>(shape, s, wanted, threads, [=](int64_t first, int64_t last, C* acc) {
    for (int64_t p = first; p < last; ++p) body(p * channels, acc);
  });
}

// -- affine_relu ------------------------------------------------------------------------------------

template <class C>
static inline C clamp(C y, C lower, C upper) {
  y = y < lower ? lower : y;  // comparisons with NaN are false, so NaN stays
  return y > upper ? upper : y;
}

// What a stored element adds to a count: 1 unless it is zero, and NaN where it is not finite.
template <class T>
static inline Compute<T> counted(T stored) {
  const Compute<T> y = Element<T>::load(stored);
  return (y != 0 ? 1 : 0) + 0 * y;
}

// One element; returns what it adds to the count.
template <class T, bool kResidual, bool kCount>
static inline Compute<T> forward_element(const T* z, const T* r, T* y, int64_t i, Compute<T> scale,
                                         Compute<T> shift, Compute<T> lower, Compute<T> upper) {
  using E = Element<T>;
  Compute<T> v = E::load(z[i]) * scale + shift;
  if (kResidual) v += E::load(r[i]);
  v = clamp(v, lower, upper);
  // Stored twice in words: GCC does not vectorise loops with a variable of the 16-bit structs.
  y[i] = E::store(v);
  return kCount ? counted<T>(E::store(v)) : 0;
}

template <class T, bool kResidual, bool kCount>
static void affine_relu_typed(const Shape& shape, const AffineRelu& op, int threads) {
  using C = Compute<T>;
  const T* z = static_cast<const T*>(op.z);
  const T* r = static_cast<const T*>(op.residual);
  T* y = static_cast<T*>(op.y);
  C* count = static_cast<C*>(op.count);
  const C lower = static_cast<C>(op.lower), upper = static_cast<C>(op.upper);
  const PerChannel<C> scales(op.scale, shape.c, 1), shifts(op.shift, shape.c, kNoShift);
  const C *scale = scales.data(), *shift = shifts.data();
  const int64_t channels = shape.c;
  if (shape.layout == kChannelsFirst) {
    const int64_t block = kCount ? kBlock : shape.p;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < shape.n * channels; ++row) {
      const C a = scale[row % channels], b = shift[row % channels];
      const int64_t end = (row + 1) * shape.p;
      double total = 0;
      for (int64_t start = row * shape.p; start < end; start += block) {
        const int64_t stop = smaller(start + block, end);
        C sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = start; i < stop; ++i)
          sum += forward_element<T, kResidual, kCount>(z, r, y, i, a, b, lower, upper);
        total += sum;
      }
      if (kCount) count[row] = static_cast<C>(total);
    }
    return;
  }
  if (kCount) {
    sum_channels_last<C>(shape, count, true, threads, [=](int64_t start, C* acc) {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c)
        acc[c] +=
            forward_element<T, kResidual, true>(z, r, y, start + c, scale[c], shift[c], lower, upper);
    });
    return;
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < shape.n * shape.p; ++row) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c)
      forward_element<T, kResidual, false>(z, r, y, row * channels + c, scale[c], shift[c], lower,
                                           upper);
  }
}

// -- affine_relu_backward ---------------------------------------------------------------------------

// One element; returns what it adds to the attribution.
template <class T, bool kGuided, bool kSplit, Attribute kWhat>
static inline Compute<T> backward_element(const T* a_in, const T* g_in, const T* r_in, T* g1, T* gz,
                                          int64_t i, Compute<T> scale, Compute<T> lower,
                                          Compute<T> upper) {
  using E = Element<T>;
  using C = Compute<T>;
  const C a = E::load(a_in[i]), g = E::load(g_in[i]);
  const bool blocked = (a <= lower) | (a >= upper) | (kGuided & !(g > C(0)));
  const C inside = blocked ? C(0) : g;
  C flow = 0;
  if (kWhat == kOutput) flow = a * g;
  if (kWhat == kBranch) flow = (a - E::load(r_in[i])) * inside;
  if (kSplit) g1[i] = E::store(inside);
  gz[i] = E::store(inside * scale);
  return flow;
}

template <class T, bool kGuided, bool kSplit, Attribute kWhat>
static void backward_typed(const Shape& shape, const AffineReluBackward& op, int threads) {
  using C = Compute<T>;
  const T* a = static_cast<const T*>(op.a);
  const T* g = static_cast<const T*>(op.g);
  const T* r = static_cast<const T*>(op.residual);
  T* g1 = static_cast<T*>(op.g1);
  T* gz = static_cast<T*>(op.gz);
  C* s = static_cast<C*>(op.s);
  const C lower = stored_bound<T>(op.lower, -__builtin_inf()),
          upper = stored_bound<T>(op.upper, __builtin_inf());
  const PerChannel<C> scales(op.scale, shape.c, 1);
  const C* scale = scales.data();
  if (shape.layout == kChannelsFirst) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < shape.n * shape.c; ++row) {
      const C factor = scale[row % shape.c];
      const int64_t end = (row + 1) * shape.p;
      double total = 0;
      for (int64_t start = row * shape.p; start < end; start += kBlock) {
        const int64_t stop = smaller(start + kBlock, end);
        C sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = start; i < stop; ++i)
          sum += backward_element<T, kGuided, kSplit, kWhat>(a, g, r, g1, gz, i, factor, lower, upper);
        total += sum;
      }
      if (kWhat != kNone) s[row] = static_cast<C>(total);
    }
    return;
  }
  const int64_t channels = shape.c;
  sum_channels_last<C>(shape, s, kWhat != kNone, threads, [=](int64_t start, C* acc) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c)
      acc[c] += backward_element<T, kGuided, kSplit, kWhat>(a, g, r, g1, gz, start + c, scale[c], lower,
                                                            upper);
  });
}

template <class T, bool kGuided, bool kSplit>
static void backward_what(const Shape& shape, const AffineReluBackward& op, int threads) {
  switch (op.attribute) {
    case kNone: return backward_typed<T, kGuided, kSplit, kNone>(shape, op, threads);
    case kOutput: return backward_typed<T, kGuided, kSplit, kOutput>(shape, op, threads);
    case kBranch: return backward_typed<T, kGuided, kSplit, kBranch>(shape, op, threads);
  }
}

// -- attribution ------------------------------------------------------------------------------------

enum Measure { kProduct, kAbsoluteProduct, kNonzero };

// What one element adds to the sum.
template <class T, Measure kWhat>
static inline Compute<T> measured(const T* x, const T* g, int64_t i) {
  using E = Element<T>;
  if (kWhat == kNonzero) return counted<T>(x[i]);
  const Compute<T> flow = E::load(x[i]) * E::load(g[i]);
  return kWhat == kAbsoluteProduct && flow < 0 ? -flow : flow;
}

template <class T, Measure kWhat>
static void attribution_typed(const Shape& shape, const Attribution& op, int threads) {
  using C = Compute<T>;
  const T* x = static_cast<const T*>(op.x);
  const T* g = static_cast<const T*>(op.g);
  C* s = static_cast<C*>(op.s);
  if (shape.layout == kChannelsFirst) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < shape.n * shape.c; ++row) {
      const int64_t end = (row + 1) * shape.p;
      double total = 0;
      for (int64_t start = row * shape.p; start < end; start += kBlock) {
        const int64_t stop = smaller(start + kBlock, end);
        C sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = start; i < stop; ++i) sum += measured<T, kWhat>(x, g, i);
        total += sum;
      }
      s[row] = static_cast<C>(total);
    }
    return;
  }
  const int64_t channels = shape.c;
  sum_channels_last<C>(shape, s, true, threads, [=](int64_t start, C* acc) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) acc[c] += measured<T, kWhat>(x, g, start + c);
  });
}

#include "max_pool.inl"
#include "normalize.inl"
#include "vectors.inl"

// These need the vectors.
#include "depthwise.inl"
#include "joined.inl"
#include "pointwise.inl"
#include "winograd.inl"

// And this one the convolution.
#include "pointwise_backward.inl"

// -- dispatch ---------------------------------------------------------------------------------------

#define ATTRFAST_BY_DTYPE(dtype, call) \
  switch (dtype) {                     \
    case kFloat: {                     \
      using T = float;                 \
      call;                            \
    } break;                           \
    case kDouble: {                    \
      using T = double;                \
      call;                            \
    } break;                           \
    case kBFloat16: {                  \
      using T = BFloat16;              \
      call;                            \
    } break;                           \
    case kHalf: {                      \
      using T = Half;                  \
      call;                            \
    } break;                           \
  }

static void affine_relu(Dtype dtype, const Shape& shape, const AffineRelu& op, int threads) {
  if (op.residual && op.count) {
    ATTRFAST_BY_DTYPE(dtype, (affine_relu_typed<T, true, true>(shape, op, threads)))
  } else if (op.residual) {
    ATTRFAST_BY_DTYPE(dtype, (affine_relu_typed<T, true, false>(shape, op, threads)))
  } else if (op.count) {
    ATTRFAST_BY_DTYPE(dtype, (affine_relu_typed<T, false, true>(shape, op, threads)))
  } else {
    ATTRFAST_BY_DTYPE(dtype, (affine_relu_typed<T, false, false>(shape, op, threads)))
  }
}

static void affine_relu_backward(Dtype dtype, const Shape& shape, const AffineReluBackward& op,
                                 int threads) {
  const bool split = op.g1 != nullptr;
  if (op.guided && split) {
    ATTRFAST_BY_DTYPE(dtype, (backward_what<T, true, true>(shape, op, threads)))
  } else if (op.guided) {
    ATTRFAST_BY_DTYPE(dtype, (backward_what<T, true, false>(shape, op, threads)))
  } else if (split) {
    ATTRFAST_BY_DTYPE(dtype, (backward_what<T, false, true>(shape, op, threads)))
  } else {
    ATTRFAST_BY_DTYPE(dtype, (backward_what<T, false, false>(shape, op, threads)))
  }
}

static void attribution(Dtype dtype, const Shape& shape, const Attribution& op, int threads) {
  if (!op.g) {
    ATTRFAST_BY_DTYPE(dtype, (attribution_typed<T, kNonzero>(shape, op, threads)))
  } else if (op.absolute) {
    ATTRFAST_BY_DTYPE(dtype, (attribution_typed<T, kAbsoluteProduct>(shape, op, threads)))
  } else {
    ATTRFAST_BY_DTYPE(dtype, (attribution_typed<T, kProduct>(shape, op, threads)))
  }
}

static void affine_relu_max_pool(Dtype dtype, const Shape& shape, const Pool& pool,
                                 const AffineReluMaxPool& op, int threads) {
  if (op.count) {
    ATTRFAST_BY_DTYPE(dtype, (max_pool_typed<T, true>(shape, pool, op, threads)))
  } else {
    ATTRFAST_BY_DTYPE(dtype, (max_pool_typed<T, false>(shape, pool, op, threads)))
  }
}

static void affine_relu_max_pool_backward(Dtype dtype, const Shape& shape, const Pool& pool,
                                          const AffineReluMaxPoolBackward& op, int threads) {
  ATTRFAST_BY_DTYPE(dtype, (max_pool_backward_typed<T>(shape, pool, op, threads)))
}

static void segment_normalize(Dtype dtype, const SegmentNormalize& op, int threads) {
  ATTRFAST_BY_DTYPE(dtype, (segment_normalize_typed<T>(op, threads)))
}

static void joined(Dtype dtype, const Shape& shape, const Joined& op, void* y, int threads) {
  ATTRFAST_BY_DTYPE(dtype, (joined_typed<T>(shape, op, y, threads)))
}

static void joined_backward(Dtype dtype, const Shape& shape, const JoinedBackward& op, int threads) {
  if (op.guided) {
    ATTRFAST_BY_DTYPE(dtype, (joined_backward_typed<T, true>(shape, op, threads)))
  } else {
    ATTRFAST_BY_DTYPE(dtype, (joined_backward_typed<T, false>(shape, op, threads)))
  }
}

// Convolutions are of floats or bfloat16.
#define ATTRFAST_BY_WIDTH(dtype, call) \
  if (dtype == kBFloat16) {            \
    using T = BFloat16;                \
    call;                              \
  } else {                             \
    using T = float;                   \
    call;                              \
  }

static void pointwise(Dtype dtype, const Pointwise& op, int threads) {
  ATTRFAST_BY_WIDTH(dtype, pointwise_typed<T>(op, threads))
}

static int64_t pointwise_floats(Dtype dtype, const Pointwise& op, bool backward, int threads) {
  ATTRFAST_BY_WIDTH(dtype, return PointwisePlan<T>(op, backward).floats(threads))
}

static void pointwise_backward(Dtype dtype, const PointwiseBackward& op, int threads) {
  ATTRFAST_BY_WIDTH(dtype, pointwise_backward_ruled<T>(op, threads))
}

static void depthwise(Dtype dtype, const Depthwise& op, int threads) {
  ATTRFAST_BY_WIDTH(dtype, depthwise_typed<T>(op, threads))
}

static void depthwise_backward(Dtype dtype, const DepthwiseBackward& op, int threads) {
  ATTRFAST_BY_WIDTH(dtype, depthwise_backward_ruled<T>(op, threads))
}

static const Kernels kernels = {ATTRFAST_ISA_NAME,
                                affine_relu,
                                affine_relu_backward,
                                attribution,
                                affine_relu_max_pool,
                                affine_relu_max_pool_backward,
                                segment_normalize,
                                winograd,
                                winograd_floats,
                                pointwise,
                                pointwise_floats,
                                pointwise_backward,
                                depthwise,
                                depthwise_floats,
                                depthwise_backward,
                                joined,
                                joined_backward};

}  // namespace ATTRFAST_ISA
}  // namespace attrfast
