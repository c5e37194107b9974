// All that the kernels need of a GPU: threads, shared memory, shuffles, loads, conversions, launches.
//
// Kernels reach global memory through read and write alone, and shared memory through shared_memory, so
// that the tests can run the same code on the CPU and watch every access.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef __CUDACC__
#include "cuda_on_cpu.h"  // of the tests, which supply everything below by themselves
#else
#include <cuda_runtime.h>

namespace attrfast::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Blocks of a launch at most; the kernels loop over what is left.
inline int64_t most_blocks() { return 1 << 16; }

// Pointers that were read from a table are to global memory too, which the compiler can't know.
template <class T>
__device__ __forceinline__ T read(const T* from) {
  __builtin_assume(__isGlobal(from));
  return *from;
}

template <class T>
__device__ __forceinline__ void write(T* to, T value) {
  __builtin_assume(__isGlobal(to));
  *to = value;
}

__device__ __forceinline__ uint4 read16(const void* from) {
  __builtin_assume(__isGlobal(from));
  return *static_cast<const uint4*>(from);
}

// As an instruction: where the other branch stores the same values one by one, the compiler takes this
// store apart as well.
__device__ __forceinline__ void write16(void* to, uint4 bits) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
               : "memory");
}

// The block's shared memory, of as many bytes as the launch asked for.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ uint4 attrfast_shared[];
  return reinterpret_cast<unsigned char*>(attrfast_shared);
}

// All round to nearest, ties to even. As instructions: the headers that offer them as functions take
// longer to compile than all kernels together.
__device__ __forceinline__ float half_to_float(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

__device__ __forceinline__ uint16_t float_to_half(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

__device__ __forceinline__ float bfloat16_to_float(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

__device__ __forceinline__ uint16_t float_to_bfloat16(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

// -- the host's side: each call returns null, or what went wrong in words ---------------------------

inline const char* words(cudaError_t status) {
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

// The runtime linked into this module has a current device of its own.
inline const char* select_device(int device) { return words(cudaSetDevice(device)); }

template <class... Parameters, class... Arguments>
const char* start(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared,
                  uintptr_t stream, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  return words(cudaLaunchKernelEx(&config, kernel, arguments...));
}

inline const char* zero(void* to, size_t bytes, uintptr_t stream) {
  return words(cudaMemsetAsync(to, 0, bytes, reinterpret_cast<cudaStream_t>(stream)));
}

}  // namespace attrfast::cuda
#endif
