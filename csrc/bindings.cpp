// The Python module attrfast._native: launches over raw pointers. It knows no tensors; attrfast/native.py
// checks shapes and strides before it comes here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <stdexcept>
#include <string>
#include <vector>

#include "arguments.h"
#include "attribution.h"
#include "checks.h"
#ifdef ATTRFAST_WITH_CUDA
#include "cuda/bindings.h"
#endif

namespace py = pybind11;
using namespace attrfast;

namespace {

#if defined(__x86_64__)
// Asked of the processor: older compilers do not know this of it.
bool multiplies_bfloat16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}
#endif

// Instruction sets that this processor runs, the best first.
std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (avx512_kernels() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if (avx512_bf16_kernels() && multiplies_bfloat16()) found.push_back(avx512_bf16_kernels());
    found.push_back(avx512_kernels());
  }
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

// More would bring nothing, and where they can't be started OpenMP ends the process.
constexpr int kMostThreads = 1024;

int usable(const char* op, int threads) {
  Check(op).require(threads >= 1, "threads must be at least 1");
  return threads < kMostThreads ? threads : kMostThreads;
}

void affine_relu(int dtype, int layout, int64_t n, int64_t c, int64_t p, Address z, Address scale,
                 Address shift, Address residual, Address y, Address count, double lower, double upper,
                 int threads) {
  const Dtype type = static_cast<Dtype>(dtype);
  const Shape shape = shape_of(n, c, p, layout);
  const AffineRelu op = {in(z), in(scale), in(shift), in(residual), out(y), out(count), lower, upper};
  threads = usable("affine_relu", threads);
  if (to_do(type, shape, op)) chosen->affine_relu(type, shape, op, threads);
}

void affine_relu_backward(int dtype, int layout, int64_t n, int64_t c, int64_t p, Address a, Address g,
                          Address scale, Address residual, Address g1, Address gz, Address s,
                          double lower, double upper, bool guided, int attribute, int threads) {
  const Dtype type = static_cast<Dtype>(dtype);
  const Shape shape = shape_of(n, c, p, layout);
  const AffineReluBackward op =
      backward_of(a, g, scale, residual, g1, gz, s, lower, upper, guided, attribute);
  threads = usable("affine_relu_backward", threads);
  if (to_do(type, shape, op)) chosen->affine_relu_backward(type, shape, op, threads);
}

void attribution(int dtype, int layout, int64_t n, int64_t c, int64_t p, Address x, Address g, Address s,
                 bool absolute, int threads) {
  const Dtype type = static_cast<Dtype>(dtype);
  const Shape shape = shape_of(n, c, p, layout);
  const Attribution op = {in(x), in(g), out(s), absolute};
  threads = usable("attribution", threads);
  if (to_do(type, shape, op)) chosen->attribution(type, shape, op, threads);
}

void affine_relu_max_pool(int dtype, int layout, int64_t n, int64_t c, Two input, Two output, Two kernel,
                          Two stride, Two padding, Address z, Address scale, Address shift, Address p,
                          Address code, Address count, double lower, double upper, int threads) {
  const Dtype type = static_cast<Dtype>(dtype);
  const Pool pool = pool_of(input, output, kernel, stride, padding);
  const Shape shape = pooled_shape(n, c, pool, layout);
  const AffineReluMaxPool op = {
      in(z), in(scale), in(shift), out(p), static_cast<uint8_t*>(out(code)), out(count), lower, upper};
  threads = usable("affine_relu_max_pool", threads);
  if (to_do(type, shape, pool, op)) chosen->affine_relu_max_pool(type, shape, pool, op, threads);
}

void affine_relu_max_pool_backward(int dtype, int layout, int64_t n, int64_t c, Two input, Two output,
                                   Two kernel, Two stride, Two padding, Address p, Address code,
                                   Address g, Address scale, Address gz, double lower, double upper,
                                   bool guided, int threads) {
  const Dtype type = static_cast<Dtype>(dtype);
  const Pool pool = pool_of(input, output, kernel, stride, padding);
  const Shape shape = pooled_shape(n, c, pool, layout);
  const AffineReluMaxPoolBackward op = {in(p),   in(g), in(scale), static_cast<const uint8_t*>(in(code)),
                                        out(gz), lower, upper,     guided};
  threads = usable("affine_relu_max_pool_backward", threads);
  if (to_do(type, shape, pool, op))
    chosen->affine_relu_max_pool_backward(type, shape, pool, op, threads);
}

