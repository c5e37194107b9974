// What can be told of a launch before it runs: arguments that no kernel could work on are refused with
// std::invalid_argument, which Python gets as ValueError.
//
// An address is a number here. Whether there is memory of that size behind it, what it holds, and whether it
// lives until the launch is done, nobody can tell from the number: that is the caller's to know.
#pragma once

#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "attribution.h"

namespace attrfast {

// Of one tensor, and of one size: no machine addresses more, and sizes of that order still multiply within 64
// bits where the kernels do so.
constexpr int64_t kMostElements = int64_t{1} << 47;

// Where a launch reads and writes. Collected one by one, and then compared: `apart`.
class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  void require(bool holds, const std::string& what) const {
    if (!holds) throw std::invalid_argument(std::string(op_) + ": " + what);
  }

  int64_t within(const char* name, int64_t value, int64_t least, int64_t most) const {
    require(least <= value && value <= most, std::string(name) + " is " + std::to_string(value) +
                                                 ", expected " + std::to_string(least) + " to " +
                                                 std::to_string(most));
    return value;
  }

  // Elements of a tensor of these sizes.
  int64_t elements(const char* name, std::initializer_list<int64_t> sizes) const {
    int64_t product = 1;
    bool empty = false;
    for (int64_t size : sizes) empty |= within(name, size, 0, kMostElements) == 0;
    for (int64_t size : sizes) {
      require(empty || product <= kMostElements / size, std::string(name) + " has too many elements");
      product = empty ? 0 : product * size;
    }
    return product;
  }

  void reads(const char* name, const void* at, int64_t count, int64_t width) {
    add({name, at, count, width, false, ""});
  }

  // What may be null is left out of the launch then.
  void may_read(const char* name, const void* at, int64_t count, int64_t width) {
    if (at) reads(name, at, count, width);
  }

  // `same` names what is read and may be exactly this memory.
  void writes(const char* name, const void* at, int64_t count, int64_t width, const char* same = "") {
    add({name, at, count, width, true, same});
  }

  void may_write(const char* name, const void* at, int64_t count, int64_t width, const char* same = "") {
    if (at) writes(name, at, count, width, same);
  }

  // Nothing that is written overlaps anything else.
  void apart() const {
    for (size_t i = 0; i < regions_.size(); ++i) {
      for (size_t j = 0; j < i; ++j) {
        const Region &a = regions_[i], &b = regions_[j];
        if (!(a.written || b.written) || a.begin() >= b.end() || b.begin() >= a.end()) continue;
        const bool whole = a.begin() == b.begin() && a.end() == b.end();
        const bool meant = std::string(a.same) == b.name || std::string(b.same) == a.name;
        require(whole && meant, std::string(a.name) + " overlaps " + b.name);
      }
    }
  }

 private:
  struct Region {
    const char* name;
    const void* at;
    int64_t count, width;
    bool written;
    const char* same;
    uintptr_t begin() const { return reinterpret_cast<uintptr_t>(at); }
    uintptr_t end() const { return begin() + static_cast<uintptr_t>(count * width); }
  };

  void add(const Region& region) {
    if (region.count == 0) return;
    const std::string name(region.name);
    require(region.at != nullptr, name + " is null");
    require(region.begin() % region.width == 0, name + " is not aligned to its elements");
    require(region.end() > region.begin(), name + " reaches beyond the last address");
    regions_.push_back(region);
  }

  const char* op_;
  std::vector<Region> regions_;
};

inline int64_t width_of(Dtype dtype) { return dtype == kFloat ? 4 : dtype == kDouble ? 8 : 2; }
inline int64_t compute_width_of(Dtype dtype) { return dtype == kDouble ? 8 : 4; }

inline void check_dtype(const Check& check, Dtype dtype) { check.within("dtype", dtype, kFloat, kHalf); }

// Elements of the tensors of a launch.
inline int64_t check_shape(const Check& check, Dtype dtype, const Shape& shape) {
  check_dtype(check, dtype);
  check.within("layout", shape.layout, kChannelsFirst, kChannelsLast);
  check.elements("(N, C)", {shape.n, shape.c});
  return check.elements("(N, C, P)", {shape.n, shape.c, shape.p});
}

