// Max-pooling with a folded batch norm and a ReLU before it. (The twin of cpu/max_pool.inl.)
//
// Channels-first, rows of the input lie at any multiple of an element, and windows share what they read:
// so a block copies a run of whole rows into shared memory, by slots, and works from there. Channels-last,
// a slot holds neighbouring channels of one position, and threads read slots straight from global memory.
#pragma once

#include "kernels.cuh"

namespace attrfast::cuda {

// Geometry that the compiler knows, and geometry that it doesn't.
template <int K, int S, int P>
struct FixedWindow {
  __host__ __device__ explicit FixedWindow(const Pool&) {}
  __device__ constexpr int kernel(int) const { return K; }
  __device__ constexpr int stride(int) const { return S; }
  __device__ constexpr int padding(int) const { return P; }
  __device__ constexpr int reach(int, int, int, bool) const { return K; }
};

struct AnyWindow {
  int k[2], s[2], p[2];
  __host__ __device__ explicit AnyWindow(const Pool& pool)
      : k{static_cast<int>(pool.kernel[0]), static_cast<int>(pool.kernel[1])},
        s{static_cast<int>(pool.stride[0]), static_cast<int>(pool.stride[1])},
        p{static_cast<int>(pool.padding[0]), static_cast<int>(pool.padding[1])} {}
  __device__ int kernel(int axis) const { return k[axis]; }
  __device__ int stride(int axis) const { return s[axis]; }
  __device__ int padding(int axis) const { return p[axis]; }
  // Places from the start of a window on that are its own, or before the next window (of the last one: all
  // that are left): what a count must see, where not every place is in a window.
  __device__ int reach(int axis, int start, int size, bool last) const {
    const int left = size - start, own = last || s[axis] > left ? left : s[axis];
    return own > k[axis] ? own : k[axis];
  }
};

__device__ __forceinline__ int least(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int most(int a, int b) { return a > b ? a : b; }

// One byte for each element of a slot, moved together where the slot is whole.
template <int V>
struct alignas(V) Bytes {
  uint8_t v[V];
};

template <int V>
__device__ __forceinline__ Bytes<V> load_bytes(const uint8_t* from, const Part& part) {
  if (V > 1 && part.whole) return read(reinterpret_cast<const Bytes<V>*>(from));
  Bytes<V> bytes;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    bytes.v[j] = 0;
    if (j >= part.first && j < part.last) bytes.v[j] = read(from + j);
  }
  return bytes;
}

template <int V>
__device__ __forceinline__ void store_bytes(uint8_t* to, const Part& part, const Bytes<V>& bytes) {
  if (V > 1 && part.whole) return write(reinterpret_cast<Bytes<V>*>(to), bytes);
#pragma unroll
  for (int j = 0; j < V; ++j)
    if (j >= part.first && j < part.last) write(to + j, bytes.v[j]);
}

// From shared memory, where a slot lies at a multiple of 16 bytes.
template <class T, int V>
__device__ __forceinline__ void copy_slot(T* to, const T* from, const Part& part) {
  if (part.whole) return write16(to, *reinterpret_cast<const uint4*>(from));
#pragma unroll
  for (int j = 0; j < V; ++j)
    if (j >= part.first && j < part.last) write(to + j, from[j]);
}

// The running maximum of a window: PyTorch's, the first of equals, NaN above all.
template <class C>
struct Best {
  C value;
  int place;
  __device__ void meet(C v, int here) {
    const bool wins = (v > value) | (v != v);
    value = wins ? v : value;
    place = wins ? here : place;
  }
};

constexpr float kLowest = -__builtin_huge_valf();

// -- forward ----------------------------------------------------------------------------------------

// What of a plane an item covers.
struct Band {
  int64_t plane;  // the first
  int planes;
  int64_t piece;
  int first, last;  // rows of windows
  __device__ Band(const PoolCut& cut, int64_t item, int64_t all_planes, int rows) {
    const int64_t turn = cut.pieces == 1 ? item : quotient(item, cut.pieces);
    piece = item - turn * cut.pieces;
    plane = turn * cut.planes;
    planes = static_cast<int>(plane + cut.planes < all_planes ? cut.planes : all_planes - plane);
    first = static_cast<int>(piece * cut.band);
    last = static_cast<int>(first + cut.band < rows ? first + cut.band : rows);
  }
};

// Counts the places of an item's planes, or of its band down to the next one's first window. `tile` holds
// the input from row `top` to `bottom`; of a band, rows that no window covers may lie below.
template <class T, class Window>
__device__ void count_tile(const AffineReluMaxPool& op, const Shape& shape, const Pool& pool,
                           const PoolCut& cut, const Window& window, const Band& band, const T* tile,
                           int top, int bottom, double* shared, const Sums<Compute<T>>& sums) {
  using C = Compute<T>;
  const C *scale = static_cast<const C*>(op.scale), *shift = static_cast<const C*>(op.shift);
  const C lower = static_cast<C>(op.lower), upper = static_cast<C>(op.upper);
  const auto channel = [&](int64_t plane) { return plane - quotient(plane, shape.c) * shape.c; };
  const auto one = [&](T z, C a, C b) {
    return counted<T>(clamp(Element<T>::load(z) * a + b, lower, upper));
  };
  if (cut.planes == 1) {
    const int64_t c = channel(band.plane);
    const C a = scale ? read(scale + c) : C(1), b = shift ? read(shift + c) : C(-0.0);
    const int h = static_cast<int>(pool.h);
    const int64_t next = int64_t{band.last} * window.stride(0) - window.padding(0);
    const int own = band.last == pool.rows || next > h ? h : most(0, static_cast<int>(next));
    const T* z = static_cast<const T*>(op.z) + (band.plane * h + top) * pool.w;
    const int64_t there = (bottom - top) * pool.w, end = (own - top) * pool.w;
    C sum = 0;
    for (int64_t i = threadIdx.x; i < end; i += kThreads)
      sum += one(i < there ? tile[i] : read(z + i), a, b);
    const double total = block_sum(sum, shared);
    if (threadIdx.x == 0) sums.put(band.plane, band.piece, total);
    return;
  }
  const int size = static_cast<int>(pool.h * pool.w), at_once = kThreads / cut.group;
  const int member = static_cast<int>(threadIdx.x) % cut.group;
  for (int base = 0; base < band.planes; base += at_once) {  // as many rounds for every thread
    const int plane = base + static_cast<int>(threadIdx.x) / cut.group;
    C sum = 0;
    if (plane < band.planes) {
      const int64_t c = channel(band.plane + plane);
      const C a = scale ? read(scale + c) : C(1), b = shift ? read(shift + c) : C(-0.0);
      for (int i = member; i < size; i += cut.group) sum += one(tile[plane * size + i], a, b);
    }
    sum = group_sum(sum, cut.group);
    if (member == 0 && plane < band.planes) sums.put(band.plane + plane, 0, sum);
  }
}

template <class T, class Window, bool kCount>
__global__ void __launch_bounds__(kThreads, 2)
    pool_staged_kernel(AffineReluMaxPool op, Shape shape, Pool pool, PoolCut cut, Window window,
                       bool aligned, Sums<Compute<T>> sums) {
  using E = Element<T>;
  using C = Compute<T>;
  constexpr int V = kLanes<T>;
  const T* z = static_cast<const T*>(op.z);
  T* p = static_cast<T*>(op.p);
  const C *scale = static_cast<const C*>(op.scale), *shift = static_cast<const C*>(op.shift);
  const C lower = static_cast<C>(op.lower), upper = static_cast<C>(op.upper);
  const int h = static_cast<int>(pool.h), w = static_cast<int>(pool.w);
  const int columns = static_cast<int>(pool.columns);
  T* found = reinterpret_cast<T*>(shared_memory());  // maxima on their way out, and their places
  uint8_t* places = reinterpret_cast<uint8_t*>(found + kThreads * V);
  T* tile = reinterpret_cast<T*>(places + kThreads * V);
  for (int64_t item = blockIdx.x; item < cut.items; item += gridDim.x) {
    const Band band(cut, item, shape.n * shape.c, static_cast<int>(pool.rows));
    const int top = cut.pieces == 1 ? 0 : most(0, band.first * window.stride(0) - window.padding(0));
    const int bottom =
        cut.pieces == 1
            ? h
            : least(h, (band.last - 1) * window.stride(0) - window.padding(0) + window.kernel(0));
    const int64_t begin = (band.plane * h + top) * w;
    const int64_t end = ((band.plane + band.planes - 1) * h + bottom) * w;
    const int64_t start = begin / V * V;
    for (int64_t at = start + int64_t{threadIdx.x} * V; at < end; at += int64_t{kThreads} * V) {
      const Part part = part_of<V>(at, begin, end, aligned);
      T* to = tile + (at - start);
      if (part.whole) {
        *reinterpret_cast<uint4*>(to) = read16(z + at);
      } else {
#pragma unroll
        for (int j = 0; j < V; ++j)
          if (j >= part.first && j < part.last) to[j] = read(z + at + j);
      }
    }
    __syncthreads();
    if (kCount)
      count_tile(op, shape, pool, cut, window, band, tile + (begin - start), top, bottom,
                 reinterpret_cast<double*>(found), sums);
    const int height = band.last - band.first, count = band.planes * height * columns;
    const int64_t out = (band.plane * pool.rows + band.first) * columns;
    const uint32_t c_first = static_cast<uint32_t>(band.plane - quotient(band.plane, shape.c) * shape.c);
    // Neighbouring threads take neighbouring windows, which spares shared memory conflicts; what they
    // found goes through shared memory again, and to global memory by slots.
    C a = 1, b = C(-0.0);
    int plane_before = -1;
    for (int base = -static_cast<int>(out % V); base < count; base += kThreads * V) {
      for (int k = 0; k < V; ++k) {
        const int mine = k * kThreads + static_cast<int>(threadIdx.x), o = base + mine;
        if (o < 0 || o >= count) continue;
        const int row = o / columns, plane = band.planes == 1 ? 0 : row / height;
        const int y0 = (band.first + row - plane * height) * window.stride(0) - window.padding(0);
        const int x0 = (o - row * columns) * window.stride(1) - window.padding(1);
        if (plane != plane_before) {
          plane_before = plane;
          const uint32_t c = (c_first + plane) % static_cast<uint32_t>(shape.c);
          a = scale ? read(scale + c) : C(1);
          b = shift ? read(shift + c) : C(-0.0);
        }
        const T* from = tile + (begin - start);
        const int above = plane * h - top;  // rows of the tile before this plane's row 0
        Best<C> best = {C(kLowest), most(0, -y0) * window.kernel(1) + most(0, -x0)};
#pragma unroll
        for (int ky = 0; ky < window.kernel(0); ++ky) {
          const int y = y0 + ky;
#pragma unroll
          for (int kx = 0; kx < window.kernel(1); ++kx) {
            const int x = x0 + kx;
            if (y < 0 || y >= h || x < 0 || x >= w) continue;
            const C v = E::load(from[(above + y) * w + x]) * a + b;
            best.meet(clamp(v, lower, upper), ky * window.kernel(1) + kx);
          }
        }
        found[mine] = E::store(best.value);
        places[mine] = static_cast<uint8_t>(best.place);
      }
      __syncthreads();
      const int64_t at = out + base + int64_t{threadIdx.x} * V;
      if (at < out + count) {
        const Part part = part_of<V>(at, out, out + count, aligned);
        copy_slot<T, V>(p + at, found + threadIdx.x * V, part);
        store_bytes<V>(op.code + at, part, reinterpret_cast<const Bytes<V>*>(places)[threadIdx.x]);
      }
      __syncthreads();  // the next windows and the next item's input go to the same memory
    }
  }
}

// A thread's work on the direct path: a slot of channels (one, channels-first), some positions.
template <int V>
struct DirectItem {
  int64_t plane, c, piece, begin, end;
  __device__ DirectItem(const Cut& cut, const Place& place, int64_t item, int64_t positions) {
    const int64_t above = quotient(item, cut.chunks);
    c = ((item - above * cut.chunks) * cut.width + place.x) * V;
    plane = quotient(above, cut.pieces);
    piece = above - plane * cut.pieces;
    begin = piece * cut.length;
    end = begin + cut.length < positions ? begin + cut.length : positions;
  }
};

template <class T, int V, class Window, bool kCount>
__global__ void __launch_bounds__(kThreads, 2)
    pool_direct_kernel(AffineReluMaxPool op, Shape shape, Pool pool, Cut cut, Window window,
                       bool aligned, Sums<Compute<T>> sums) {
  using C = Compute<T>;
  const T* z = static_cast<const T*>(op.z);
  const C *scale = static_cast<const C*>(op.scale), *shift = static_cast<const C*>(op.shift);
  const C lower = static_cast<C>(op.lower), upper = static_cast<C>(op.upper);
  const int h = static_cast<int>(pool.h), w = static_cast<int>(pool.w);
  const int64_t positions = pool.rows * pool.columns;
  const int64_t step = shape.layout == kChannelsLast ? shape.c : 1;  // from one position to the next
  const Place place(cut.width, cut.height);
  const Part all = {0, V, aligned};
  for (int64_t item = blockIdx.x; item < cut.items; item += gridDim.x) {
    const DirectItem<V> work(cut, place, item, positions);
    const bool used = place.used && work.c < step;
    if (!kCount && !used) continue;
    const int64_t first = work.plane * step + work.c, c = first - quotient(first, shape.c) * shape.c;
    C count[V] = {};
    C a[V], b[V];
    if (used) {
      load_vector<V>(scale ? scale + c : nullptr, C(1), a);
      load_vector<V>(shift ? shift + c : nullptr, C(-0.0), b);
    }
    for (int64_t position = work.begin + place.y; used && position < work.end; position += cut.height) {
      const int64_t oy = quotient(position, pool.columns), ox = position - oy * pool.columns;
      const int y0 = static_cast<int>(oy) * window.stride(0) - window.padding(0);
      const int x0 = static_cast<int>(ox) * window.stride(1) - window.padding(1);
      const bool last_y = oy + 1 == pool.rows, last_x = ox + 1 == pool.columns;
      const int tall = kCount ? window.reach(0, y0, h, last_y) : window.kernel(0);
      const int wide = kCount ? window.reach(1, x0, w, last_x) : window.kernel(1);
      Best<C> best[V];
#pragma unroll
      for (int j = 0; j < V; ++j) best[j] = {C(kLowest), most(0, -y0) * window.kernel(1) + most(0, -x0)};
#pragma unroll
      for (int ky = 0; ky < tall; ++ky) {
        const int y = y0 + ky;
#pragma unroll
        for (int kx = 0; kx < wide; ++kx) {
          const int x = x0 + kx;
          if (y < 0 || y >= h || x < 0 || x >= w) continue;
          // A place is counted by the last window that begins before it, whose own it need not be.
          const bool own = !kCount || (ky < window.kernel(0) && kx < window.kernel(1));
          const bool mine =
              kCount && (ky < window.stride(0) || last_y) && (kx < window.stride(1) || last_x);
          if (!own && !mine) continue;
          C value[V];
          load_slot<T, V>(z + ((work.plane * h + y) * w + x) * step + work.c, all, value);
#pragma unroll
          for (int j = 0; j < V; ++j) {
            const C v = clamp(value[j] * a[j] + b[j], lower, upper);
            if (own) best[j].meet(v, ky * window.kernel(1) + kx);
            if (kCount) count[j] += mine ? counted<T>(v) : C(0);
          }
        }
      }
      C value[V];
      Bytes<V> code;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        value[j] = best[j].value;
        code.v[j] = static_cast<uint8_t>(best[j].place);
      }
      const int64_t out = (work.plane * positions + position) * step + work.c;
      store_slot<T, V>(static_cast<T*>(op.p) + out, all, value);
      store_bytes<V>(op.code + out, all, code);
    }
    if (!kCount) continue;
    sum_columns<V>(count, place, cut.width, cut.height, shared_memory());
    if (used && place.y == 0)
#pragma unroll
      for (int j = 0; j < V; ++j) sums.put(first + j, work.piece, count[j]);
  }
}