void segment_normalize(int dtype, Address theta, Address offsets, int64_t segments, int64_t elements,
                       Address result, int kind, int threads) {
  const Dtype type = static_cast<Dtype>(dtype);
  const int64_t* bounds = static_cast<const int64_t*>(in(offsets));
  const SegmentNormalize op = {in(theta), bounds, segments, out(result), static_cast<Norm>(kind)};
  threads = usable("segment_normalize", threads);
  if (!to_do(type, op, elements)) return;
  bool ascend = bounds[0] == 0 && bounds[segments] == elements;
  for (int64_t l = 0; l < segments; ++l) ascend &= bounds[l] <= bounds[l + 1];
  Check("segment_normalize").require(ascend, "offsets must ascend from 0 to elements");
  chosen->segment_normalize(type, op, threads);
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
  const Winograd op = winograd_of(n, input, channels_in, channels_out, padding);
  threads = usable("winograd", threads);
  return to_do(op) ? chosen->winograd_floats(op, threads) : 0;
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
  op.y = static_cast<float*>(out(y)), op.scratch = static_cast<float*>(out(scratch));
  threads = usable("winograd", threads);
  if (!to_do(op)) return;
  check_memory(op, lower, upper, chosen->winograd_floats(op, threads));
  op.lower = static_cast<float>(lower), op.upper = static_cast<float>(upper);
  chosen->winograd(op, threads);
}

Pointwise pointwise_of(int64_t n, int64_t positions, int64_t channels_in, int64_t channels_out) {
  Pointwise op = {};
  op.n = n, op.positions = positions, op.channels_in = channels_in, op.channels_out = channels_out;
  return op;
}

int64_t pointwise_floats(int dtype, int64_t n, int64_t positions, int64_t channels_in,
                         int64_t channels_out, bool backward, int threads) {
  const Dtype type = static_cast<Dtype>(dtype);
  const Pointwise op = pointwise_of(n, positions, channels_in, channels_out);
  threads = usable("pointwise", threads);
  return to_do(type, op) ? chosen->pointwise_floats(type, op, backward, threads) : 0;
}

void pointwise(int dtype, int64_t n, int64_t positions, int64_t channels_in, int64_t channels_out,
               Address x, Address weight, int64_t weight_out, int64_t weight_in, Address factor,
               Address scale, Address shift, Address residual, Address y, Address scratch, double lower,
               double upper, int threads) {
  const Dtype type = static_cast<Dtype>(dtype);
  Pointwise op = pointwise_of(n, positions, channels_in, channels_out);
  op.x = in(x), op.weight = in(weight), op.residual = in(residual), op.y = out(y);
  op.weight_out = weight_out, op.weight_in = weight_in;
  op.factor = static_cast<const float*>(in(factor)), op.scale = static_cast<const float*>(in(scale));
  op.shift = static_cast<const float*>(in(shift)), op.scratch = static_cast<float*>(out(scratch));
  threads = usable("pointwise", threads);
  if (!to_do(type, op)) return;
  check_memory(type, op, lower, upper, chosen->pointwise_floats(type, op, false, threads));
  op.lower = static_cast<float>(lower), op.upper = static_cast<float>(upper);
  chosen->pointwise(type, op, threads);
}

void pointwise_backward(int dtype, int64_t n, int64_t positions, int64_t channels_in,
                        int64_t channels_out, Address a, Address g, Address residual, Address weight,
                        int64_t weight_out, int64_t weight_in, Address scale, Address g1, Address gx,
                        Address s, Address scratch, double lower, double upper, bool guided,
                        int attribute, int threads) {
  const Dtype type = static_cast<Dtype>(dtype);
  PointwiseBackward op = {};
  op.product = pointwise_of(n, positions, channels_in, channels_out);
  op.product.x = in(g), op.product.weight = in(weight), op.product.y = out(gx);
  op.product.weight_out = weight_out, op.product.weight_in = weight_in;
  op.product.factor = static_cast<const float*>(in(scale));
  op.product.scratch = static_cast<float*>(out(scratch));
  op.product.lower = -std::numeric_limits<float>::infinity(), op.product.upper = -op.product.lower;
  op.a = in(a), op.residual = in(residual), op.g1 = out(g1), op.s = static_cast<float*>(out(s));
  op.lower = lower, op.upper = upper, op.guided = guided;
  op.attribute = static_cast<Attribute>(attribute);
  threads = usable("pointwise_backward", threads);
  if (!to_do(type, op.product)) return;
  check_memory(type, op, chosen->pointwise_floats(type, op.product, true, threads));
  chosen->pointwise_backward(type, op, threads);
}

Depthwise depthwise_of(int64_t n, int64_t channels, Two input, Two output, int64_t kernel,
                       int64_t stride, Two padding, bool transposed) {
  Depthwise op = {};
  op.n = n, op.channels = channels, op.kernel = kernel, op.stride = stride, op.transposed = transposed;
  op.input[0] = input.first, op.input[1] = input.second;
  op.output[0] = output.first, op.output[1] = output.second;
  op.padding[0] = padding.first, op.padding[1] = padding.second;
  return op;
}

