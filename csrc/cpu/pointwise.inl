// 1x1 convolutions: one matrix product, positions x input channels by input channels x output channels,
// channels-last, of floats or bfloat16 summed in float; included by kernels.inl.
//
// The weight is packed in panels of two vectors of output channels, input channel by input channel. Positions
// of x are copied first, a block at a time, vector by vector of channels: so x is read in one go, and what is
// multiplied lies close together.
// The sums of kMostRows positions and a panel stay in registers, and what follows the convolution is done to
// them before they are written. A sum runs over the input channels in order, so results have the same bits
// however the positions are cut into blocks.

// Sizes that follow from a call; all in floats where not said otherwise. The weight is packed whole, once, and
// threads take positions; or, where there are fewer positions than output channels, x is copied whole, and
// threads take panels.
template <class T>
struct PointwisePlan {
  int64_t positions;
  int64_t rooms;  // for the input channels, see Operands
  int64_t in_vectors, out_vectors, panels;
  bool whole_weight;
  int64_t block;       // positions that are copied at once
  int64_t step;        // from a vector of their channels to the next
  int64_t packed;      // a panel of the weight
  int64_t sums;        // a sum a channel
  int64_t whole, own;  // what all threads read, and what each has for itself

  // `summed`: every thread has a sum a channel, besides.
  explicit PointwisePlan(const Pointwise& op, bool summed = false)
      : positions(op.n * op.positions),
        rooms(ceil_div(op.channels_in, Operands<T>::kShare)),
        in_vectors(ceil_div(rooms, kLanes)),
        out_vectors(ceil_div(op.channels_out, kLanes)),
        panels(ceil_div(out_vectors, 2)),
        whole_weight(op.channels_out <= positions),
        block(positions),
        packed(rooms * kPanel),
        sums(in_vectors * kVector<T>) {
    if (whole_weight) {
      const int64_t fit = kCopyBytes / (4 * in_vectors * kLanes * kMostRows);
      block = smaller(positions, kMostRows * (panels == 1 ? 1 : larger(1, smaller(fit, 8))));
    }
    step = (block + 1) * kLanes;  // one more: no two vectors lie a power of two apart
    whole = whole_weight ? packed * panels : in_vectors * step;
    own = (whole_weight ? in_vectors * step : packed) + (summed ? sums : 0);
  }
  int64_t floats(int threads) const { return whole + threads * own; }
  float* mine(const Pointwise& op, int64_t share) const { return op.scratch + whole + share * own; }
  float* sums_of(const Pointwise& op, int64_t share) const { return mine(op, share + 1) - sums; }
  // Output channels of a panel; the last one may be one vector wide.
  int64_t width(int64_t panel) const { return smaller(2, out_vectors - 2 * panel) * kLanes; }

 private:
  static constexpr int64_t kCopyBytes = 256 * 1024;
};

// kLanes input channels of a panel: [room][output channel].
template <class T>
static void pack_weight(const Pointwise& op, const PointwisePlan<T>& plan, int64_t panel, int64_t first,
                        float* u) {
  constexpr int64_t kShare = Operands<T>::kShare;
  const int64_t width = plan.width(panel);
  const int64_t ins = smaller(kLanes, op.channels_in - first);
  for (int64_t o = 0; o < width; o += kLanes) {
    const int64_t out = panel * kPanel + o;
    const T* const from = static_cast<const T*>(op.weight) + out * op.weight_out + first * op.weight_in;
    // Two vectors ahead: rows lie so far apart that no processor foresees them.
    const int64_t step = larger(op.weight_out, op.weight_in);
    for (int64_t i = 0; i < kLanes; ++i) __builtin_prefetch(from + 2 * kLanes * op.weight_in + i * step);
    Vector square[kLanes];
    load_square(from, op.weight_out, op.weight_in, op.channels_out - out, ins, square);
    for (int64_t i = 0; op.factor && i < ins; ++i) square[i] *= op.factor[first + i];
    for (int64_t i = 0; i < ins; i += kShare)
      Operands<T>::store_row(u + (first + i) / kShare * width + o, square + i);
  }
}

// R positions and S vectors of output channels, of which the last has fewer channels unless kWhole. `place` is
// the first position's in y.
template <class T, int R, int S, bool kWhole>
static void pointwise_tile(const Pointwise& op, const float* x, int64_t step, const float* u,
                           int64_t place, int64_t channel) {
  const int64_t at = place * op.channels_out + channel, row = op.channels_out;
  const T* const residual = static_cast<const T*>(op.residual);
  T* const y = static_cast<T*>(op.y);
  // While the products are made, what they go to comes near.
  for (int r = 0; r < R; ++r) {
    for (int s = 0; s < S; ++s) {
      __builtin_prefetch(y + at + r * row + s * kLanes, 1);
      if (residual) __builtin_prefetch(residual + at + r * row + s * kLanes);
    }
  }
  Vector sum[R][S] = {};
  add_products<T>(x, step, u, ceil_div(op.channels_in, Operands<T>::kShare), sum);
  const Vector lower = Vector{} + op.lower, upper = Vector{} + op.upper;
// Unrolled, or the sums would have to be somewhere in memory.
#pragma GCC unroll 2
  for (int s = 0; s < S; ++s) {
    const int64_t c = s * kLanes, count = smaller(kLanes, op.channels_out - channel - c);
    const Vector scale = op.scale ? load_lanes<kWhole>(op.scale + channel + c, count) : Vector{};
    const Vector shift = op.shift ? load_lanes<kWhole>(op.shift + channel + c, count) : Vector{};
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      Vector v = sum[r][s];
      if (op.scale) v *= scale;
      if (op.shift) v += shift;
      if (residual) v += load_lanes<kWhole>(residual + at + r * row + c, count);
      v = v < lower ? lower : v;  // comparisons with NaN are false, so NaN stays
      v = v > upper ? upper : v;
      store_lanes<kWhole>(y + at + r * row + c, v, count);
    }
  }
}