// -- backward ---------------------------------------------------------------------------------------

// Gathers instead of scattering: each input place asks the windows over it whether it is their maximum.
// Nothing is written twice and no float is added by two threads.

// Calls visit(oy, ky) for the rows (or columns) of windows over a place, in ascending order.
template <class Window, class Visit>
__device__ __forceinline__ void windows_over(const Window& window, int axis, int place, int windows,
                                             Visit visit) {
  const int along = place + window.padding(axis), stride = window.stride(axis);
  const int nearest = along / stride;
  // `back` windows before the nearest one.
#pragma unroll
  for (int back = (window.kernel(axis) - 1) / stride; back >= 0; --back) {
    const int o = nearest - back, k = along - o * stride;
    if (o >= 0 && o < windows && k < window.kernel(axis)) visit(o, k);
  }
}

template <class T, class Window>
__global__ void __launch_bounds__(kThreads, 2)
    pool_backward_staged_kernel(AffineReluMaxPoolBackward op, Shape shape, Pool pool, PoolCut cut,
                                Window window, bool aligned, Sums<Compute<T>> sums) {
  using C = Compute<T>;
  constexpr int V = kLanes<T>;
  constexpr int kRoom = kStagedWindows + 2 * V;
  const T *p = static_cast<const T*>(op.p), *g = static_cast<const T*>(op.g);
  const C* scale = static_cast<const C*>(op.scale);
  T* gz = static_cast<T*>(op.gz);
  const C lower = stored_bound<T>(op.lower, -__builtin_inf()),
          upper = stored_bound<T>(op.upper, __builtin_inf());
  const int h = static_cast<int>(pool.h), w = static_cast<int>(pool.w);
  const int rows = static_cast<int>(pool.rows), columns = static_cast<int>(pool.columns);
  double* shared = reinterpret_cast<double*>(shared_memory());
  C* flow = reinterpret_cast<C*>(shared + 32);
  C* kept = flow + kRoom;
  uint8_t* code = reinterpret_cast<uint8_t*>(kept + kRoom);
  for (int64_t item = blockIdx.x; item < cut.items; item += gridDim.x) {
    const Band band(cut, item, shape.n * shape.c, rows);
    // Windows of the rows above reach into this band's input; their attribution is another band's.
    const int above =
        cut.pieces == 1 ? 0 : most(0, band.first - (window.kernel(0) - 1) / window.stride(0));
    const int64_t own = (band.plane * rows + band.first) * columns;
    const int64_t begin = (band.plane * rows + above) * columns;
    const int64_t end = ((band.plane + band.planes - 1) * rows + band.last) * columns;
    const int64_t start = begin / V * V;
    C acc[V] = {};
    for (int64_t at = start + int64_t{threadIdx.x} * V; at < end; at += int64_t{kThreads} * V) {
      const Part part = part_of<V>(at, begin, end, aligned);
      C pooled[V];
      Values<C, V> grad, product;
      load_slot<T, V>(p + at, part, pooled);
      load_slot<T, V>(g + at, part, grad.v);
      const Bytes<V> places = load_bytes<V>(op.code + at, part);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        product.v[j] = at + j >= own ? pooled[j] * grad.v[j] : C(0);
        acc[j] += product.v[j];
        grad.v[j] = (pooled[j] <= lower) | (pooled[j] >= upper) ? C(0) : grad.v[j];
      }
      const int64_t slot = (at - start) / V;
      if (cut.planes > 1) reinterpret_cast<Values<C, V>*>(flow)[slot] = product;
      reinterpret_cast<Values<C, V>*>(kept)[slot] = grad;
      reinterpret_cast<Bytes<V>*>(code)[slot] = places;
    }
    __syncthreads();
    const int shift = static_cast<int>(begin - start);
    if (sums.s && cut.planes == 1) {
      C sum = 0;
#pragma unroll
      for (int j = 0; j < V; ++j) sum += acc[j];
      const double total = block_sum(sum, shared);
      if (threadIdx.x == 0) sums.put(band.plane, band.piece, total);
    } else if (sums.s) {
      const int size = rows * columns, at_once = kThreads / cut.group;
      const int member = static_cast<int>(threadIdx.x) % cut.group;
      for (int base = 0; base < band.planes; base += at_once) {
        const int plane = base + static_cast<int>(threadIdx.x) / cut.group;
        C sum = 0;
        if (plane < band.planes)
          for (int i = member; i < size; i += cut.group) sum += flow[shift + plane * size + i];
        sum = group_sum(sum, cut.group);
        if (member == 0 && plane < band.planes) sums.put(band.plane + plane, 0, sum);
      }
    }
    // The input that belongs to the band: from its first window to that of the next band.
    const int top =
        band.first == 0 ? 0 : least(h, most(0, band.first * window.stride(0) - window.padding(0)));
    const int bottom =
        band.last == rows ? h : least(h, most(0, band.last * window.stride(0) - window.padding(0)));
    const int64_t from = (band.plane * h + top) * w;
    const int64_t to = ((band.plane + band.planes - 1) * h + bottom) * w;
    const uint32_t count = static_cast<uint32_t>(shape.c);
    const uint32_t c_first = static_cast<uint32_t>(band.plane - quotient(band.plane, shape.c) * shape.c);
    int plane_before = -1;
    uint32_t c = 0;
    C factor = 1;
    for (int64_t at = (from / V + threadIdx.x) * V; at < to; at += int64_t{kThreads} * V) {
      const Part part = part_of<V>(at, from, to, aligned);
      const int64_t offset = at + part.first - from, line = quotient(offset, w);
      int plane = band.planes == 1 ? 0 : static_cast<int>(line) / h;
      int y = top + static_cast<int>(line) - plane * h, x = static_cast<int>(offset - line * w);
      if (plane != plane_before) {
        plane_before = plane;
        c = (c_first + plane) % count;
        factor = scale ? read(scale + c) : C(1);
      }
      C value[V];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        value[j] = 0;
        if (j < part.first || j >= part.last) continue;
        C sum = 0;
        windows_over(window, 0, y, band.last, [&](int oy, int ky) {
          windows_over(window, 1, x, columns, [&](int ox, int kx) {
            const int i = shift + (plane * rows - above + oy) * columns + ox;
            if (code[i] == ky * window.kernel(1) + kx) sum += kept[i];
          });
        });
        value[j] = (op.guided & !(sum > C(0)) ? C(0) : sum) * factor;
        if (++x < w || j + 1 >= part.last) continue;
        x = 0;
        if (++y < h) continue;
        y = 0;
        plane_before = ++plane;
        c = c + 1 == count ? 0 : c + 1;
        factor = scale ? read(scale + c) : C(1);
      }
      store_slot<T, V>(gz + at, part, value);
    }
    __syncthreads();  // the next item's windows go to the same memory
  }
}