int64_t depthwise_floats(int64_t n, int64_t channels, Two input, Two output, int64_t kernel,
                         int64_t stride, Two padding, bool transposed, int threads) {
  const Depthwise op = depthwise_of(n, channels, input, output, kernel, stride, padding, transposed);
  threads = usable("depthwise", threads);
  return to_do(op) ? chosen->depthwise_floats(op, threads) : 0;
}

void depthwise(int dtype, int64_t n, int64_t channels, Two input, Two output, int64_t kernel,
               int64_t stride, Two padding, bool transposed, Address x, Address weight,
               int64_t weight_channel, int64_t weight_row, int64_t weight_column, Address factor,
               Address scale, Address shift, Address residual, Address y, Address scratch, double lower,
               double upper, int threads) {
  const Dtype type = static_cast<Dtype>(dtype);
  Depthwise op = depthwise_of(n, channels, input, output, kernel, stride, padding, transposed);
  op.x = in(x), op.weight = in(weight), op.residual = in(residual), op.y = out(y);
  op.weight_channel = weight_channel, op.weight_row = weight_row, op.weight_column = weight_column;
  op.factor = static_cast<const float*>(in(factor)), op.scale = static_cast<const float*>(in(scale));
  op.shift = static_cast<const float*>(in(shift)), op.scratch = static_cast<float*>(out(scratch));
  threads = usable("depthwise", threads);
  if (!to_do(op)) return;
  check_memory(type, op, lower, upper, chosen->depthwise_floats(op, threads));
  op.lower = static_cast<float>(lower), op.upper = static_cast<float>(upper);
  chosen->depthwise(type, op, threads);
}

void depthwise_backward(int dtype, int64_t n, int64_t channels, Two input, Two output, int64_t kernel,
                        int64_t stride, Two padding, Address a, Address g, Address weight,
                        int64_t weight_channel, int64_t weight_row, int64_t weight_column, Address scale,
                        Address gx, Address s, Address scratch, double lower, double upper, bool guided,
                        int threads) {
  const Dtype type = static_cast<Dtype>(dtype);
  DepthwiseBackward op = {};
  op.product = depthwise_of(n, channels, input, output, kernel, stride, padding, true);
  op.product.x = in(g), op.product.weight = in(weight), op.product.y = out(gx);
  op.product.weight_channel = weight_channel;
  op.product.weight_row = weight_row, op.product.weight_column = weight_column;
  op.product.factor = static_cast<const float*>(in(scale));
  op.product.scratch = static_cast<float*>(out(scratch));
  op.product.lower = -std::numeric_limits<float>::infinity(), op.product.upper = -op.product.lower;
  op.a = in(a), op.s = static_cast<float*>(out(s));
  op.lower = lower, op.upper = upper, op.guided = guided;
  threads = usable("depthwise_backward", threads);
  if (!to_do(op.product)) return;
  check_memory(type, op, chosen->depthwise_floats(op.product, threads));
  chosen->depthwise_backward(type, op, threads);
}

// The parts of a joined map, and what a launch takes for them.
struct JoinedParts {
  std::vector<const void*> x;
  const std::vector<int64_t>& channels;

  JoinedParts(const char* name, const std::vector<Address>& parts, const std::vector<int64_t>& channels)
      : channels(channels) {
    Check(name).require(parts.size() == channels.size(), "every part needs its number of channels");
    for (Address part : parts) x.push_back(in(part));
  }

  Joined joined(Address scale, Address shift, double lower, double upper) const {
    const int64_t count = static_cast<int64_t>(x.size());
    return {x.data(), channels.data(), count, in(scale), in(shift), lower, upper};
  }
};

void joined(int dtype, int layout, int64_t n, int64_t c, int64_t p, const std::vector<Address>& x,
            const std::vector<int64_t>& channels, Address scale, Address shift, Address y, double lower,
            double upper, int threads) {
  const Dtype type = static_cast<Dtype>(dtype);
  const Shape shape = shape_of(n, c, p, layout);
  const JoinedParts parts("joined", x, channels);
  const Joined op = parts.joined(scale, shift, lower, upper);
  threads = usable("joined", threads);
  if (to_do(type, shape, op, in(y))) chosen->joined(type, shape, op, out(y), threads);
}