inline void check_bounds(const Check& check, double lower, double upper) {
  check.require(lower <= upper, "lower must not exceed upper, and neither may be NaN");
}

// The shape of a pooling's result. What is not a size stays none: check_pool refuses it.
inline Shape pooled_shape(int64_t n, int64_t c, const Pool& pool, int layout) {
  int64_t p = 0;
  if (__builtin_mul_overflow(pool.rows, pool.columns, &p)) p = -1;
  return {n, c, p, static_cast<Layout>(layout)};
}

inline void check_pool(const Check& check, const Shape& shape, const Pool& pool) {
  const int64_t in[2] = {pool.h, pool.w}, out[2] = {pool.rows, pool.columns};
  for (int i = 0; i < 2; ++i) {
    check.within("kernel", pool.kernel[i], 1, 255);
    check.within("stride", pool.stride[i], 1, std::numeric_limits<int32_t>::max());
    check.within("padding", pool.padding[i], 0, pool.kernel[i] / 2);
    check.within("input size", in[i], 1, kMostElements);
    const int64_t room = in[i] + 2 * pool.padding[i] - pool.kernel[i], step = pool.stride[i];
    check.require(room >= 0, "the input has no room for a window");
    // The last window of ceil mode must start inside the input.
    const int64_t most = (room + step - 1) / step + 1;
    const bool outside = (most - 1) * step >= in[i] + pool.padding[i];
    check.within("output size", out[i], room / step + 1, outside ? most - 1 : most);
  }
  check.require(pool.kernel[0] * pool.kernel[1] <= 255, "a window has more than 255 places");
  check.elements("the input", {shape.n, shape.c, pool.h, pool.w});
}

// Each of these refuses a launch, or says whether there is anything to do.

inline bool to_do(Dtype dtype, const Shape& shape, const AffineRelu& op) {
  Check check("affine_relu");
  const int64_t count = check_shape(check, dtype, shape), width = width_of(dtype);
  const int64_t wide = compute_width_of(dtype);
  check_bounds(check, op.lower, op.upper);
  check.reads("z", op.z, count, width);
  check.may_read("scale", op.scale, shape.c, wide);
  check.may_read("shift", op.shift, shape.c, wide);
  check.may_read("residual", op.residual, count, width);
  check.writes("y", op.y, count, width, "z");
  check.may_write("count", op.count, shape.n * shape.c, wide);
  check.apart();
  return shape.n * shape.c > 0;
}

inline bool to_do(Dtype dtype, const Shape& shape, const AffineReluBackward& op) {
  Check check("affine_relu_backward");
  const int64_t count = check_shape(check, dtype, shape), width = width_of(dtype);
  const int64_t wide = compute_width_of(dtype);
  check_bounds(check, op.lower, op.upper);
  check.within("attribute", op.attribute, kNone, kBranch);
  check.reads("a", op.a, count, width);
  check.reads("g", op.g, count, width);
  check.may_read("scale", op.scale, shape.c, wide);
  if (op.attribute == kBranch) check.reads("residual", op.residual, count, width);
  check.may_write("g1", op.g1, count, width, "g");
  check.writes("gz", op.gz, count, width, op.g1 ? "" : "g");
  if (op.attribute != kNone) check.writes("s", op.s, shape.n * shape.c, wide);
  check.apart();
  return shape.n * shape.c > 0;
}

inline bool to_do(Dtype dtype, const Shape& shape, const Attribution& op) {
  Check check("attribution");
  const int64_t count = check_shape(check, dtype, shape), width = width_of(dtype);
  check.reads("x", op.x, count, width);
  check.may_read("g", op.g, count, width);
  check.writes("s", op.s, shape.n * shape.c, compute_width_of(dtype));
  check.apart();
  return shape.n * shape.c > 0;
}

