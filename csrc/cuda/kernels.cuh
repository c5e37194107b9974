// The elementwise kernels and their sums over positions. (The twin of cpu/kernels.inl.)
//
// An *op* says what happens to one slot of elements: it reads, computes, writes, and gives what each
// element adds to the sums. The three paths of plan.h walk over the slots and add up. In-place work is
// safe because each slot is read and written by one thread, reads first.
#pragma once

#include "reduce.cuh"

namespace attrfast::cuda {

// -- affine_relu ------------------------------------------------------------------------------------

// What a value adds to a count when it is stored: 1 unless it is zero then, and NaN where it is not finite.
template <class T>
__device__ __forceinline__ Compute<T> counted(Compute<T> value) {
  using C = Compute<T>;
  const C y = Element<T>::load(Element<T>::store(value));
  return (y != C(0) ? C(1) : C(0)) + C(0) * y;
}

template <class T, bool kCount>
struct AffineReluOp {
  using Type = T;
  using C = Compute<T>;
  using Given = AffineRelu;
  static constexpr bool kSums = kCount;
  struct Channel {
    C scale, shift;
  };

  const T *z, *residual;
  const C *scale, *shift;
  T* y;
  C lower, upper;

  __device__ explicit AffineReluOp(const AffineRelu& op)
      : z(static_cast<const T*>(op.z)),
        residual(static_cast<const T*>(op.residual)),
        scale(static_cast<const C*>(op.scale)),
        shift(static_cast<const C*>(op.shift)),
        y(static_cast<T*>(op.y)),
        lower(static_cast<C>(op.lower)),
        upper(static_cast<C>(op.upper)) {}

  __device__ bool sums() const { return kCount; }

  __device__ Channel channel(int64_t c) const {
    // A missing shift adds -0: adding 0 would lose the sign of -0.
    return {scale ? read(scale + c) : C(1), shift ? read(shift + c) : C(-0.0)};
  }

  template <int V>
  __device__ void channels(int64_t c, Channel* out) const {
    C scales[V], shifts[V];
    load_vector<V>(scale ? scale + c : nullptr, C(1), scales);
    load_vector<V>(shift ? shift + c : nullptr, C(-0.0), shifts);
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = {scales[j], shifts[j]};
  }

  template <int V>
  __device__ void slot(int64_t at, const Part& part, const Channel* channels, C* count) const {
    C value[V], other[V];
    load_slot<T, V>(z + at, part, value);
    if (residual) load_slot<T, V>(residual + at, part, other);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      C v = value[j] * channels[j].scale + channels[j].shift;
      if (residual) v += other[j];
      value[j] = clamp(v, lower, upper);
      // Elements outside the part read as 0, of which a shift makes something else.
      if (kCount) count[j] = j >= part.first && j < part.last ? counted<T>(value[j]) : C(0);
    }
    store_slot<T, V>(y + at, part, value);
  }
};

// -- affine_relu_backward ---------------------------------------------------------------------------

template <class T>
struct BackwardOp {
  using Type = T;
  using C = Compute<T>;
  using Given = AffineReluBackward;
  static constexpr bool kSums = true;
  using Channel = C;

  const T *a, *g, *residual;
  const C* scale;
  T *g1, *gz;
  C lower, upper;
  bool guided;
  Attribute attribute;

  __device__ explicit BackwardOp(const AffineReluBackward& op)
      : a(static_cast<const T*>(op.a)),
        g(static_cast<const T*>(op.g)),
        residual(static_cast<const T*>(op.residual)),
        scale(static_cast<const C*>(op.scale)),
        g1(static_cast<T*>(op.g1)),
        gz(static_cast<T*>(op.gz)),
        lower(stored_bound<T>(op.lower, -__builtin_inf())),
        upper(stored_bound<T>(op.upper, __builtin_inf())),
        guided(op.guided),
        attribute(op.attribute) {}

  __device__ bool sums() const { return attribute != kNone; }
  __device__ Channel channel(int64_t c) const { return scale ? read(scale + c) : C(1); }
  template <int V>
  __device__ void channels(int64_t c, Channel* out) const {
    load_vector<V>(scale ? scale + c : nullptr, C(1), out);
  }

  template <int V>
  __device__ void slot(int64_t at, const Part& part, const Channel* channels, C* flow) const {
    C act[V], grad[V], other[V];
    load_slot<T, V>(a + at, part, act);
    load_slot<T, V>(g + at, part, grad);
    if (attribute == kBranch) load_slot<T, V>(residual + at, part, other);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const bool blocked = (act[j] <= lower) | (act[j] >= upper) | (guided & !(grad[j] > C(0)));
      const C inside = blocked ? C(0) : grad[j];
      flow[j] = attribute == kBranch ? (act[j] - other[j]) * inside : act[j] * grad[j];
      grad[j] = inside;
    }
    if (g1) store_slot<T, V>(g1 + at, part, grad);
#pragma unroll
    for (int j = 0; j < V; ++j) grad[j] *= channels[j];
    store_slot<T, V>(gz + at, part, grad);
  }
};

