// Runs CUDA device code on the CPU: what csrc/cuda/device.cuh is made of on a GPU, made of fibers here.
//
// Every thread of a block is a fiber with a stack of its own, which runs until it comes to a barrier or a
// shuffle; the order in which fibers run is one of many, chosen by a seed, so that code which leans on
// one order fails in another. Barriers and shuffles that not all threads reach end the launch with an
// error. Shared memory begins as NaN and lies between guards. Global memory may be accessed only where a
// test allowed it, and as aligned as a GPU needs it.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct uint4 {
  unsigned x, y, z, w;
};

namespace emulated {

struct Index {
  unsigned x;
};

inline Index thread, block, grid;

// Set by tests.
inline uint64_t seed = 0;        // of the order in which threads run; see Turns in fibers.cpp
inline int64_t block_limit = 3;  // blocks of a launch, so that the kernels must loop

// What a launch asked for: shared memory, and bytes of global memory: all, those that moved 16 at a time,
// and those of per-channel vectors, which the cache gives.
struct Launch {
  int64_t shared, bytes, wide, vectors;
};
inline std::vector<Launch> launches;  // since a test emptied it

// Throws where an access is not allowed, and counts it.
void check_access(const void* address, size_t bytes, size_t alignment, bool writes);
unsigned char* shared_memory();
void barrier();
// Hands `value` to the other threads of the warp and returns that of the thread in lane ^ distance.
void exchange(void* value, size_t bytes, int distance);
// Runs a block of threads for each block of the grid; null, or what went wrong.
const char* run(const std::function<void()>& body, int64_t blocks, int threads, int shared);

}  // namespace emulated

#define threadIdx ::emulated::thread
#define blockIdx ::emulated::block
#define gridDim ::emulated::grid

inline void __syncthreads() { emulated::barrier(); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  if (mask != 0xffffffffu) throw std::logic_error("a shuffle without all lanes of the warp");
  emulated::exchange(&value, sizeof value, distance);
  return value;
}

// -- the names of csrc/cuda/device.cuh -----------------------------------------------------------------

namespace attrfast::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

inline int64_t most_blocks() { return emulated::block_limit; }

template <class T>
T read(const T* from) {
  emulated::check_access(from, sizeof(T), alignof(T), false);
  return *from;
}

template <class T>
void write(T* to, T value) {
  emulated::check_access(to, sizeof(T), alignof(T), true);
  *to = value;
}

inline uint4 read16(const void* from) {
  emulated::check_access(from, 16, 16, false);
  uint4 bits;
  std::memcpy(&bits, from, 16);
  return bits;
}

inline void write16(void* to, uint4 bits) {
  emulated::check_access(to, 16, 16, true);
  std::memcpy(to, &bits, 16);
}

inline unsigned char* shared_memory() { return emulated::shared_memory(); }

// The CPU kernels' conversions, which have tests of their own.
namespace cpu {
#include "../../csrc/cpu/scalar.h"
}

inline float half_to_float(uint16_t bits) { return cpu::Element<cpu::Half>::load({bits}); }
inline uint16_t float_to_half(float x) { return cpu::Element<cpu::Half>::store(x).bits; }
inline float bfloat16_to_float(uint16_t bits) { return cpu::Element<cpu::BFloat16>::load({bits}); }
inline uint16_t float_to_bfloat16(float x) { return cpu::Element<cpu::BFloat16>::store(x).bits; }

inline const char* select_device(int device) { return device == 0 ? nullptr : "no such device"; }

template <class... Parameters, class... Arguments>
const char* start(void (*kernel)(Parameters...), int64_t blocks, int threads, int shared, uintptr_t,
                  Arguments... arguments) {
  return emulated::run([&] { kernel(arguments...); }, blocks, threads, shared);
}

inline const char* zero(void* to, size_t bytes, uintptr_t) {
  std::memset(to, 0, bytes);
  return nullptr;
}

}  // namespace attrfast::cuda
