// The Python module attrfast._native: launches over raw pointers. It knows no tensors; attrfast/native.py
// checks shapes and strides before it comes here.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "attribution.h"
#ifdef ATTRFAST_WITH_CUDA
#include "cuda/bindings.h"
#endif

namespace py = pybind11;
using namespace attrfast;

namespace {

// Instruction sets that this processor runs, the best first.
std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (avx512_kernels() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    found.push_back(avx512_kernels());
  if (avx2_kernels() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    found.push_back(avx2_kernels());
#endif
  found.push_back(baseline_kernels());
  return found;
}

const Kernels* chosen = available().front();

void use_isa(const std::string& name) {
  for (const Kernels* kernels : available()) {
    if (name == kernels->isa) {
      chosen = kernels;
      return;
    }
  }
  throw std::invalid_argument("no kernels for the instruction set '" + name + "' on this processor");
}

using Address = std::uintptr_t;
const void* in(Address a) { return reinterpret_cast<const void*>(a); }
void* out(Address a) { return reinterpret_cast<void*>(a); }

Shape shape_of(int64_t n, int64_t c, int64_t p, int layout) {
  return {n, c, p, static_cast<Layout>(layout)};
}

using Two = std::pair<int64_t, int64_t>;
Pool pool_of(Two input, Two output, Two kernel, Two stride, Two padding) {
  return {input.first,
          input.second,
          output.first,
          output.second,
          {kernel.first, kernel.second},
          {stride.first, stride.second},
          {padding.first, padding.second}};
}

void affine_relu(int dtype, int layout, int64_t n, int64_t c, int64_t p, Address z, Address scale,
                 Address shift, Address residual, Address y, Address count, double lower, double upper,
                 int threads) {
  chosen->affine_relu(static_cast<Dtype>(dtype), shape_of(n, c, p, layout),
                      {in(z), in(scale), in(shift), in(residual), out(y), out(count), lower, upper},
                      threads);
}

void affine_relu_backward(int dtype, int layout, int64_t n, int64_t c, int64_t p, Address a, Address g,
                          Address scale, Address residual, Address g1, Address gz, Address s,
                          double lower, double upper, bool guided, int attribute, int threads) {
  chosen->affine_relu_backward(static_cast<Dtype>(dtype), shape_of(n, c, p, layout),
                               {in(a), in(g), in(scale), in(residual), out(g1), out(gz), out(s), lower,
                                upper, guided, static_cast<Attribute>(attribute)},
                               threads);
}

void attribution(int dtype, int layout, int64_t n, int64_t c, int64_t p, Address x, Address g, Address s,
                 bool absolute, int threads) {
  chosen->attribution(static_cast<Dtype>(dtype), shape_of(n, c, p, layout),
                      {in(x), in(g), out(s), absolute}, threads);
}

void affine_relu_max_pool(int dtype, int layout, int64_t n, int64_t c, Two input, Two output, Two kernel,
                          Two stride, Two padding, Address z, Address scale, Address shift, Address p,
                          Address code, Address count, double lower, double upper, int threads) {
  chosen->affine_relu_max_pool(
      static_cast<Dtype>(dtype), shape_of(n, c, output.first * output.second, layout),
      pool_of(input, output, kernel, stride, padding),
      {in(z), in(scale), in(shift), out(p), static_cast<uint8_t*>(out(code)), out(count), lower, upper},
      threads);
}

void affine_relu_max_pool_backward(int dtype, int layout, int64_t n, int64_t c, Two input, Two output,
                                   Two kernel, Two stride, Two padding, Address p, Address code,
                                   Address g, Address scale, Address gz, double lower, double upper,
                                   bool guided, int threads) {
  chosen->affine_relu_max_pool_backward(
      static_cast<Dtype>(dtype), shape_of(n, c, output.first * output.second, layout),
      pool_of(input, output, kernel, stride, padding),
      {in(p), in(g), in(scale), static_cast<const uint8_t*>(in(code)), out(gz), lower, upper, guided},
      threads);
}

void segment_normalize(int dtype, Address theta, Address offsets, int64_t segments, Address result,
                       int kind, int threads) {
  chosen->segment_normalize(static_cast<Dtype>(dtype),
                            {in(theta), static_cast<const int64_t*>(in(offsets)), segments, out(result),
                             static_cast<Norm>(kind)},
                            threads);
}

Winograd winograd_of(int64_t n, Two input, int64_t channels_in, int64_t channels_out, Two padding) {
  Winograd op = {};
  op.n = n, op.h = input.first, op.w = input.second;
  op.channels_in = channels_in, op.channels_out = channels_out;
  op.padding[0] = padding.first, op.padding[1] = padding.second;
  return op;
}

int64_t winograd_floats(int64_t n, Two input, int64_t channels_in, int64_t channels_out, Two padding,
                        int threads) {
  return chosen->winograd_floats(winograd_of(n, input, channels_in, channels_out, padding), threads);
}

void winograd(int64_t n, Two input, int64_t channels_in, int64_t channels_out, Two padding, Address x,
              Address weight, int64_t weight_out, int64_t weight_in, int64_t weight_tap, bool flipped,
              Address scale, Address shift, Address residual, Address y, Address scratch, double lower,
              double upper, int threads) {
  Winograd op = winograd_of(n, input, channels_in, channels_out, padding);
  op.x = static_cast<const float*>(in(x)), op.weight = static_cast<const float*>(in(weight));
  op.weight_out = weight_out, op.weight_in = weight_in, op.weight_tap = weight_tap;
  op.flipped = flipped;
  op.scale = static_cast<const float*>(in(scale)), op.shift = static_cast<const float*>(in(shift));
  op.residual = static_cast<const float*>(in(residual));
  op.lower = static_cast<float>(lower), op.upper = static_cast<float>(upper);
  op.y = static_cast<float*>(out(y)), op.scratch = static_cast<float*>(out(scratch));
  chosen->winograd(op, threads);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Launches of attrfast's CPU kernels over raw pointers.";
  m.def("isa", [] { return std::string(chosen->isa); }, "The instruction set in use.");
  m.def(
      "available_isas",
      [] {
        py::list names;
        for (const Kernels* kernels : available()) names.append(kernels->isa);
        return names;
      },
      "Instruction sets that this processor runs, the best first.");
  m.def("use_isa", &use_isa, "Uses the kernels of one instruction set; ValueError if it can't run.");
  m.attr("compiler") = py::str(ATTRFAST_COMPILER);
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("affine_relu", &affine_relu, unlocked);
  m.def("affine_relu_backward", &affine_relu_backward, unlocked);
  m.def("attribution", &attribution, unlocked);
  m.def("affine_relu_max_pool", &affine_relu_max_pool, unlocked);
  m.def("affine_relu_max_pool_backward", &affine_relu_max_pool_backward, unlocked);
  m.def("segment_normalize", &segment_normalize, unlocked);
  m.def("winograd", &winograd, unlocked);
  m.def("winograd_floats", &winograd_floats);
#ifdef ATTRFAST_WITH_CUDA
  py::module_ cuda = m.def_submodule("cuda", "Launches of attrfast's CUDA kernels over raw pointers.");
  attrfast::cuda::bind(cuda);
#endif
}