void joined_backward(int dtype, int layout, int64_t n, int64_t c, int64_t p,
                     const std::vector<Address>& x, const std::vector<int64_t>& channels, Address g,
                     Address scale, Address shift, const std::vector<Address>& gx,
                     const std::vector<bool>& adds, Address s, double lower, double upper, bool guided,
                     int threads) {
  const Dtype type = static_cast<Dtype>(dtype);
  const Shape shape = shape_of(n, c, p, layout);
  const JoinedParts parts("joined_backward", x, channels);
  Check("joined_backward")
      .require(gx.size() == x.size() && adds.size() == x.size(),
               "every part needs an address for its gradient, and whether that is added to");
  std::vector<void*> into;
  for (Address part : gx) into.push_back(out(part));
  const std::vector<uint8_t> added(adds.begin(), adds.end());
  const JoinedBackward op = {
      parts.joined(scale, shift, lower, upper), in(g), into.data(), added.data(), out(s), guided};
  threads = usable("joined_backward", threads);
  if (to_do(type, shape, op)) chosen->joined_backward(type, shape, op, threads);
}

const char* const kChecked = R"(: a launch of csrc/attribution.h.

Raises ValueError for what no launch can have: an unknown code of a dtype, layout, norm or attribute; negative
or too large sizes and their products; a pooling or convolution without room; bounds that cross; null where
memory is needed, or memory that is not aligned, or that is written and overlaps another argument. TypeError for
what is no number of the kind. It can't tell from a number whether there is memory behind it, of that size and
type, that lives as long as the launch, and that no other thread touches.)";

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() =
      "Launches of attrfast's CPU kernels over raw pointers. Arguments are checked as far as numbers "
      "can be; "
      "attrfast.ops has the functions over tensors, which are checked whole.";
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
  const auto launch = [&](const char* name, auto function, const std::string& what) {
    m.def(name, function, unlocked, (what + kChecked).c_str());
  };
  launch("affine_relu", &affine_relu,
         "(dtype, layout, n, c, p, z, scale, shift, residual, y, count, lower, upper, threads)");
  launch("affine_relu_backward", &affine_relu_backward,
         "(dtype, layout, n, c, p, a, g, scale, residual, g1, gz, s, lower, upper, guided, attribute, "
         "threads)");
  launch("attribution", &attribution, "(dtype, layout, n, c, p, x, g, s, absolute, threads)");
  launch(
      "affine_relu_max_pool", &affine_relu_max_pool,
      "(dtype, layout, n, c, input, output, kernel, stride, padding, z, scale, shift, p, code, count, "
      "lower, upper, threads)");
  launch("affine_relu_max_pool_backward", &affine_relu_max_pool_backward,
         "(dtype, layout, n, c, input, output, kernel, stride, padding, p, code, g, scale, gz, lower, "
         "upper, guided, threads)");
  launch("segment_normalize", &segment_normalize,
         "(dtype, theta, offsets, segments, elements, result, kind, threads)");
  launch("winograd", &winograd,
         "(n, input, channels_in, channels_out, padding, x, weight, weight_out, weight_in, weight_tap, "
         "flipped, scale, shift, residual, y, scratch, lower, upper, threads)");
  m.def(
      "winograd_floats", &winograd_floats,
      "(n, input, channels_in, channels_out, padding, threads): floats of scratch that winograd needs.");
  launch("pointwise", &pointwise,
         "(dtype, n, positions, channels_in, channels_out, x, weight, weight_out, weight_in, factor, "
         "scale, shift, residual, y, scratch, lower, upper, threads)");
  launch("pointwise_backward", &pointwise_backward,
         "(dtype, n, positions, channels_in, channels_out, a, g, residual, weight, weight_out, "
         "weight_in, scale, g1, gx, s, scratch, lower, upper, guided, attribute, threads)");
  m.def("pointwise_floats", &pointwise_floats,
        "(dtype, n, positions, channels_in, channels_out, backward, threads): floats of scratch that "
        "pointwise needs, or pointwise_backward.");
  launch("depthwise", &depthwise,
         "(dtype, n, channels, input, output, kernel, stride, padding, transposed, x, weight, "
         "weight_channel, weight_row, weight_column, factor, scale, shift, residual, y, scratch, lower, "
         "upper, threads)");
  launch("depthwise_backward", &depthwise_backward,
         "(dtype, n, channels, input, output, kernel, stride, padding, a, g, weight, weight_channel, "
         "weight_row, weight_column, scale, gx, s, scratch, lower, upper, guided, threads)");
  m.def("depthwise_floats", &depthwise_floats,
        "(n, channels, input, output, kernel, stride, padding, transposed, threads): floats of scratch "
        "that depthwise needs, and depthwise_backward with transposed.");
  launch("joined", &joined,
         "(dtype, layout, n, c, p, x, channels, scale, shift, y, lower, upper, threads)");
  launch("joined_backward", &joined_backward,
         "(dtype, layout, n, c, p, x, channels, g, scale, shift, gx, adds, s, lower, upper, guided, "
         "threads)");
#ifdef ATTRFAST_WITH_CUDA
  py::module_ cuda = m.def_submodule("cuda", "Launches of attrfast's CUDA kernels over raw pointers.");
  attrfast::cuda::bind(cuda);
#endif
}
