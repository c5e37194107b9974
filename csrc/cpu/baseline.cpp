// Kernels for any processor that the compiler's default target covers.

#define ATTRFAST_ISA baseline
#define ATTRFAST_ISA_NAME "baseline"
#include "kernels.inl"

namespace attrfast {
const Kernels* baseline_kernels() { return &baseline::kernels; }
}  // namespace attrfast