inline bool to_do(Dtype dtype, const Shape& shape, const Pool& pool, const AffineReluMaxPool& op) {
  Check check("affine_relu_max_pool");
  check_pool(check, shape, pool);
  const int64_t count = check_shape(check, dtype, shape), channels = shape.n * shape.c;
  const int64_t width = width_of(dtype), wide = compute_width_of(dtype);
  check_bounds(check, op.lower, op.upper);
  check.reads("z", op.z, channels * pool.h * pool.w, width);
  check.may_read("scale", op.scale, shape.c, wide);
  check.may_read("shift", op.shift, shape.c, wide);
  check.writes("p", op.p, count, width);
  check.writes("code", op.code, count, 1);
  check.may_write("count", op.count, channels, wide);
  check.apart();
  return channels > 0;
}

// `s` is null where the launch does not write it.
inline bool to_do(Dtype dtype, const Shape& shape, const Pool& pool, const AffineReluMaxPoolBackward& op,
                  const void* s = nullptr) {
  Check check("affine_relu_max_pool_backward");
  check_pool(check, shape, pool);
  const int64_t count = check_shape(check, dtype, shape), channels = shape.n * shape.c;
  const int64_t width = width_of(dtype), wide = compute_width_of(dtype);
  check_bounds(check, op.lower, op.upper);
  check.reads("p", op.p, count, width);
  check.reads("g", op.g, count, width);
  check.reads("code", op.code, count, 1);
  check.may_read("scale", op.scale, shape.c, wide);
  check.writes("gz", op.gz, channels * pool.h * pool.w, width);
  check.may_write("s", s, channels, wide);
  check.apart();
  return channels > 0;
}

// Where the offsets can be read, `elements` is the last one; it is 0 where they can't.
inline bool to_do(Dtype dtype, const SegmentNormalize& op, int64_t elements) {
  Check check("segment_normalize");
  check_dtype(check, dtype);
  check.within("kind", op.kind, kL2, kMax);
  check.within("segments", op.segments, 0, kMostElements);
  check.reads("theta", op.theta, elements, width_of(dtype));
  check.reads("offsets", op.offsets, op.segments + 1, sizeof(int64_t));
  check.writes("out", op.out, elements, width_of(dtype));
  check.apart();
  return op.segments > 0;
}

// Sizes of a convolution; the memory of a launch is checked apart, because its scratch follows from the sizes.
inline bool to_do(const Winograd& op) {
  Check check("winograd");
  check.within("channels_in", op.channels_in, 1, std::numeric_limits<int32_t>::max());
  check.within("channels_out", op.channels_out, 0, std::numeric_limits<int32_t>::max());
  int64_t size[2] = {op.h, op.w};
  for (int i = 0; i < 2; ++i) {
    check.within("padding", op.padding[i], 0, 2);
    check.within("input size", size[i], 1, kMostElements);
    size[i] += 2 * op.padding[i] - 2;
    check.require(size[i] >= 1, "the input has no room for a window");
  }
  check.elements("x", {op.n, op.h, op.w, op.channels_in});
  check.elements("y", {op.n, size[0], size[1], op.channels_out});
  return op.n > 0 && op.channels_out > 0;
}

struct Steps {
  int64_t size, step;
};

// Elements from a weight's first to its last one that is read.
inline int64_t reach(const Check& check, std::initializer_list<Steps> dimensions) {
  int64_t last = 0;
  for (const auto& [size, step] : dimensions) {
    check.within("a stride of the weight", step, 0, kMostElements);
    check.require(size == 1 || step <= kMostElements / (size - 1), "the weight has too many elements");
    last += (size - 1) * step;
  }
  return last + 1;
}

// The memory that all convolutions have after x and the weight; y has so many channels and elements.
template <class Convolution>
inline void check_end(Check& check, Dtype dtype, const Convolution& op, int64_t channels, int64_t y,
                      int64_t scratch_floats) {
  check.may_read("scale", op.scale, channels, sizeof(float));
  check.may_read("shift", op.shift, channels, sizeof(float));
  check.may_read("residual", op.residual, y, width_of(dtype));
  check.writes("y", op.y, y, width_of(dtype), "residual");
  check.writes("scratch", op.scratch, scratch_floats, sizeof(float));
  check.apart();
}

