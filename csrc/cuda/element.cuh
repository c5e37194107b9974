// The four element types, and slots: the 16 bytes that one thread reads or writes at once. (The twin of
// cpu/scalar.h.)
//
// Slots are counted from a tensor's first element, wherever that lies in memory, so which thread adds
// up which elements follows from the shape alone. Where the tensors begin at multiples of 16 bytes a
// slot is one load; else, and at the ends of a range, it is one load an element.
#pragma once

#include "device.cuh"

namespace attrfast::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class T>
struct Element {  // float and double
  using Compute = T;
  static __device__ __forceinline__ T load(T x) { return x; }
  static __device__ __forceinline__ T store(T x) { return x; }
};

template <>
struct Element<BFloat16> {
  using Compute = float;
  static __device__ __forceinline__ float load(BFloat16 x) { return bfloat16_to_float(x.bits); }
  static __device__ __forceinline__ BFloat16 store(float x) { return {float_to_bfloat16(x)}; }
};

template <>
struct Element<Half> {
  using Compute = float;
  static __device__ __forceinline__ float load(Half x) { return half_to_float(x.bits); }
  static __device__ __forceinline__ Half store(float x) { return {float_to_half(x)}; }
};

template <class T>
using Compute = typename Element<T>::Compute;

template <class T>
constexpr int kLanes = 16 / static_cast<int>(sizeof(T));

// A bound as the element type stores it: what a clamped element compares equal to. `none` is no bound, and
// becomes NaN, to which nothing compares: an infinity that was not clamped lets its gradient pass.
template <class T>
__device__ __forceinline__ Compute<T> stored_bound(double bound, double none) {
  const Compute<T> stored = Element<T>::load(Element<T>::store(static_cast<Compute<T>>(bound)));
  return stored == none ? stored - stored : stored;
}

template <class C>
__device__ __forceinline__ C clamp(C y, C lower, C upper) {
  y = y < lower ? lower : y;  // comparisons with NaN are false, so NaN stays
  return y > upper ? upper : y;
}

// The elements [first, last) of a slot that a thread works on; `whole`: all, and they lie aligned.
struct Part {
  int first, last;
  bool whole;
};

// The part of the slot at `at` that lies in [begin, end).
template <int V>
__device__ __forceinline__ Part part_of(int64_t at, int64_t begin, int64_t end, bool aligned) {
  const int first = at < begin ? static_cast<int>(begin - at) : 0;
  const int last = at + V > end ? static_cast<int>(end - at) : V;
  return {first, last, aligned && first == 0 && last == V};
}

// Elements outside the part read as 0.
template <class T, int V>
__device__ __forceinline__ void load_slot(const T* from, const Part& part, Compute<T>* values) {
  T raw[V];
  if (V * sizeof(T) == 16 && part.whole) {
    const uint4 bits = read16(from);
    __builtin_memcpy(raw, &bits, V * sizeof(T));
#pragma unroll
    for (int j = 0; j < V; ++j) values[j] = Element<T>::load(raw[j]);
    return;
  }
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const bool inside = j >= part.first && j < part.last;
    values[j] = inside ? Element<T>::load(read(from + j)) : Compute<T>(0);
  }
}

template <class T, int V>
__device__ __forceinline__ void store_slot(T* to, const Part& part, const Compute<T>* values) {
  if (V * sizeof(T) == 16 && part.whole) {
    T raw[V];
#pragma unroll
    for (int j = 0; j < V; ++j) raw[j] = Element<T>::store(values[j]);
    uint4 bits;
    __builtin_memcpy(&bits, raw, V * sizeof(T));
    write16(to, bits);
    return;
  }
#pragma unroll
  for (int j = 0; j < V; ++j)
    if (j >= part.first && j < part.last) write(to + j, Element<T>::store(values[j]));
}

// Neighbouring numbers of a per-channel vector, all `otherwise` where there is none.
template <int V, class C>
__device__ __forceinline__ void load_vector(const C* from, C otherwise, C* values) {
  constexpr int kAtOnce = 16 / static_cast<int>(sizeof(C));
  if (from && V % kAtOnce == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
#pragma unroll
    for (int j = 0; j < V / kAtOnce; ++j) {
      const uint4 bits = read16(from + j * kAtOnce);
      __builtin_memcpy(values + j * kAtOnce, &bits, 16);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < V; ++j) values[j] = from ? read(from + j) : otherwise;
}

}  // namespace attrfast::cuda