template <class T, int S, bool kWhole, int R = kMostRows>
static inline void pointwise_rows(int64_t rows, const Pointwise& op, const float* x, int64_t step,
                                  const float* u, int64_t place, int64_t channel) {
  if (rows == R) return pointwise_tile<T, R, S, kWhole>(op, x, step, u, place, channel);
  if constexpr (R > 1) pointwise_rows<T, S, kWhole, R - 1>(rows, op, x, step, u, place, channel);
}

// A panel of y for `count` positions from `start`, which were copied to x.
template <class T, int S, bool kWhole>
static void pointwise_panel(const Pointwise& op, const float* x, int64_t step, int64_t start,
                            int64_t count, int64_t channel, const float* u) {
  const int64_t parts = ceil_div(count, kMostRows);
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = count * part / parts, last = count * (part + 1) / parts;
    pointwise_rows<T, S, kWhole>(last - first, op, x + first * kLanes, step, u, start + first, channel);
  }
}

template <class T>
static void pointwise_panel(const Pointwise& op, const PointwisePlan<T>& plan, const float* x,
                            int64_t start, int64_t count, int64_t panel, const float* u) {
  const int64_t channel = panel * kPanel, width = plan.width(panel);
  const bool two = width == kPanel, all = op.channels_out - channel >= width;
  const auto run = two   ? (all ? pointwise_panel<T, 2, true> : pointwise_panel<T, 2, false>)
                   : all ? pointwise_panel<T, 1, true>
                         : pointwise_panel<T, 1, false>;
  run(op, x, plan.step, start, count, channel, u);
}

// The vectors of one position to where they lie `step` apart.
template <class T>
static inline void copy_position(const Pointwise& op, const PointwisePlan<T>& plan, int64_t position,
                                 float* to) {
  const T* const from = static_cast<const T*>(op.x) + position * op.channels_in;
  for (int64_t c = 0; c < op.channels_in; c += kVector<T>, to += plan.step)
    Operands<T>::copy(from + c, to, op.channels_in - c);
}

// The convolution. bound(i) is where the i-th of `threads` shares of the positions begins, and
// load(first, last, share, to) brings positions to where the products read them.
template <class T, class Bound, class Load>
static void multiply_positions(const Pointwise& op, const PointwisePlan<T>& plan, int threads,
                               Bound bound, Load load) {
  const int64_t pieces = ceil_div(op.channels_in, kLanes);
  float* const whole = op.scratch;
#pragma omp parallel num_threads(threads)
  {
    if (plan.whole_weight) {
#pragma omp for schedule(static)
      for (int64_t piece = 0; piece < plan.panels * pieces; ++piece) {
        const int64_t panel = piece / pieces;
        pack_weight(op, plan, panel, piece % pieces * kLanes, whole + panel * plan.packed);
      }
    } else {
#pragma omp for schedule(static)
      for (int64_t share = 0; share < threads; ++share) {
        const int64_t start = bound(share);
        load(start, bound(share + 1), share, whole + start * kLanes);
      }
    }
#pragma omp for schedule(static)
    for (int64_t share = 0; share < threads; ++share) {
      float* const mine = plan.mine(op, share);
      if (plan.whole_weight) {
        const int64_t end = bound(share + 1);
        for (int64_t start = bound(share); start < end; start += plan.block) {
          const int64_t count = smaller(plan.block, end - start);
          load(start, start + count, share, mine);
          for (int64_t panel = 0; panel < plan.panels; ++panel)
            pointwise_panel(op, plan, mine, start, count, panel, whole + panel * plan.packed);
        }
      } else {
        const int64_t end = plan.panels * (share + 1) / threads;
        for (int64_t panel = plan.panels * share / threads; panel < end; ++panel) {
          for (int64_t i = 0; i < pieces; ++i) pack_weight(op, plan, panel, i * kLanes, mine);
          pointwise_panel(op, plan, whole, 0, plan.positions, panel, mine);
        }
      }
    }
  }
}

template <class T>
static void pointwise_typed(const Pointwise& op, int threads) {
  const PointwisePlan<T> plan(op);
  multiply_positions(
      op, plan, threads, [&](int64_t share) { return plan.positions * share / threads; },
      [&](int64_t first, int64_t last, int64_t, float* to) {
        for (int64_t i = first; i < last; ++i, to += kLanes) copy_position(op, plan, i, to);
      });
}
