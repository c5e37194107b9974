// Depthwise convolutions: every channel has a small square window of its own, channels-last, of floats or bfloat16
// summed in float; included by kernels.inl.
//
// The sums of a few neighbouring outputs stay in registers. Each is summed in the same order however outputs are
// cut, so results have the same bits. Rows of x are brought one after another to a ring of as many as a window
// has, with zeros where the padding is. The gradient for an input is a convolution too, of rows that have as many
// zeros between their columns as the stride leaves out; those are masked and measured as they are brought.

constexpr int64_t kMostColumns =
    kLanes == 16 ? 8 : 4;  // outputs at once: with a row of the weight in registers

// Sizes that follow from a call; floats where not said otherwise. A task is a block of channels of a part of
// a sample's rows.
struct DepthwisePlan {
  int64_t vectors;        // of channels
  int64_t blocks, parts;  // of a sample: of channels, of rows
  int64_t tasks;
  int64_t step;           // of the window, from an output's column to the next
  int64_t spread, first;  // columns from one of x to the next, and before the first of them
  int64_t columns;        // of a row in the ring
  int64_t most;           // vectors of a block
  int64_t window, whole,
      own;  // the weight's columns and rows; what all threads read, what each has for itself

  explicit DepthwisePlan(const Depthwise& op)
      : vectors(ceil_div(op.channels, kLanes)),
        blocks(ceil_div(vectors, kBlockVectors)),
        parts(smaller(8, ceil_div(larger(op.input[0], op.output[0]), kPartRows))),
        tasks(op.n * parts * blocks),
        step(op.transposed ? 1 : op.stride),
        spread(op.transposed ? op.stride : 1),
        first(op.transposed ? op.kernel - 1 - op.padding[1] : op.padding[1]),
        columns(larger((op.output[1] - 1) * step + op.kernel, first + (op.input[1] - 1) * spread + 1)),
        most(ceil_div(vectors, blocks)),
        window(op.kernel * op.kernel),
        whole(window * vectors * kLanes),
        own((op.kernel * columns + 1) * most * kLanes) {}
  int64_t floats(int threads) const { return whole + threads * own; }

 private:
  static constexpr int64_t kBlockVectors = 16, kPartRows = 14;
};

// One task.
struct DepthwiseTask {
  int64_t sample, part, first, last;  // vectors of channels from `first`
  int64_t channel, channels;          // those of them that there are

  DepthwiseTask(const Depthwise& op, const DepthwisePlan& plan, int64_t task)
      : sample(task / (plan.parts * plan.blocks)),
        part(task / plan.blocks % plan.parts),
        first(plan.vectors * (task % plan.blocks) / plan.blocks),
        last(plan.vectors * (task % plan.blocks + 1) / plan.blocks),
        channel(first * kLanes),
        channels(smaller(op.channels, last * kLanes) - channel) {}
  int64_t width() const { return (last - first) * kLanes; }
};

// The weight as [row][column][channel], times the factor. In the gradient for an input columns run backwards.
template <class T>
static void pack_windows(const Depthwise& op, const DepthwisePlan& plan, int64_t tap, float* u) {
  const int64_t row = tap / op.kernel, column = tap % op.kernel;
  const T* const from = static_cast<const T*>(op.weight) + row * op.weight_row +
                        (op.transposed ? op.kernel - 1 - column : column) * op.weight_column;
  float* const to = u + tap * plan.vectors * kLanes;
  for (int64_t c = 0; c < op.channels; ++c)
    to[c] = Element<T>::load(from[c * op.weight_channel]) * (op.factor ? op.factor[c] : 1.0f);
  for (int64_t c = op.channels; c < plan.vectors * kLanes; ++c) to[c] = 0;
}

// A row of the window: where x's row lies in the ring, and the weight's.
struct WindowRow {
  const float *x, *u;
};

