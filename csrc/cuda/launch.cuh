// What all launches share: errors in words, the choice among types and paths, alignment.
#pragma once

#include <stdexcept>
#include <string>

#include "kernels.cuh"
#include "launches.h"

namespace attrfast::cuda {

// A call as error messages name it.
struct Call {
  const char* op;
  Dtype dtype;
  const Shape& shape;

  std::string text() const {
    static const char* const kDtypes[] = {"float32", "float64", "bfloat16", "float16"};
    return std::string(op) + " of " + kDtypes[dtype] + " (" + std::to_string(shape.n) + ", " +
           std::to_string(shape.c) + ", " + std::to_string(shape.p) + ")" +
           (shape.layout == kChannelsLast ? ", channels-last" : "");
  }
  void check(const char* error) const {
    if (error) throw std::runtime_error(text() + ": " + error);
  }
};

inline bool empty(const Shape& shape) { return shape.n == 0 || shape.c == 0; }

inline void check_sizes(const Call& call) {
  if (call.shape.c >= int64_t{1} << 31) call.check("more than 2147483647 channels are not supported");
}

inline void check_sizes(const Call& call, const Pool& pool) {
  check_sizes(call);
  for (int64_t size : {pool.h, pool.w, pool.rows, pool.columns, pool.stride[0], pool.stride[1]})
    if (size >= int64_t{1} << 30) call.check("sizes and strides of a pooling must be below 1073741824");
}

// Whether tensors begin at multiples of 16 bytes; null does.
template <class... Pointers>
bool all_aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

inline int element_bytes(Dtype dtype) { return dtype == kDouble ? 8 : dtype == kFloat ? 4 : 2; }
inline int compute_bytes(Dtype dtype) { return dtype == kDouble ? 8 : 4; }

template <class Kernel, class... Arguments>
void run(const Call& call, const Queue& queue, Kernel kernel, int64_t items, int shared,
         Arguments... arguments) {
  const int64_t blocks = items < most_blocks() ? items : most_blocks();
  if (blocks == 0) return;
  call.check(select_device(queue.device));
  call.check(start(kernel, blocks, kThreads, shared, queue.stream, arguments...));
}

template <class C>
void add_pieces(const Call& call, const Queue& queue, const Sums<C>& sums) {
  if (sums.pieces == 1 || !sums.s) return;
  const int64_t rows = call.shape.n * call.shape.c;
  run(call, queue, add_pieces_kernel<C>, ceil_div(rows, kThreads / kWarp), 0,
      static_cast<const double*>(sums.partial), sums.s, rows, sums.pieces);
}

// An op on its path.
template <class Op>
void run_op(const Call& call, const typename Op::Given& given, void* s, double* scratch, bool aligned,
            const Queue& queue) {
  using T = typename Op::Type;
  using C = typename Op::C;
  check_sizes(call);
  if (empty(call.shape)) return;
  const Cut cut = cut_of(call.shape, sizeof(T), kWarp);
  const Sums<C> sums = {static_cast<C*>(s), scratch, cut.pieces};
  const int shared = Op::kSums ? shared_of(cut, sizeof(T), sizeof(C)) : 0;
  const auto go = [&](auto kernel) {
    run(call, queue, kernel, cut.items, shared, given, call.shape, cut, aligned, sums);
  };
  if (cut.path == kRows)
    go(rows_kernel<Op>);
  else if (cut.path == kPacked)
    go(packed_kernel<Op>);
  else if (cut.lanes == 1)
    go(columns_kernel<Op, 1>);
  else
    go(columns_kernel<Op, kLanes<T>>);
  if (Op::kSums) add_pieces(call, queue, sums);
}

// Calls body with a null pointer of the element type.
template <class Body>
void by_dtype(Dtype dtype, Body body) {
  switch (dtype) {
    case kFloat: return body(static_cast<float*>(nullptr));
    case kDouble: return body(static_cast<double*>(nullptr));
    case kBFloat16: return body(static_cast<BFloat16*>(nullptr));
    case kHalf: return body(static_cast<Half*>(nullptr));
  }
}

template <class Pointer>
using Pointee = std::remove_pointer_t<Pointer>;

}  // namespace attrfast::cuda