// -- attribution ------------------------------------------------------------------------------------

template <class T, bool kNonzero>
struct AttributionOp {
  using Type = T;
  using C = Compute<T>;
  using Given = Attribution;
  static constexpr bool kSums = true;
  struct Channel {};

  const T *x, *g;
  bool absolute;

  __device__ explicit AttributionOp(const Attribution& op)
      : x(static_cast<const T*>(op.x)), g(static_cast<const T*>(op.g)), absolute(op.absolute) {}

  __device__ bool sums() const { return true; }
  __device__ Channel channel(int64_t) const { return {}; }
  template <int V>
  __device__ void channels(int64_t, Channel*) const {}

  template <int V>
  __device__ void slot(int64_t at, const Part& part, const Channel*, C* flow) const {
    C left[V], right[V];
    load_slot<T, V>(x + at, part, left);
    if (!kNonzero) load_slot<T, V>(g + at, part, right);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (kNonzero) {
        flow[j] = counted<T>(left[j]);
        continue;
      }
      const C product = left[j] * right[j];
      flow[j] = absolute && product < 0 ? -product : product;
    }
  }
};

// -- the paths --------------------------------------------------------------------------------------

// Elements [begin, end), all of one channel. Thread 0 gets their sum.
template <class Op>
__device__ double row_piece(const Op& op, int64_t begin, int64_t end, int64_t c, bool aligned,
                            double* shared) {
  using C = typename Op::C;
  constexpr int V = kLanes<typename Op::Type>;
  const typename Op::Channel one = op.channel(c);
  typename Op::Channel channels[V];
#pragma unroll
  for (int j = 0; j < V; ++j) channels[j] = one;
  C acc[V] = {};
  for (int64_t at = (begin / V + threadIdx.x) * V; at < end; at += int64_t{kThreads} * V) {
    C flow[V];
    op.template slot<V>(at, part_of<V>(at, begin, end, aligned), channels, flow);
    if (Op::kSums)
#pragma unroll
      for (int j = 0; j < V; ++j) acc[j] += flow[j];
  }
  if (!Op::kSums || !op.sums()) return 0;
  C sum = 0;
#pragma unroll
  for (int j = 0; j < V; ++j) sum += acc[j];
  return block_sum(sum, shared);
}

// Values of a slot side by side in shared memory, moved by as few instructions as there are.
template <class C, int V>
struct alignas(sizeof(C) * V >= 16 ? 16 : sizeof(C) * V) Values {
  C v[V];
};

// Whole rows [first, last) of p positions. put(row, sum) is called once for each.
template <class Op, class Put>
__device__ void packed_rows(const Op& op, int64_t first, int64_t last, int p, int64_t channels_of_all,
                            int group, bool aligned, unsigned char* shared, Put put) {
  using C = typename Op::C;
  constexpr int V = kLanes<typename Op::Type>;
  Values<C, V>* flows = reinterpret_cast<Values<C, V>*>(shared);
  const int64_t begin = first * p, end = last * p, start = begin / V * V;
  const uint32_t length = static_cast<uint32_t>(p), count = static_cast<uint32_t>(channels_of_all);
  const uint32_t c_first =
      static_cast<uint32_t>(first - quotient(first, channels_of_all) * channels_of_all);
  for (int64_t at = start + int64_t{threadIdx.x} * V; at < end; at += int64_t{kThreads} * V) {
    const Part part = part_of<V>(at, begin, end, aligned);
    // The rows of the slot's elements: found by division once, then by counting.
    const uint32_t from_begin = static_cast<uint32_t>(at + part.first - begin);
    const uint32_t row = from_begin / length;
    uint32_t place = from_begin - row * length;
    uint32_t c = (c_first + row) % count;
    typename Op::Channel channels[V];
    typename Op::Channel here = op.channel(c);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      channels[j] = here;
      if (j >= part.first && j + 1 < part.last && ++place == length) {
        place = 0;
        c = c + 1 == count ? 0 : c + 1;
        here = op.channel(c);
      }
    }
    Values<C, V> flow;
    op.template slot<V>(at, part, channels, flow.v);
    if (Op::kSums) flows[(at - start) / V] = flow;
  }
  if (!Op::kSums || !op.sums()) return;
  __syncthreads();
  const C* flat = reinterpret_cast<const C*>(shared) + (begin - start);
  const int rows = static_cast<int>(last - first), at_once = kThreads / group;
  const int member = static_cast<int>(threadIdx.x) % group;
  for (int base = 0; base < rows; base += at_once) {  // as many rounds for every thread
    const int row = base + static_cast<int>(threadIdx.x) / group;
    C sum = 0;
    if (row < rows)
      for (int i = member; i < p; i += group) sum += flat[row * p + i];
    sum = group_sum(sum, group);
    if (member == 0 && row < rows) put(first + row, static_cast<double>(sum));
  }
  __syncthreads();  // the next item writes into the same memory
}

// A thread's place in a block of `width` slots by `height` positions; threads left over do nothing.
struct Place {
  int x, y;
  bool used;
  __device__ Place(int width, int height)
      : x(static_cast<int>(threadIdx.x) % width),
        y(static_cast<int>(threadIdx.x) / width),
        used(y < height) {}
};