// R outputs next to each other of one vector of channels, of which `count` are there unless kWhole.
template <class T, int K, int S, int R, bool kWhole>
static void depthwise_tile(const Depthwise& op, const WindowRow* rows, int64_t used, int64_t x_step,
                           int64_t u_step, int64_t at, int64_t channel, int64_t count) {
  const T* const residual = static_cast<const T*>(op.residual);
  T* const y = static_cast<T*>(op.y);
  // While the products are made, what they go to comes near.
  for (int r = 0; r < R; ++r) __builtin_prefetch(y + at + r * op.channels, 1);
  Vector sum[R] = {};
  for (int64_t i = 0; i < used; ++i) {
    Vector u[K];
    for (int k = 0; k < K; ++k) u[k] = load_vector(rows[i].u + k * u_step);
#pragma GCC unroll 32
    for (int column = 0; column < (R - 1) * S + K; ++column) {
      const Vector x = load_vector(rows[i].x + column * x_step);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const int k = column - r * S;
        if (k >= 0 && k < K) sum[r] += x * u[k];
      }
    }
  }
  const Vector lower = Vector{} + op.lower, upper = Vector{} + op.upper;
  const Vector scale = op.scale ? load_lanes<kWhole>(op.scale + channel, count) : Vector{};
  const Vector shift = op.shift ? load_lanes<kWhole>(op.shift + channel, count) : Vector{};
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const int64_t place = at + r * op.channels;
    Vector v = sum[r];
    if (op.scale) v *= scale;
    if (op.shift) v += shift;
    if (residual) v += load_lanes<kWhole>(residual + place, count);
    v = v < lower ? lower : v;  // comparisons with NaN are false, so NaN stays
    v = v > upper ? upper : v;
    store_lanes<kWhole>(y + place, v, count);
  }
}

// `made` outputs next to each other of all of a task's channels, at most R.
template <class T, int K, int S, int R = kMostColumns>
static void depthwise_columns(int64_t made, const Depthwise& op, const DepthwisePlan& plan,
                              const DepthwiseTask& task, const WindowRow* rows, int64_t used,
                              int64_t at) {
  if constexpr (R > 1) {
    if (made < R) return depthwise_columns<T, K, S, R - 1>(made, op, plan, task, rows, used, at);
  }
  const int64_t u_step = plan.vectors * kLanes;
  WindowRow here[K];
  for (int64_t i = 0; i < used; ++i) here[i] = rows[i];
  for (int64_t c = 0; c < task.channels; c += kLanes) {
    const auto run = task.channels - c >= kLanes ? depthwise_tile<T, K, S, R, true>
                                                 : depthwise_tile<T, K, S, R, false>;
    run(op, here, used, task.width(), u_step, at + c, task.channel + c, task.channels - c);
    for (int64_t i = 0; i < used; ++i) here[i].x += kLanes, here[i].u += kLanes;
  }
}

// The rows of x that a row of outputs reads, ascending, and the weight's for each; gives how many.
template <int K>
static int64_t rows_of(const Depthwise& op, int64_t row, int64_t* from, int64_t* taps) {
  int64_t used = 0;
  for (int64_t i = 0; i < K; ++i) {
    const int64_t tap = op.transposed ? K - 1 - i : i;
    int64_t x = op.transposed ? row + op.padding[0] - tap : row * op.stride - op.padding[0] + tap;
    if (op.transposed && x % op.stride != 0) continue;
    if (op.transposed) x /= op.stride;
    if (x < 0 || x >= op.input[0]) continue;
    from[used] = x, taps[used++] = tap;
  }
  return used;
}

// A row of outputs from rows of x in the ring, `used` of them.
template <class T, int K, int S>
static void depthwise_row(const Depthwise& op, const DepthwisePlan& plan, const DepthwiseTask& task,
                          WindowRow* rows, int64_t used, int64_t row) {
  const int64_t columns = op.output[1], pieces = ceil_div(columns, kMostColumns);
  int64_t at = (task.sample * op.output[0] + row) * columns * op.channels + task.channel;
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t made = columns * (piece + 1) / pieces - columns * piece / pieces;
    depthwise_columns<T, K, S>(made, op, plan, task, rows, used, at);
    at += made * op.channels;
    for (int64_t i = 0; i < used; ++i) rows[i].x += made * S * task.width();
  }
}

