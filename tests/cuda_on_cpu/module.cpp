// The Python module of the emulated GPU: the launches of csrc/cuda, and switches for tests.
#include "../../csrc/cuda/bindings.h"
#include "broken.cuh"
#include "memory.h"

namespace py = pybind11;

PYBIND11_MODULE(attrfast_cuda_on_cpu, m) {
  attrfast::cuda::bind(m);
  m.def("seed", [](uint64_t seed) { emulated::seed = seed; });
  m.def("block_limit", [](int64_t blocks) { emulated::block_limit = blocks; });
  m.def("allow", &emulated::allow);
  m.def("count_as_vector", &emulated::count_as_vector);
  m.def("forget", &emulated::forget);
  m.def(
      "launches",
      [] {
        py::list found;
        for (const auto& one : emulated::launches)
          found.append(py::make_tuple(one.shared, one.bytes, one.wide, one.vectors));
        emulated::launches.clear();
        return found;
      },
      "(shared, bytes, wide, vectors) of the launches since the last call.");
  m.def("faulty", [](std::uintptr_t x, std::uintptr_t s, int64_t rows, int64_t p, int fault) {
    using namespace attrfast;
    using namespace attrfast::cuda;
    const char* error =
        start(faulty_kernel, 1, kThreads, kThreads / kWarp * 8, 0, static_cast<const float*>(in(x)),
              static_cast<float*>(out(s)), rows, p, static_cast<Fault>(fault));
    if (error) throw std::runtime_error(error);
  });
}
