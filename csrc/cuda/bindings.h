// The GPU's launches as Python functions over raw pointers; ../bindings.cpp makes them attrfast._native.cuda.
// Arguments come in the order of the CPU's, but for what replaces `threads`: scratch memory where sums
// need it, the device, and the stream. They are checked as the CPU's are.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../arguments.h"
#include "../checks.h"
#include "launches.h"

namespace attrfast::cuda {

// Scratch memory for as many doubles as a launch needs.
inline double* doubles(Address a, int64_t count) {
  Check("scratch").writes("it", out(a), count, sizeof(double));
  return reinterpret_cast<double*>(a);
}

inline Queue queue_of(const Shape& shape, int device, Address stream) {
  Check("a launch on a GPU").within("c", shape.c, 0, std::numeric_limits<int32_t>::max());
  return {device, stream};
}

// (dtype, layout, n, c, p, x, g, s, stride)
using TapTuple = std::tuple<int, int, int64_t, int64_t, int64_t, Address, Address, Address, int64_t>;

inline void bind(pybind11::module_& m) {
  namespace py = pybind11;
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("sums_scratch", [](int dtype, int layout, int64_t n, int64_t c, int64_t p) {
    const Shape shape = shape_of(n, c, p, layout);
    check_shape(Check("sums_scratch"), static_cast<Dtype>(dtype), shape);
    return sums_scratch(static_cast<Dtype>(dtype), shape);
  });
  const auto scratch_of = [&m](const char* name, int64_t (*scratch)(Dtype, const Shape&, const Pool&)) {
    m.def(name, [name, scratch](int dtype, int layout, int64_t n, int64_t c, Two input, Two output,
                                Two kernel, Two stride, Two padding) {
      const Pool pool = pool_of(input, output, kernel, stride, padding);
      const Shape shape = pooled_shape(n, c, pool, layout);
      check_pool(Check(name), shape, pool);
      check_shape(Check(name), static_cast<Dtype>(dtype), shape);
      return scratch(static_cast<Dtype>(dtype), shape, pool);
    });
  };
  scratch_of("pool_scratch", pool_scratch);
  scratch_of("pool_backward_scratch", pool_backward_scratch);
  m.def(
      "affine_relu",
      [](int dtype, int layout, int64_t n, int64_t c, int64_t p, Address z, Address scale, Address shift,
         Address residual, Address y, Address count, double lower, double upper, Address scratch,
         int device, Address stream) {
        const Dtype type = static_cast<Dtype>(dtype);
        const Shape shape = shape_of(n, c, p, layout);
        const AffineRelu op = {in(z),  in(scale),  in(shift), in(residual),
                               out(y), out(count), lower,     upper};
        if (!to_do(type, shape, op)) return;
        affine_relu(type, shape, op, doubles(scratch, count ? sums_scratch(type, shape) : 0),
                    queue_of(shape, device, stream));
      },
      unlocked);
  m.def(
      "affine_relu_backward",
      [](int dtype, int layout, int64_t n, int64_t c, int64_t p, Address a, Address g, Address scale,
         Address residual, Address g1, Address gz, Address s, double lower, double upper, bool guided,
         int attribute, Address scratch, int device, Address stream) {
        const Dtype type = static_cast<Dtype>(dtype);
        const Shape shape = shape_of(n, c, p, layout);
        const AffineReluBackward op =
            backward_of(a, g, scale, residual, g1, gz, s, lower, upper, guided, attribute);
        if (!to_do(type, shape, op)) return;
        affine_relu_backward(type, shape, op,
                             doubles(scratch, attribute ? sums_scratch(type, shape) : 0),
                             queue_of(shape, device, stream));
      },
      unlocked);
  m.def(
      "attribution",
      [](int dtype, int layout, int64_t n, int64_t c, int64_t p, Address x, Address g, Address s,
         bool absolute, Address scratch, int device, Address stream) {
        const Dtype type = static_cast<Dtype>(dtype);
        const Shape shape = shape_of(n, c, p, layout);
        const Attribution op = {in(x), in(g), out(s), absolute};
        if (!to_do(type, shape, op)) return;
        attribution(type, shape, op, doubles(scratch, sums_scratch(type, shape)),
                    queue_of(shape, device, stream));
      },
      unlocked);
  m.def(
      "affine_relu_max_pool",
      [](int dtype, int layout, int64_t n, int64_t c, Two input, Two output, Two kernel, Two stride,
         Two padding, Address z, Address scale, Address shift, Address p, Address code, Address count,
         double lower, double upper, Address scratch, int device, Address stream) {
        const Dtype type = static_cast<Dtype>(dtype);
        const Pool pool = pool_of(input, output, kernel, stride, padding);
        const Shape shape = pooled_shape(n, c, pool, layout);
        const AffineReluMaxPool op = {
            in(z),      in(scale), in(shift), out(p), static_cast<uint8_t*>(out(code)),
            out(count), lower,     upper};
        if (!to_do(type, shape, pool, op)) return;
        affine_relu_max_pool(type, shape, pool, op,
                             doubles(scratch, count ? pool_scratch(type, shape, pool) : 0),
                             queue_of(shape, device, stream));
      },
      unlocked);
  m.def(
      "affine_relu_max_pool_backward",
      [](int dtype, int layout, int64_t n, int64_t c, Two input, Two output, Two kernel, Two stride,
         Two padding, Address p, Address code, Address g, Address scale, Address gz, Address s,
         double lower, double upper, bool guided, Address scratch, int device, Address stream) {
        const Dtype type = static_cast<Dtype>(dtype);
        const Pool pool = pool_of(input, output, kernel, stride, padding);
        const Shape shape = pooled_shape(n, c, pool, layout);
        const AffineReluMaxPoolBackward op = {
            in(p),   in(g), in(scale), static_cast<const uint8_t*>(in(code)),
            out(gz), lower, upper,     guided};
        if (!to_do(type, shape, pool, op, in(s))) return;
        affine_relu_max_pool_backward(type, shape, pool, op, out(s),
                                      doubles(scratch, s ? pool_backward_scratch(type, shape, pool) : 0),
                                      queue_of(shape, device, stream));
      },
      unlocked);
  // The offsets lie in the GPU's memory: whether they ascend is not looked at.
  m.def(
      "segment_normalize",
      [](int dtype, Address theta, Address offsets, int64_t segments, int64_t elements, Address result,
         int kind, int device, Address stream) {
        const Dtype type = static_cast<Dtype>(dtype);
        const SegmentNormalize op = {in(theta), static_cast<const int64_t*>(in(offsets)), segments,
                                     out(result), static_cast<Norm>(kind)};
        if (to_do(type, op, elements)) segment_normalize(type, op, {device, stream});
      },
      unlocked);
  m.def(
      "many_taps",
      [](const std::vector<TapTuple>& tuples, bool absolute, int device, Address stream) {
        std::vector<Tap> taps;
        for (const auto& [dtype, layout, n, c, p, x, g, s, stride] : tuples) {
          const Dtype type = static_cast<Dtype>(dtype);
          const Shape shape = shape_of(n, c, p, layout);
          Check("many_taps").within("stride", stride, c, kMostElements);
          Check("many_taps").elements("s", {n, stride});
          to_do(type, shape, Attribution{in(x), in(g), out(s), absolute});
          taps.push_back({type, shape, in(x), in(g), out(s), stride});
        }
        many_taps(taps, absolute, {device, stream});
      },
      unlocked);
}

}  // namespace attrfast::cuda