// A task. load(row, to) brings a row of x to the ring, in ascending order, and every row that is the part's own.
template <class T, int K, int S, class Load>
static void depthwise_task(const Depthwise& op, const DepthwisePlan& plan, const DepthwiseTask& task,
                           float* ring, Load load) {
  const int64_t width = task.width(), row_floats = plan.columns * width;
  const auto bring = [&](int64_t row) { load(row, ring + row % K * row_floats + plan.first * width); };
  int64_t next = op.input[0] * task.part / plan.parts, from[K], taps[K];
  bool begun = false;
  const int64_t last = op.output[0] * (task.part + 1) / plan.parts;
  for (int64_t row = op.output[0] * task.part / plan.parts; row < last; ++row) {
    const int64_t used = rows_of<K>(op, row, from, taps);
    if (used > 0) {
      if (!begun) next = smaller(next, from[0]);
      begun = true;
      for (; next <= from[used - 1]; ++next) bring(next);
    }
    WindowRow rows[K];
    for (int64_t i = 0; i < used; ++i)
      rows[i] = {ring + from[i] % K * row_floats,
                 op.scratch + task.channel + taps[i] * K * plan.vectors * kLanes};
    depthwise_row<T, K, S>(op, plan, task, rows, used, row);
  }
  for (; next < op.input[0] * (task.part + 1) / plan.parts; ++next) bring(next);
}

// The convolution; run(task, mine) does a task, with memory of the thread's own.
template <class T, class Run>
static void each_task(const Depthwise& op, const DepthwisePlan& plan, int threads, Run run) {
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t tap = 0; tap < plan.window; ++tap) pack_windows<T>(op, plan, tap, op.scratch);
#pragma omp for schedule(static)
    for (int64_t share = 0; share < threads; ++share) {
      float* const mine = op.scratch + plan.whole + share * plan.own;
      int64_t width = 0;
      for (int64_t i = plan.tasks * share / threads; i < plan.tasks * (share + 1) / threads; ++i) {
        const DepthwiseTask task(op, plan, i);
        if (task.width() != width) {  // zeros lie elsewhere
          for (int64_t j = 0; j < plan.own; ++j) mine[j] = 0;
          width = task.width();
        }
        run(task, mine);
      }
    }
  }
}

// By kernel and step: body(kernel, step), both known when this is compiled.
template <class Body>
static void by_window(const Depthwise& op, const DepthwisePlan& plan, Body body) {
  const bool two = plan.step == 2;
  switch (op.kernel) {
    case 3: return two ? body(Number<3>{}, Number<2>{}) : body(Number<3>{}, Number<1>{});
    case 5: return two ? body(Number<5>{}, Number<2>{}) : body(Number<5>{}, Number<1>{});
    case 7: return two ? body(Number<7>{}, Number<2>{}) : body(Number<7>{}, Number<1>{});
  }
}

static int64_t depthwise_floats(const Depthwise& op, int threads) {
  return DepthwisePlan(op).floats(threads);
}

// A row of x to the ring.
template <class T>
static void copy_row(const Depthwise& op, const DepthwisePlan& plan, const DepthwiseTask& task,
                     int64_t row, float* to) {
  const T* from = static_cast<const T*>(op.x) +
                  (task.sample * op.input[0] + row) * op.input[1] * op.channels + task.channel;
  for (int64_t column = 0; column < op.input[1]; ++column) {
    int64_t c = 0;
    for (; c + kLanes <= task.channels; c += kLanes) store_vector(to + c, load_vector(from + c));
    if (c < task.channels) store_vector(to + c, load_lanes<false>(from + c, task.channels - c));
    from += op.channels, to += plan.spread * task.width();
  }
}

template <class T>
static void depthwise_typed(const Depthwise& op, int threads) {
  const DepthwisePlan plan(op);
  by_window(op, plan, [&](auto kernel, auto step) {
    constexpr int K = decltype(kernel)::value, S = decltype(step)::value;
    each_task<T>(op, plan, threads, [&](const DepthwiseTask& task, float* mine) {
      depthwise_task<T, K, S>(op, plan, task, mine,
                              [&](int64_t row, float* to) { copy_row<T>(op, plan, task, row, to); });
    });
  });
}

// A vector of channels, of which `count` are there unless kWhole, of R columns of a gradient: what passes
// goes to `to`, and a * g is added to acc.
template <class T, int R, bool kWhole, bool kGuided, bool kMeasured>
static inline void mask_columns(const DepthwiseBackward& op, const Clamp<T>& clamp, int64_t from,
                                float* to, int64_t to_step, float* acc, int64_t count) {
  const T *const as = static_cast<const T*>(op.a), *const gs = static_cast<const T*>(op.product.x);
  Vector sum = kMeasured ? load_vector(acc) : Vector{};
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const int64_t place = from + r * op.product.channels;
    const Vector a = load_lanes<kWhole>(as + place, count);
    const Vector g = load_lanes<kWhole>(gs + place, count);
    store_vector(to + r * to_step, clamp.template passing<kGuided>(a, g));
    if (kMeasured) sum += a * g;
  }
  if (kMeasured) store_vector(acc, sum);
}