template <class T, int V, class Window>
__global__ void __launch_bounds__(kThreads, 2)
    pool_backward_direct_kernel(AffineReluMaxPoolBackward op, Shape shape, Pool pool, Cut cut,
                                Window window, bool aligned, Sums<Compute<T>> sums) {
  using C = Compute<T>;
  const T *p = static_cast<const T*>(op.p), *g = static_cast<const T*>(op.g);
  const C* scale = static_cast<const C*>(op.scale);
  const C lower = stored_bound<T>(op.lower, -__builtin_inf()),
          upper = stored_bound<T>(op.upper, __builtin_inf());
  const int rows = static_cast<int>(pool.rows), columns = static_cast<int>(pool.columns);
  const int64_t positions = pool.h * pool.w;
  const int64_t step = shape.layout == kChannelsLast ? shape.c : 1;
  const Place place(cut.width, cut.height);
  const Part all = {0, V, aligned};
  for (int64_t item = blockIdx.x; item < cut.items; item += gridDim.x) {
    const DirectItem<V> work(cut, place, item, positions);
    const bool used = place.used && work.c < step;
    const int64_t first = work.plane * step + work.c, c = first - quotient(first, shape.c) * shape.c;
    C acc[V] = {};
    if (used) {
      C factor[V];
      load_vector<V>(scale ? scale + c : nullptr, C(1), factor);
      for (int64_t position = work.begin + place.y; position < work.end; position += cut.height) {
        const int64_t line = quotient(position, pool.w);
        const int y = static_cast<int>(line), x = static_cast<int>(position - line * pool.w);
        C sum[V] = {};
        windows_over(window, 0, y, rows, [&](int oy, int ky) {
          windows_over(window, 1, x, columns, [&](int ox, int kx) {
            const int64_t at =
                ((work.plane * rows + oy) * static_cast<int64_t>(columns) + ox) * step + work.c;
            C pooled[V], grad[V];
            load_slot<T, V>(p + at, all, pooled);
            load_slot<T, V>(g + at, all, grad);
            const Bytes<V> code = load_bytes<V>(op.code + at, all);
            // The first of a window's places inside the input counts its attribution.
            const bool mine = y == most(0, y - ky) && x == most(0, x - kx);
            const int here = ky * window.kernel(1) + kx;
#pragma unroll
            for (int j = 0; j < V; ++j) {
              const bool blocked = (code.v[j] != here) | (pooled[j] <= lower) | (pooled[j] >= upper);
              sum[j] += blocked ? C(0) : grad[j];
              acc[j] += mine ? pooled[j] * grad[j] : C(0);
            }
          });
        });
#pragma unroll
        for (int j = 0; j < V; ++j) sum[j] = (op.guided & !(sum[j] > C(0)) ? C(0) : sum[j]) * factor[j];
        store_slot<T, V>(static_cast<T*>(op.gz) + (work.plane * positions + position) * step + work.c,
                         all, sum);
      }
    }
    if (!sums.s) continue;
    sum_columns<V>(acc, place, cut.width, cut.height, shared_memory());
    if (used && place.y == 0)
#pragma unroll
      for (int j = 0; j < V; ++j) sums.put(first + j, work.piece, acc[j]);
  }
}

}  // namespace attrfast::cuda