inline void check_memory(const Winograd& op, double lower, double upper, int64_t scratch_floats) {
  Check check("winograd");
  check_bounds(check, lower, upper);
  const int64_t y =
      op.n * (op.h + 2 * op.padding[0] - 2) * (op.w + 2 * op.padding[1] - 2) * op.channels_out;
  const int64_t weight = reach(
      check, {{op.channels_out, op.weight_out}, {op.channels_in, op.weight_in}, {9, op.weight_tap}});
  check.reads("x", op.x, op.n * op.h * op.w * op.channels_in, sizeof(float));
  check.reads("weight", op.weight, weight, sizeof(float));
  check_end(check, kFloat, op, op.channels_out, y, scratch_floats);
}

inline void check_convolved(const Check& check, Dtype dtype) {
  check.require(dtype == kFloat || dtype == kBFloat16,
                "dtype is " + std::to_string(dtype) + ", expected that of float32 or bfloat16");
}

// Sizes of a 1x1 convolution; its memory is checked apart, as a Winograd's is.
inline bool to_do(Dtype dtype, const Pointwise& op) {
  Check check("pointwise");
  check_convolved(check, dtype);
  check.within("channels_in", op.channels_in, 1, std::numeric_limits<int32_t>::max());
  check.within("channels_out", op.channels_out, 0, std::numeric_limits<int32_t>::max());
  check.elements("x", {op.n, op.positions, op.channels_in});
  check.elements("y", {op.n, op.positions, op.channels_out});
  return op.n > 0 && op.positions > 0 && op.channels_out > 0;
}

inline void check_memory(Dtype dtype, const Pointwise& op, double lower, double upper,
                         int64_t scratch_floats) {
  Check check("pointwise");
  check_bounds(check, lower, upper);
  const int64_t rows = op.n * op.positions, y = rows * op.channels_out;
  const int64_t weight =
      reach(check, {{op.channels_out, op.weight_out}, {op.channels_in, op.weight_in}});
  check.reads("x", op.x, rows * op.channels_in, width_of(dtype));
  check.reads("weight", op.weight, weight, width_of(dtype));
  check.may_read("factor", op.factor, op.channels_in, sizeof(float));
  check_end(check, dtype, op, op.channels_out, y, scratch_floats);
}

// Sizes of a depthwise convolution; its memory is checked apart, as a Winograd's is.
inline bool to_do(const Depthwise& op) {
  Check check("depthwise");
  check.within("channels", op.channels, 0, std::numeric_limits<int32_t>::max());
  check.require(op.kernel == 3 || op.kernel == 5 || op.kernel == 7, "the kernel must be 3, 5 or 7");
  check.within("stride", op.stride, 1, 2);
  for (int i = 0; i < 2; ++i) {
    check.within("padding", op.padding[i], 0, op.kernel - 1);
    const int64_t wide = check.within("input size", op.input[i], 1, std::numeric_limits<int32_t>::max());
    const int64_t made =
        check.within("output size", op.output[i], 1, std::numeric_limits<int32_t>::max());
    const int64_t large = op.transposed ? made : wide, small = op.transposed ? wide : made;
    check.require(large + 2 * op.padding[i] >= op.kernel, "the input has no room for a window");
    check.require((large + 2 * op.padding[i] - op.kernel) / op.stride + 1 == small,
                  "no such convolution has this input and output");
  }
  check.elements("x", {op.n, op.input[0], op.input[1], op.channels});
  check.elements("y", {op.n, op.output[0], op.output[1], op.channels});
  return op.n > 0 && op.channels > 0;
}

// Of x, which the launch calls `name`, the weight and the factor; gives the elements of y.
inline int64_t check_reads(Check& check, Dtype dtype, const Depthwise& op, const char* name) {
  check_convolved(check, dtype);
  const int64_t weight = reach(
      check,
      {{op.channels, op.weight_channel}, {op.kernel, op.weight_row}, {op.kernel, op.weight_column}});
  check.reads(name, op.x, op.n * op.input[0] * op.input[1] * op.channels, width_of(dtype));
  check.reads("weight", op.weight, weight, width_of(dtype));
  check.may_read("factor", op.factor, op.channels, sizeof(float));
  return op.n * op.output[0] * op.output[1] * op.channels;
}