// A row of it, of which `first` to `last` are measured in acc, unless it belongs to the neighbouring part.
template <class T, bool kGuided, bool kMeasured>
static void mask_row(const DepthwiseBackward& op, const DepthwisePlan& plan, const DepthwiseTask& task,
                     const Clamp<T>& clamp, int64_t row, int64_t first, int64_t last, float* to,
                     float* acc) {
  const Depthwise& product = op.product;
  const int64_t to_step = plan.spread * task.width();
  constexpr int kTogether = 4;
  int64_t from = ((task.sample * product.input[0] + row) * product.input[1] + first) * product.channels +
                 task.channel;
  to += first * to_step;
  for (int64_t column = first; column < last;) {
    const bool four = last - column >= kTogether;
    for (int64_t c = 0; c < task.channels; c += kLanes) {
      const int64_t count = task.channels - c;
      const auto run = count >= kLanes ? (four ? mask_columns<T, kTogether, true, kGuided, kMeasured>
                                               : mask_columns<T, 1, true, kGuided, kMeasured>)
                                       : (four ? mask_columns<T, kTogether, false, kGuided, kMeasured>
                                               : mask_columns<T, 1, false, kGuided, kMeasured>);
      run(op, clamp, from + c, to + c, to_step, acc + c, count);
    }
    const int64_t done = four ? kTogether : 1;
    column += done, from += done * product.channels, to += done * to_step;
  }
}

// What one part of a sample adds to the attribution: floats of some rows at a time, then doubles.
struct PartSum {
  float* acc;
  double* sum;
  int64_t channels;

  void begin() const {
    for (int64_t c = 0; c < channels; ++c) acc[c] = 0, sum[c] = 0;
  }
  void flush() const {
    for (int64_t c = 0; c < channels; ++c) sum[c] += acc[c], acc[c] = 0;
  }
};

// The gradient for what a depthwise convolution read, straight from that for the output of its stage.
template <class T, bool kGuided, bool kMeasured>
static void depthwise_backward_typed(const DepthwiseBackward& op, int threads) {
  const Depthwise& product = op.product;
  const DepthwisePlan plan(product);
  const Clamp<T> clamp(op.lower, op.upper);
  const int64_t channels = product.channels, rows = product.input[0], columns = product.input[1];
  const int64_t together = larger(1, kRows / columns);  // rows whose floats are added up as such
  double* const partial = kMeasured ? new double[product.n * plan.parts * channels] : nullptr;
  by_window(product, plan, [&](auto kernel, auto step) {
    constexpr int K = decltype(kernel)::value, S = decltype(step)::value;
    each_task<T>(product, plan, threads, [&](const DepthwiseTask& task, float* mine) {
      const int64_t first = rows * task.part / plan.parts, last = rows * (task.part + 1) / plan.parts;
      float* const acc = mine + plan.own - plan.most * kLanes;
      const PartSum part = {acc,
                            partial + (task.sample * plan.parts + task.part) * channels + task.channel,
                            task.channels};
      if (kMeasured) part.begin();
      depthwise_task<T, K, S>(product, plan, task, mine, [&](int64_t row, float* to) {
        if (!kMeasured || row < first || row >= last)  // it may belong to the part beside
          return mask_row<T, kGuided, false>(op, plan, task, clamp, row, 0, columns, to, acc);
        for (int64_t begin = 0; begin < columns; begin += kRows) {
          const int64_t end = smaller(columns, begin + kRows);
          mask_row<T, kGuided, true>(op, plan, task, clamp, row, begin, end, to, acc);
          if (end < columns) part.flush();
        }
        if ((row - first + 1) % together == 0 || row + 1 == last) part.flush();
      });
    });
  });
  if (!kMeasured) return;
  add_parts(partial, product.n, plan.parts, channels, op.s);
  delete[] partial;
}

template <class T>
static void depthwise_backward_ruled(const DepthwiseBackward& op, int threads) {
  const bool measured = op.s != nullptr;
  const auto run = op.guided  ? (measured ? depthwise_backward_typed<T, true, true>
                                          : depthwise_backward_typed<T, true, false>)
                   : measured ? depthwise_backward_typed<T, false, true>
                              : depthwise_backward_typed<T, false, false>;
  run(op, threads);
}
