// Kernels for processors with AVX2; the build passes the matching flags on x86-64.
#if defined(__AVX2__)
#define ATTRFAST_ISA avx2
#define ATTRFAST_ISA_NAME "avx2"
#include "kernels.inl"

namespace attrfast {
const Kernels* avx2_kernels() { return &avx2::kernels; }
}  // namespace attrfast
#else
#include "../attribution.h"

namespace attrfast {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace attrfast
#endif
