// Max-pooling with a folded batch norm and a ReLU before it; included by kernels.inl.

// The places of one window that lie inside the input, along one axis.
struct Span {
  int64_t first, last;
  Span(int64_t start, int64_t kernel, int64_t size)
      : first(start < 0 ? -start : 0), last(smaller(kernel, size - start)) {}
};

// The rows of input that belong to a row of windows: from its first one to that of the next windows. Every
// row belongs to one, those that no window covers too.
struct OwnRows {
  int64_t first, last;
  OwnRows(const Pool& pool, int64_t oy)
      : first(oy == 0 ? 0 : start(pool, oy)), last(oy + 1 == pool.rows ? pool.h : start(pool, oy + 1)) {}

 private:
  static int64_t start(const Pool& pool, int64_t oy) {
    return larger(0, smaller(pool.h, oy * pool.stride[0] - pool.padding[0]));
  }
};

template <class T, bool kCount>
static void max_pool_typed(const Shape& shape, const Pool& pool, const AffineReluMaxPool& op,
                           int threads) {
  using E = Element<T>;
  using C = Compute<T>;
  const T* z_all = static_cast<const T*>(op.z);
  T* p_all = static_cast<T*>(op.p);
  const C lower = static_cast<C>(op.lower), upper = static_cast<C>(op.upper);
  const PerChannel<C> scales(op.scale, shape.c, 1), shifts(op.shift, shape.c, kNoShift);
  const C *scale = scales.data(), *shift = shifts.data();
  const bool first_layout = shape.layout == kChannelsFirst;
  // A task is one output row: of one channel, or of all channels of a sample. `width` values are
  // worked on side by side: a row's outputs, or an output's channels.
  const int64_t planes = first_layout ? shape.n * shape.c : shape.n;
  const int64_t width = first_layout ? pool.columns : shape.c;
  // Counts of the tasks' own rows, which are in the cache when their windows are done: windows overlap,
  // or leave rows out, and the rows do not.
  const int64_t lanes = first_layout ? 1 : shape.c;
  C* partial = kCount ? new C[planes * pool.rows * lanes] : nullptr;
#pragma omp parallel num_threads(threads)
  {
    C* best = new C[width];
    uint8_t* place = new uint8_t[width];
#pragma omp for schedule(static)
    for (int64_t task = 0; task < planes * pool.rows; ++task) {
      const int64_t plane = task / pool.rows, oy = task % pool.rows;
      const int64_t top = oy * pool.stride[0] - pool.padding[0];
      const Span ys(top, pool.kernel[0], pool.h);
      if (first_layout) {
        const T* z = z_all + plane * pool.h * pool.w;
        const C a = scale[plane % shape.c], b = shift[plane % shape.c];
        for (int64_t ox = 0; ox < width; ++ox) {
          const Span xs(ox * pool.stride[1] - pool.padding[1], pool.kernel[1], pool.w);
          best[ox] = -__builtin_inf();
          place[ox] = static_cast<uint8_t>(ys.first * pool.kernel[1] + xs.first);
        }
        for (int64_t ky = ys.first; ky < ys.last; ++ky) {
          const T* row = z + (top + ky) * pool.w;
          for (int64_t kx = 0; kx < pool.kernel[1]; ++kx) {
            // Outputs whose window has this column inside the input.
            const int64_t shift_x = kx - pool.padding[1], step = pool.stride[1];
            const int64_t from = shift_x < 0 ? ceil_div(-shift_x, step) : 0;
            const int64_t to = pool.w <= shift_x ? 0 : smaller(width, (pool.w - 1 - shift_x) / step + 1);
            const uint8_t here = static_cast<uint8_t>(ky * pool.kernel[1] + kx);
#pragma omp simd
            for (int64_t ox = from; ox < to; ++ox) {
              const C v = clamp(E::load(row[ox * step + shift_x]) * a + b, lower, upper);
              const bool wins = (v > best[ox]) | (v != v);
              best[ox] = wins ? v : best[ox];
              place[ox] = wins ? here : place[ox];
            }
          }
        }
        const int64_t out = task * width;
        for (int64_t ox = 0; ox < width; ++ox) {
          p_all[out + ox] = E::store(best[ox]);
          op.code[out + ox] = place[ox];
        }
        if (kCount) {
          const OwnRows own(pool, oy);
          C sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t i = own.first * pool.w; i < own.last * pool.w; ++i)
            sum += counted<T>(E::store(clamp(E::load(z[i]) * a + b, lower, upper)));
          partial[task] = sum;
        }
        continue;
      }
      const T* z = z_all + plane * pool.h * pool.w * width;
      for (int64_t ox = 0; ox < pool.columns; ++ox) {
        const int64_t left = ox * pool.stride[1] - pool.padding[1];
        const Span xs(left, pool.kernel[1], pool.w);
        const uint8_t start = static_cast<uint8_t>(ys.first * pool.kernel[1] + xs.first);
        for (int64_t c = 0; c < width; ++c) {
          best[c] = -__builtin_inf();
          place[c] = start;
        }
        for (int64_t ky = ys.first; ky < ys.last; ++ky) {
          for (int64_t kx = xs.first; kx < xs.last; ++kx) {
            const T* from = z + ((top + ky) * pool.w + left + kx) * width;
            const uint8_t here = static_cast<uint8_t>(ky * pool.kernel[1] + kx);
#pragma omp simd
            for (int64_t c = 0; c < width; ++c) {
              const C v = clamp(E::load(from[c]) * scale[c] + shift[c], lower, upper);
              const bool wins = (v > best[c]) | (v != v);
              best[c] = wins ? v : best[c];
              place[c] = wins ? here : place[c];
            }
          }
        }
        const int64_t out = (task * pool.columns + ox) * width;
        for (int64_t c = 0; c < width; ++c) {
          p_all[out + c] = E::store(best[c]);
          op.code[out + c] = place[c];
        }
      }
      if (kCount) {
        const OwnRows own(pool, oy);
        C* sum = partial + task * width;
        for (int64_t c = 0; c < width; ++c) sum[c] = 0;
        for (int64_t i = own.first * pool.w; i < own.last * pool.w; ++i) {
#pragma omp simd
          for (int64_t c = 0; c < width; ++c)
            sum[c] += counted<T>(
                E::store(clamp(E::load(z[i * width + c]) * scale[c] + shift[c], lower, upper)));
        }
      }
    }
    delete[] best;
    delete[] place;
  }
  if (!kCount) return;
  C* count = static_cast<C*>(op.count);
  for (int64_t plane = 0; plane < planes; ++plane) {
    for (int64_t c = 0; c < lanes; ++c) {
      double total = 0;
      for (int64_t row = 0; row < pool.rows; ++row)
        total += partial[(plane * pool.rows + row) * lanes + c];
      count[plane * lanes + c] = static_cast<C>(total);
    }
  }
  delete[] partial;
}

