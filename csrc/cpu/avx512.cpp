// Kernels for processors with AVX512; the build passes the matching flags on x86-64.
#if defined(__AVX512F__)
#define ATTRFAST_ISA avx512
#define ATTRFAST_ISA_NAME "avx512"
#include "kernels.inl"

namespace attrfast {
const Kernels* avx512_kernels() { return &avx512::kernels; }
}  // namespace attrfast
#else
#include "../attribution.h"

namespace attrfast {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace attrfast
#endif