// Adds up acc of the threads with equal x; the thread with y = 0 gets the sum. All threads must come.
template <int V, class C>
__device__ void sum_columns(C* acc, const Place& place, int width, int height, unsigned char* shared) {
  Values<C, V>* all = reinterpret_cast<Values<C, V>*>(shared);
  Values<C, V>& mine = all[threadIdx.x];
#pragma unroll
  for (int j = 0; j < V; ++j) mine.v[j] = acc[j];
  __syncthreads();
  for (int count = height; count > 1;) {
    const int half = (count + 1) / 2;
    if (place.y + half < count) {
      const Values<C, V> other = all[threadIdx.x + half * width];
#pragma unroll
      for (int j = 0; j < V; ++j) mine.v[j] += other.v[j];
    }
    __syncthreads();
    count = half;
  }
#pragma unroll
  for (int j = 0; j < V; ++j) acc[j] = mine.v[j];
}

// Positions [begin, end) of sample n, channels-last, in one slot of channels a thread. Adds their sums to
// totals of the threads with y = 0.
template <int V, class Op>
__device__ void column_piece(const Op& op, const Place& place, int width, int height, int64_t n,
                             int64_t c, int64_t p, int64_t channels_of_all, int64_t begin, int64_t end,
                             bool aligned, unsigned char* shared, double* totals) {
  using C = typename Op::C;
  const bool used = place.used && c < channels_of_all;
  C acc[V] = {};
  if (used) {
    typename Op::Channel channels[V];
    op.template channels<V>(c, channels);
    const Part all = {0, V, aligned};
    for (int64_t position = begin + place.y; position < end; position += height) {
      C flow[V];
      op.template slot<V>((n * p + position) * channels_of_all + c, all, channels, flow);
      if (Op::kSums)
#pragma unroll
        for (int j = 0; j < V; ++j) acc[j] += flow[j];
    }
  }
  if (!Op::kSums || !op.sums()) return;
  sum_columns<V>(acc, place, width, height, shared);
#pragma unroll
  for (int j = 0; j < V; ++j) totals[j] += static_cast<double>(acc[j]);
}

template <class Op>
__global__ void __launch_bounds__(kThreads) rows_kernel(typename Op::Given given, Shape shape, Cut cut,
                                                        bool aligned, Sums<typename Op::C> sums) {
  const Op op(given);
  double* shared = reinterpret_cast<double*>(shared_memory());
  for (int64_t item = blockIdx.x; item < cut.items; item += gridDim.x) {
    const int64_t row = cut.pieces == 1 ? item : quotient(item, cut.pieces);
    const int64_t piece = item - row * cut.pieces;
    const int64_t begin = row * shape.p + piece * cut.length, row_end = (row + 1) * shape.p;
    const int64_t end = begin + cut.length < row_end ? begin + cut.length : row_end;
    const int64_t c = row - quotient(row, shape.c) * shape.c;
    const double total = row_piece(op, begin, end, c, aligned, shared);
    if (Op::kSums && op.sums() && threadIdx.x == 0) sums.put(row, piece, total);
  }
}

template <class Op>
__global__ void __launch_bounds__(kThreads) packed_kernel(typename Op::Given given, Shape shape, Cut cut,
                                                          bool aligned, Sums<typename Op::C> sums) {
  const Op op(given);
  const int64_t rows = shape.n * shape.c;
  for (int64_t item = blockIdx.x; item < cut.items; item += gridDim.x) {
    const int64_t first = item * cut.rows;
    const int64_t last = first + cut.rows < rows ? first + cut.rows : rows;
    packed_rows(op, first, last, static_cast<int>(shape.p), shape.c, cut.group, aligned, shared_memory(),
                [&](int64_t row, double total) { sums.put(row, 0, total); });
  }
}

template <class Op, int V>
__global__ void __launch_bounds__(kThreads)
    columns_kernel(typename Op::Given given, Shape shape, Cut cut, bool aligned,
                   Sums<typename Op::C> sums) {
  const Op op(given);
  const Place place(cut.width, cut.height);
  for (int64_t item = blockIdx.x; item < cut.items; item += gridDim.x) {
    const int64_t above = quotient(item, cut.chunks), chunk = item - above * cut.chunks;
    const int64_t n = quotient(above, cut.pieces), piece = above - n * cut.pieces;
    const int64_t c = (chunk * cut.width + place.x) * V;
    const int64_t begin = piece * cut.length;
    const int64_t end = begin + cut.length < shape.p ? begin + cut.length : shape.p;
    double totals[V] = {};
    column_piece<V>(op, place, cut.width, cut.height, n, c, shape.p, shape.c, begin, end, aligned,
                    shared_memory(), totals);
    if (Op::kSums && op.sums() && place.y == 0 && c < shape.c)
#pragma unroll
      for (int j = 0; j < V; ++j) sums.put(n * shape.c + c + j, piece, totals[j]);
  }
}

}  // namespace attrfast::cuda