inline void check_memory(Dtype dtype, const Depthwise& op, double lower, double upper,
                         int64_t scratch_floats) {
  Check check("depthwise");
  check_bounds(check, lower, upper);
  const int64_t y = check_reads(check, dtype, op, "x");
  check_end(check, dtype, op, op.channels, y, scratch_floats);
}

inline void check_memory(Dtype dtype, const DepthwiseBackward& op, int64_t scratch_floats) {
  Check check("depthwise_backward");
  check_bounds(check, op.lower, op.upper);
  const Depthwise& product = op.product;
  const int64_t y = check_reads(check, dtype, product, "g");
  check.reads("a", op.a, product.n * product.input[0] * product.input[1] * product.channels,
              width_of(dtype));
  check.may_write("s", op.s, product.n * product.channels, sizeof(float));
  check_end(check, dtype, product, product.channels, y, scratch_floats);
}

inline void check_memory(Dtype dtype, const PointwiseBackward& op, int64_t scratch_floats) {
  Check check("pointwise_backward");
  check_bounds(check, op.lower, op.upper);
  check.within("attribute", op.attribute, kNone, kBranch);
  const Pointwise& product = op.product;
  const int64_t rows = product.n * product.positions, g = rows * product.channels_in;
  const int64_t width = width_of(dtype);
  const int64_t weight = reach(
      check, {{product.channels_out, product.weight_out}, {product.channels_in, product.weight_in}});
  check.reads("a", op.a, g, width);
  check.reads("g", product.x, g, width);
  check.reads("weight", product.weight, weight, width);
  check.may_read("scale", product.factor, product.channels_in, sizeof(float));
  if (op.attribute == kBranch) check.reads("residual", op.residual, g, width);
  check.may_write("g1", op.g1, g, width, "g");
  check.writes("gx", product.y, rows * product.channels_out, width);
  if (op.attribute != kNone) check.writes("s", op.s, product.n * product.channels_in, sizeof(float));
  check.writes("scratch", product.scratch, scratch_floats, sizeof(float));
  check.apart();
}

// Of the parts and the vectors; gives the elements of the joined map.
inline int64_t check_parts(Check& check, Dtype dtype, const Shape& shape, const Joined& op) {
  const int64_t count = check_shape(check, dtype, shape), wide = compute_width_of(dtype);
  check_bounds(check, op.lower, op.upper);
  int64_t channels = 0;
  for (int64_t i = 0; i < op.count; ++i) {
    const int64_t mine = check.within("channels of a part", op.channels[i], 0, shape.c - channels);
    check.reads("x", op.x[i], shape.n * shape.p * mine, width_of(dtype));
    channels += mine;
  }
  check.require(channels == shape.c, "the parts have " + std::to_string(channels) +
                                         " channels, expected " + std::to_string(shape.c));
  check.reads("scale", op.scale, shape.c, wide);
  check.reads("shift", op.shift, shape.c, wide);
  return count;
}

inline bool to_do(Dtype dtype, const Shape& shape, const Joined& op, const void* y) {
  Check check("joined");
  const int64_t count = check_parts(check, dtype, shape, op);
  check.writes("y", y, count, width_of(dtype));
  check.apart();
  return count > 0;
}

inline bool to_do(Dtype dtype, const Shape& shape, const JoinedBackward& op) {
  Check check("joined_backward");
  const int64_t count = check_parts(check, dtype, shape, op.joined), width = width_of(dtype);
  check.reads("g", op.g, count, width);
  for (int64_t i = 0; i < op.joined.count; ++i)
    check.may_write("gx", op.gx[i], shape.n * shape.p * op.joined.channels[i], width);
  check.may_write("s", op.s, shape.n * shape.c, compute_width_of(dtype));
  check.apart();
  return shape.n * shape.c > 0;
}

}  // namespace attrfast
