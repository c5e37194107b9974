// Batch norm and ReLU over maps that are joined along the channels, without joining them; included by kernels.inl.

// Which part each channel of the joined map is of, and where the parts begin.
class Parts {
 public:
  explicit Parts(const Joined& op) : begin_(new int64_t[op.count + 1]) {
    begin_[0] = 0;
    for (int64_t i = 0; i < op.count; ++i) begin_[i + 1] = begin_[i] + op.channels[i];
    owner_ = new int64_t[begin_[op.count]];
    for (int64_t i = 0; i < op.count; ++i)
      for (int64_t c = begin_[i]; c < begin_[i + 1]; ++c) owner_[c] = i;
  }
  ~Parts() {
    delete[] begin_;
    delete[] owner_;
  }
  Parts(const Parts&) = delete;
  Parts& operator=(const Parts&) = delete;
  int64_t begin(int64_t part) const { return begin_[part]; }
  int64_t owner(int64_t channel) const { return owner_[channel]; }

 private:
  int64_t *begin_, *owner_;
};

// What the forward makes of one element.
template <class T>
static inline Compute<T> joined_value(T x, Compute<T> scale, Compute<T> shift, Compute<T> lower,
                                      Compute<T> upper) {
  return clamp(Element<T>::load(x) * scale + shift, lower, upper);
}

template <class T>
static void joined_typed(const Shape& shape, const Joined& op, void* y_out, int threads) {
  using C = Compute<T>;
  T* y = static_cast<T*>(y_out);
  const C *scale = static_cast<const C*>(op.scale), *shift = static_cast<const C*>(op.shift);
  const C lower = static_cast<C>(op.lower), upper = static_cast<C>(op.upper);
  const int64_t channels = shape.c;
  const Parts parts(op);
  if (shape.layout == kChannelsFirst) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < shape.n * channels; ++row) {
      const int64_t n = row / channels, c = row % channels, part = parts.owner(c);
      const T* x =
          static_cast<const T*>(op.x[part]) + (n * op.channels[part] + c - parts.begin(part)) * shape.p;
      T* to = y + row * shape.p;
      const C a = scale[c], b = shift[c];
#pragma omp simd
      for (int64_t i = 0; i < shape.p; ++i)
        to[i] = Element<T>::store(joined_value(x[i], a, b, lower, upper));
    }
    return;
  }
  const int64_t rows = shape.n * shape.p;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t start = 0; start < rows; start += kRows) {
    const int64_t stop = smaller(start + kRows, rows);
    for (int64_t part = 0; part < op.count; ++part) {
      const int64_t begin = parts.begin(part), width = op.channels[part];
      const T* x = static_cast<const T*>(op.x[part]);
      for (int64_t row = start; row < stop; ++row) {
        T* to = y + row * channels + begin;
#pragma omp simd
        for (int64_t c = 0; c < width; ++c)
          to[c] = Element<T>::store(
              joined_value(x[row * width + c], scale[begin + c], shift[begin + c], lower, upper));
      }
    }
  }
}

enum Into { kNowhere, kNew, kAdded };  // where a part's gradient goes

// One element; returns what it adds to the attribution.
template <class T, bool kGuided, Into kWhere>
static inline Compute<T> joined_gradient(T x, T g_in, T* gx, Compute<T> scale, Compute<T> shift,
                                         Compute<T> lower, Compute<T> upper, Compute<T> least,
                                         Compute<T> most) {
  using E = Element<T>;
  using C = Compute<T>;
  const C a = E::load(E::store(joined_value(x, scale, shift, lower, upper))), g = E::load(g_in);
  const bool blocked = (a <= least) | (a >= most) | (kGuided & !(g > C(0)));
  const C inside = (blocked ? C(0) : g) * scale;
  if (kWhere == kNew) *gx = E::store(inside);
  if (kWhere == kAdded) *gx = E::store(E::load(*gx) + inside);
  return a * g;
}

template <class T, bool kGuided>
static void joined_backward_typed(const Shape& shape, const JoinedBackward& op, int threads) {
  using C = Compute<T>;
  const Joined& joined = op.joined;
  const T* g = static_cast<const T*>(op.g);
  const C *scale = static_cast<const C*>(joined.scale), *shift = static_cast<const C*>(joined.shift);
  const C lower = static_cast<C>(joined.lower), upper = static_cast<C>(joined.upper);
  const C least = stored_bound<T>(joined.lower, -__builtin_inf()),
          most = stored_bound<T>(joined.upper, __builtin_inf());
  const int64_t channels = shape.c;
  const Parts parts(joined);
  const auto where = [&](int64_t part) {
    return !op.gx[part] ? kNowhere : op.adds[part] ? kAdded : kNew;
  };
  if (shape.layout == kChannelsFirst) {
    C* s = static_cast<C*>(op.s);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < shape.n * channels; ++row) {
      const int64_t n = row / channels, c = row % channels, part = parts.owner(c);
      const int64_t place = (n * joined.channels[part] + c - parts.begin(part)) * shape.p;
      const T *x = static_cast<const T*>(joined.x[part]) + place, *from = g + row * shape.p;
      T* gx = op.gx[part] ? static_cast<T*>(op.gx[part]) + place : nullptr;
      const C a = scale[c], b = shift[c];
      double total = 0;
      const auto add = [&](auto into) {
        for (int64_t start = 0; start < shape.p; start += kBlock) {
          const int64_t stop = smaller(start + kBlock, shape.p);
          C sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t i = start; i < stop; ++i)
            sum += joined_gradient<T, kGuided, static_cast<Into>(decltype(into)::value)>(
                x[i], from[i], gx + i, a, b, lower, upper, least, most);
          total += sum;
        }
      };
      switch (where(part)) {
        case kNowhere: add(Number<kNowhere>()); break;
        case kNew: add(Number<kNew>()); break;
        case kAdded: add(Number<kAdded>()); break;
      }
      if (s) s[row] = static_cast<C>(total);
    }
    return;
  }
  sum_blocks_channels_last<C>(
      shape, op.s, op.s != nullptr, threads, [&](int64_t start, int64_t stop, C* acc) {
        for (int64_t part = 0; part < joined.count; ++part) {
          const int64_t begin = parts.begin(part), width = joined.channels[part];
          const T* x = static_cast<const T*>(joined.x[part]);
          T* gx = static_cast<T*>(op.gx[part]);
          const C *a = scale + begin, *b = shift + begin;
          C* sum = acc + begin;
          const auto add = [&](auto into) {
            for (int64_t row = start; row < stop; ++row) {
              const T *here = x + row * width, *from = g + row * channels + begin;
              T* to = gx + row * width;
#pragma omp simd
              for (int64_t c = 0; c < width; ++c)
                sum[c] += joined_gradient<T, kGuided, static_cast<Into>(decltype(into)::value)>(
                    here[c], from[c], to + c, a[c], b[c], lower, upper, least, most);
            }
          };
          switch (where(part)) {
            case kNowhere: add(Number<kNowhere>()); break;
            case kNew: add(Number<kNew>()); break;
            case kAdded: add(Number<kAdded>()); break;
          }
        }
      });
}
