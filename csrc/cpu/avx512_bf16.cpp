// Kernels for processors with AVX512 that multiply bfloat16 as well; the build passes the
// matching flags on x86-64, if the compiler has them.
#if defined(__AVX512BF16__)
#define ATTRFAST_ISA avx512_bf16
#define ATTRFAST_ISA_NAME "avx512_bf16"
#include "kernels.inl"

namespace attrfast {
const Kernels* avx512_bf16_kernels() { return &avx512_bf16::kernels; }
}  // namespace attrfast
#else
#include "../attribution.h"

namespace attrfast {
const Kernels* avx512_bf16_kernels() { return nullptr; }
}  // namespace attrfast
#endif