// Gathers instead of scattering: each input place asks the windows over it whether it is their maximum.
// Nothing is written twice, no two threads meet, and sums need no buffer in the narrow types.
template <class T>
static void max_pool_backward_typed(const Shape& shape, const Pool& pool,
                                    const AffineReluMaxPoolBackward& op, int threads) {
  using E = Element<T>;
  using C = Compute<T>;
  const T* p_all = static_cast<const T*>(op.p);
  const T* g_all = static_cast<const T*>(op.g);
  T* gz_all = static_cast<T*>(op.gz);
  const C lower = stored_bound<T>(op.lower, -__builtin_inf()),
          upper = stored_bound<T>(op.upper, __builtin_inf());
  const PerChannel<C> scales(op.scale, shape.c, 1);
  const C* scale = scales.data();
  const bool first_layout = shape.layout == kChannelsFirst;
  const int64_t planes = first_layout ? shape.n * shape.c : shape.n;
  const int64_t width = first_layout ? pool.w : shape.c;
  const bool guided = op.guided;
#pragma omp parallel num_threads(threads)
  {
    C* acc = new C[width];
#pragma omp for schedule(static)
    for (int64_t task = 0; task < planes * pool.h; ++task) {
      const int64_t plane = task / pool.h, iy = task % pool.h;
      // Windows over this input row: oy * stride <= iy + padding < oy * stride + kernel.
      const int64_t up = iy + pool.padding[0];
      const int64_t oy_first = larger(0, ceil_div(up - pool.kernel[0] + 1, pool.stride[0]));
      const int64_t oy_last = smaller(pool.rows - 1, up / pool.stride[0]);
      if (first_layout) {
        for (int64_t ix = 0; ix < width; ++ix) acc[ix] = 0;
        for (int64_t oy = oy_first; oy <= oy_last; ++oy) {
          const int64_t ky = up - oy * pool.stride[0];
          const int64_t start = (plane * pool.rows + oy) * pool.columns;
          const int64_t low = ky * pool.kernel[1], high = low + pool.kernel[1];
          for (int64_t ox = 0; ox < pool.columns; ++ox) {
            const int64_t place = op.code[start + ox];
            if (place < low || place >= high) continue;
            const C p = E::load(p_all[start + ox]);
            const int64_t ix = ox * pool.stride[1] - pool.padding[1] + place - low;
            // The last one says that the code is not of this pooling; it must not write elsewhere.
            if ((p <= lower) | (p >= upper) | (ix < 0) | (ix >= width)) continue;
            acc[ix] += E::load(g_all[start + ox]);
          }
        }
        const C factor = scale[plane % shape.c];
        T* gz = gz_all + task * width;
#pragma omp simd
        for (int64_t ix = 0; ix < width; ++ix)
          gz[ix] = E::store((guided & !(acc[ix] > C(0)) ? C(0) : acc[ix]) * factor);
        continue;
      }
      for (int64_t ix = 0; ix < pool.w; ++ix) {
        const int64_t along = ix + pool.padding[1];
        const int64_t ox_first = larger(0, ceil_div(along - pool.kernel[1] + 1, pool.stride[1]));
        const int64_t ox_last = smaller(pool.columns - 1, along / pool.stride[1]);
        for (int64_t c = 0; c < width; ++c) acc[c] = 0;
        for (int64_t oy = oy_first; oy <= oy_last; ++oy) {
          for (int64_t ox = ox_first; ox <= ox_last; ++ox) {
            const int64_t start = ((plane * pool.rows + oy) * pool.columns + ox) * width;
            const uint8_t here = static_cast<uint8_t>((up - oy * pool.stride[0]) * pool.kernel[1] +
                                                      along - ox * pool.stride[1]);
            const T* p = p_all + start;
            const T* g = g_all + start;
            const uint8_t* code = op.code + start;
#pragma omp simd
            for (int64_t c = 0; c < width; ++c) {
              const C v = E::load(p[c]);
              const bool blocked = (code[c] != here) | (v <= lower) | (v >= upper);
              acc[c] += blocked ? C(0) : E::load(g[c]);
            }
          }
        }
        T* gz = gz_all + (task * pool.w + ix) * width;
#pragma omp simd
        for (int64_t c = 0; c < width; ++c)
          gz[c] = E::store((guided & !(acc[c] > C(0)) ? C(0) : acc[c]) * scale[c]);
      }
    }
    delete[] acc;
  }
}
