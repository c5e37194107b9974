// The GPU's launches as Python functions over raw pointers; ../bindings.cpp makes them attrfast._native.cuda.
// Arguments come in the order of the CPU's, but for what replaces `threads`: scratch memory where sums
// need it, the device, and the stream.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "launches.h"

namespace attrfast::cuda {

using Address = std::uintptr_t;
using Two = std::pair<int64_t, int64_t>;

inline const void* in(Address a) { return reinterpret_cast<const void*>(a); }
inline void* out(Address a) { return reinterpret_cast<void*>(a); }
inline double* doubles(Address a) { return reinterpret_cast<double*>(a); }

inline Shape shape_of(int64_t n, int64_t c, int64_t p, int layout) {
  return {n, c, p, static_cast<Layout>(layout)};
}

inline Pool pool_of(Two input, Two output, Two kernel, Two stride, Two padding) {
  return {input.first,
          input.second,
          output.first,
          output.second,
          {kernel.first, kernel.second},
          {stride.first, stride.second},
          {padding.first, padding.second}};
}

// (dtype, layout, n, c, p, x, g, s, stride)
using TapTuple = std::tuple<int, int, int64_t, int64_t, int64_t, Address, Address, Address, int64_t>;

inline void bind(pybind11::module_& m) {
  namespace py = pybind11;
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("sums_scratch", [](int dtype, int layout, int64_t n, int64_t c, int64_t p) {
    return sums_scratch(static_cast<Dtype>(dtype), shape_of(n, c, p, layout));
  });
  const auto scratch_of = [&m](const char* name, int64_t (*scratch)(Dtype, const Shape&, const Pool&)) {
    m.def(name, [scratch](int dtype, int layout, int64_t n, int64_t c, Two input, Two output, Two kernel,
                          Two stride, Two padding) {
      return scratch(static_cast<Dtype>(dtype), shape_of(n, c, output.first * output.second, layout),
                     pool_of(input, output, kernel, stride, padding));
    });
  };
  scratch_of("pool_scratch", pool_scratch);
  scratch_of("pool_backward_scratch", pool_backward_scratch);
  m.def(
      "affine_relu",
      [](int dtype, int layout, int64_t n, int64_t c, int64_t p, Address z, Address scale, Address shift,
         Address residual, Address y, Address count, double lower, double upper, Address scratch,
         int device, Address stream) {
        affine_relu(static_cast<Dtype>(dtype), shape_of(n, c, p, layout),
                    {in(z), in(scale), in(shift), in(residual), out(y), out(count), lower, upper},
                    doubles(scratch), {device, stream});
      },
      unlocked);
  m.def(
      "affine_relu_backward",
      [](int dtype, int layout, int64_t n, int64_t c, int64_t p, Address a, Address g, Address scale,
         Address residual, Address g1, Address gz, Address s, double lower, double upper, bool guided,
         int attribute, Address scratch, int device, Address stream) {
        affine_relu_backward(static_cast<Dtype>(dtype), shape_of(n, c, p, layout),
                             {in(a), in(g), in(scale), in(residual), out(g1), out(gz), out(s), lower,
                              upper, guided, static_cast<Attribute>(attribute)},
                             doubles(scratch), {device, stream});
      },
      unlocked);
  m.def(
      "attribution",
      [](int dtype, int layout, int64_t n, int64_t c, int64_t p, Address x, Address g, Address s,
         bool absolute, Address scratch, int device, Address stream) {
        attribution(static_cast<Dtype>(dtype), shape_of(n, c, p, layout),
                    {in(x), in(g), out(s), absolute}, doubles(scratch), {device, stream});
      },
      unlocked);
  m.def(
      "affine_relu_max_pool",
      [](int dtype, int layout, int64_t n, int64_t c, Two input, Two output, Two kernel, Two stride,
         Two padding, Address z, Address scale, Address shift, Address p, Address code, Address count,
         double lower, double upper, Address scratch, int device, Address stream) {
        affine_relu_max_pool(static_cast<Dtype>(dtype),
                             shape_of(n, c, output.first * output.second, layout),
                             pool_of(input, output, kernel, stride, padding),
                             {in(z), in(scale), in(shift), out(p), static_cast<uint8_t*>(out(code)),
                              out(count), lower, upper},
                             doubles(scratch), {device, stream});
      },
      unlocked);
  m.def(
      "affine_relu_max_pool_backward",
      [](int dtype, int layout, int64_t n, int64_t c, Two input, Two output, Two kernel, Two stride,
         Two padding, Address p, Address code, Address g, Address scale, Address gz, Address s,
         double lower, double upper, bool guided, Address scratch, int device, Address stream) {
        affine_relu_max_pool_backward(static_cast<Dtype>(dtype),
                                      shape_of(n, c, output.first * output.second, layout),
                                      pool_of(input, output, kernel, stride, padding),
                                      {in(p), in(g), in(scale), static_cast<const uint8_t*>(in(code)),
                                       out(gz), lower, upper, guided},
                                      out(s), doubles(scratch), {device, stream});
      },
      unlocked);
  m.def(
      "segment_normalize",
      [](int dtype, Address theta, Address offsets, int64_t segments, Address result, int kind,
         int device, Address stream) {
        segment_normalize(static_cast<Dtype>(dtype),
                          {in(theta), static_cast<const int64_t*>(in(offsets)), segments, out(result),
                           static_cast<Norm>(kind)},
                          {device, stream});
      },
      unlocked);
  m.def(
      "many_taps",
      [](const std::vector<TapTuple>& tuples, bool absolute, int device, Address stream) {
        std::vector<Tap> taps;
        for (const auto& [dtype, layout, n, c, p, x, g, s, stride] : tuples)
          taps.push_back(
              {static_cast<Dtype>(dtype), shape_of(n, c, p, layout), in(x), in(g), out(s), stride});
        many_taps(taps, absolute, {device, stream});
      },
      unlocked);
}

}  // namespace attrfast::cuda
