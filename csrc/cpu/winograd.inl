// 3x3 convolutions by Winograd's F(2x2, 3x3): 16 products a 2x2 tile of outputs in place of 36, channels-last
// and in float; included by kernels.inl.
//
//   tile of x (4x4)  --B'dB-->  V[16]  \
//                                       M[16] = V[16] * U[16], sums over input channels  --A'MA-->  2x2 of y
//   weight (3x3)     --GgG'-->  U[16]  /
//
// Lavin and Gray 2016, Fast Algorithms for Convolutional Neural Networks. A thread takes a block of tiles
// whose V stays in its cache, and passes U by it, a panel of output channels at a time. A sum runs over the
// input channels in order, so results have the same bits however the tiles are cut into blocks.

constexpr int64_t kBlockBytes = 512 * 1024;  // of V, for a block of tiles
constexpr int64_t kSteps = 4;

// Sizes that follow from a call; all in floats where not said otherwise. Of U and V the smaller one is made
// whole, once; of the other a piece at a time.
struct WinogradPlan {
  int64_t rows, columns, tiles_down, tiles_across, tiles;  // outputs, and 2x2 tiles of them
  int64_t in_vectors, out_vectors, panels;                 // vectors and panels of channels
  bool whole_u;
  int64_t block, step;  // tiles whose V is held at once, and that pass by a panel of U at once
  int64_t u_plane, v_plane, m_plane;  // one of 16 in a panel of U, in V and in M
  int64_t whole, own;                 // what all threads read, and what each has for itself

  WinogradPlan(const Winograd& op, int threads)
      : rows(op.h + 2 * op.padding[0] - 2),
        columns(op.w + 2 * op.padding[1] - 2),
        tiles_down(ceil_div(rows, 2)),
        tiles_across(ceil_div(columns, 2)),
        tiles(op.n * tiles_down * tiles_across),
        in_vectors(ceil_div(op.channels_in, kLanes)),
        out_vectors(ceil_div(op.channels_out, kLanes)),
        panels(ceil_div(out_vectors, 2)),
        whole_u(out_vectors * kLanes <= tiles),
        block(tiles),
        step(smaller(tiles, kSteps * kMostRows)) {
    if (whole_u) {
      const int64_t fit = kBlockBytes / (16 * 4 * in_vectors * kLanes);
      const int64_t most = larger(2 * kMostRows, smaller(fit, 8 * kMostRows));
      block = step = ceil_div(ceil_div(tiles, threads), ceil_div(tiles, threads * most));
    }
    // One vector more: no two planes lie a power of two apart.
    u_plane = in_vectors * kLanes * kPanel + kLanes;
    v_plane = in_vectors * block * kLanes + kLanes;
    m_plane = step * kPanel + kLanes;
    whole = 16 * (whole_u ? u_plane * panels : v_plane);
    own = 16 * ((whole_u ? v_plane : u_plane) + m_plane);
  }
  int64_t zeros() const { return in_vectors * kLanes; }
  int64_t floats(int threads) const { return zeros() + whole + threads * own; }
  // Output channels of a panel; the last one may be one vector wide.
  int64_t width(int64_t panel) const { return smaller(2, out_vectors - 2 * panel) * kLanes; }
};

// U[16][input channel][output channel] = G g G' for one panel of output and one vector of input channels.
static void transform_weight(const Winograd& op, const WinogradPlan& plan, int64_t panel,
                             int64_t in_vector, float* u) {
  const int64_t width = plan.width(panel), plane = plan.u_plane;
  Vector taps[9][2][kLanes];  // [tap][vector of output channels][input channel]
  const int64_t out0 = panel * kPanel, in0 = in_vector * kLanes;
  const int64_t outs = smaller(width, op.channels_out - out0),
                ins = smaller(kLanes, op.channels_in - in0);
  const float* const w = op.weight + out0 * op.weight_out + in0 * op.weight_in;
  for (int64_t t = 0; t < 9; ++t) {
    for (int64_t o = 0; o < width; o += kLanes) {
      const float* from = w + (op.flipped ? 8 - t : t) * op.weight_tap + o * op.weight_out;
      load_square(from, op.weight_out, op.weight_in, outs - o, ins, taps[t][o / kLanes]);
    }
  }
  for (int64_t i = 0; i < kLanes; ++i) {
    for (int64_t o = 0; o < width; o += kLanes) {
      Vector half[4][3];
      for (int64_t x = 0; x < 3; ++x) {
        const Vector a = taps[x][o / kLanes][i], b = taps[3 + x][o / kLanes][i],
                     c = taps[6 + x][o / kLanes][i];
        half[0][x] = a;
        half[1][x] = 0.5f * (a + b + c);
        half[2][x] = 0.5f * (a - b + c);
        half[3][x] = c;
      }
      float* to = u + (in0 + i) * width + o;
      for (int64_t y = 0; y < 4; ++y) {
        const Vector a = half[y][0], b = half[y][1], c = half[y][2];
        store_vector(to + (4 * y + 0) * plane, a);
        store_vector(to + (4 * y + 1) * plane, 0.5f * (a + b + c));
        store_vector(to + (4 * y + 2) * plane, 0.5f * (a - b + c));
        store_vector(to + (4 * y + 3) * plane, c);
      }
    }
  }
}

template <bool kWhole>
static inline void transform_input_vector(const float* const (&from)[4][4], int64_t c, int64_t count,
                                          int64_t plane, float* v) {
  Vector half[4][4];
  for (int64_t x = 0; x < 4; ++x) {
    const Vector a = load_lanes<kWhole>(from[0][x] + c, count),
                 b = load_lanes<kWhole>(from[1][x] + c, count),
                 d = load_lanes<kWhole>(from[2][x] + c, count),
                 e = load_lanes<kWhole>(from[3][x] + c, count);
    half[0][x] = a - d;
    half[1][x] = b + d;
    half[2][x] = d - b;
    half[3][x] = b - e;
  }
  for (int64_t y = 0; y < 4; ++y, v += 4 * plane) {
    store_vector(v, half[y][0] - half[y][2]);
    store_vector(v + plane, half[y][1] + half[y][2]);
    store_vector(v + 2 * plane, half[y][2] - half[y][1]);
    store_vector(v + 3 * plane, half[y][1] - half[y][3]);
  }
}

// V[16][vector of channels][tile][channel of the vector] = B' d B for one tile; v is the block's, the tile
// lies at `place`.
static inline void transform_input(const Winograd& op, const WinogradPlan& plan, int64_t tile,
                                   int64_t place, const float* zeros, float* v) {
  const int64_t across = tile % plan.tiles_across, rest = tile / plan.tiles_across;
  const int64_t n = rest / plan.tiles_down;
  const int64_t y0 = 2 * (rest % plan.tiles_down) - op.padding[0], x0 = 2 * across - op.padding[1];
  const float* from[4][4];
  for (int64_t y = 0; y < 4; ++y) {
    for (int64_t x = 0; x < 4; ++x) {
      const bool inside = y0 + y >= 0 && y0 + y < op.h && x0 + x >= 0 && x0 + x < op.w;
      from[y][x] = inside ? op.x + ((n * op.h + y0 + y) * op.w + x0 + x) * op.channels_in : zeros;
    }
  }
  for (int64_t i = 0; i < plan.in_vectors; ++i) {
    const int64_t c = i * kLanes, count = op.channels_in - c;
    float* const to = v + (i * plan.block + place) * kLanes;
    if (count >= kLanes) {
      transform_input_vector<true>(from, c, count, plan.v_plane, to);
    } else {
      transform_input_vector<false>(from, c, count, plan.v_plane, to);
    }
  }
}

// M = V * U for R tiles and S vectors of output channels; all sums stay in registers.
template <int R, int S>
static void multiply(const float* v, int64_t v_step, const float* u, int64_t in_vectors, float* m) {
  Vector sum[R][S] = {};
  add_products<float>(v, v_step, u, in_vectors * kLanes, sum);
  for (int r = 0; r < R; ++r)
    for (int s = 0; s < S; ++s) store_vector(m + (r * S + s) * kLanes, sum[r][s]);
}

template <int S, int R = kMostRows>
static inline void multiply_rows(int64_t rows, const float* v, int64_t v_step, const float* u,
                                 int64_t in_vectors, float* m) {
  if (rows == R) return multiply<R, S>(v, v_step, u, in_vectors, m);
  if constexpr (R > 1) multiply_rows<S, R - 1>(rows, v, v_step, u, in_vectors, m);
}

// One vector of output channels of a tile; `place` is that of its first output, of which there are `rows`
// by `columns`.
template <bool kWhole>
static inline void transform_output_vector(const Winograd& op, const WinogradPlan& plan, int64_t place,
                                           int64_t rows, int64_t columns, int64_t channel,
                                           const float* m) {
  const int64_t count = op.channels_out - channel;
  const Vector lower = Vector{} + op.lower, upper = Vector{} + op.upper;
  const Vector scale = op.scale ? load_lanes<kWhole>(op.scale + channel, count) : Vector{};
  const Vector shift = op.shift ? load_lanes<kWhole>(op.shift + channel, count) : Vector{};
  Vector half[2][4];
  for (int64_t x = 0; x < 4; ++x, m += plan.m_plane) {
    const Vector a = load_vector(m), b = load_vector(m + 4 * plan.m_plane),
                 c = load_vector(m + 8 * plan.m_plane), d = load_vector(m + 12 * plan.m_plane);
    half[0][x] = a + b + c;
    half[1][x] = b - c - d;
  }
  for (int64_t y = 0; y < 2; ++y) {
    const Vector* h = half[y];
    const Vector both[2] = {h[0] + h[1] + h[2], h[1] - h[2] - h[3]};
    for (int64_t x = 0; x < 2; ++x) {
      if (y >= rows || x >= columns) continue;
      const int64_t at = place + (y * plan.columns + x) * op.channels_out + channel;
      Vector v = both[x];
      if (op.scale) v *= scale;
      if (op.shift) v += shift;
      if (op.residual) v += load_lanes<kWhole>(op.residual + at, count);
      v = v < lower ? lower : v;  // comparisons with NaN are false, so NaN stays
      v = v > upper ? upper : v;
      store_lanes<kWhole>(op.y + at, v, count);
    }
  }
}

// y = A' M A for one tile and one panel of output channels, and what is made of y on the way.
static inline void transform_output(const Winograd& op, const WinogradPlan& plan, int64_t tile,
                                    int64_t channel, int64_t width, const float* m) {
  const int64_t across = tile % plan.tiles_across, rest = tile / plan.tiles_across;
  const int64_t n = rest / plan.tiles_down, down = rest % plan.tiles_down;
  const int64_t rows = smaller(2, plan.rows - 2 * down), columns = smaller(2, plan.columns - 2 * across);
  const int64_t place = ((n * plan.rows + 2 * down) * plan.columns + 2 * across) * op.channels_out;
  for (int64_t o = 0; o < width; o += kLanes) {
    if (op.channels_out - channel - o >= kLanes) {
      transform_output_vector<true>(op, plan, place, rows, columns, channel + o, m + o);
    } else {
      transform_output_vector<false>(op, plan, place, rows, columns, channel + o, m + o);
    }
  }
}

// A panel of y for the tiles from `start`; v is that of the first of them.
template <int S>
static void winograd_panel(const Winograd& op, const WinogradPlan& plan, int64_t start, int64_t count,
                           int64_t channel, const float* v, const float* u, float* m) {
  const int64_t parts = ceil_div(count, kMostRows), v_step = plan.block * kLanes;
  for (int64_t plane = 0; plane < 16; ++plane) {
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = count * part / parts, last = count * (part + 1) / parts;
      multiply_rows<S>(last - first, v + plane * plan.v_plane + first * kLanes, v_step,
                       u + plane * plan.u_plane, plan.in_vectors,
                       m + plane * plan.m_plane + first * S * kLanes);
    }
  }
  for (int64_t i = 0; i < count; ++i)
    transform_output(op, plan, start + i, channel, S * kLanes, m + i * S * kLanes);
}

static void winograd_panel(const Winograd& op, const WinogradPlan& plan, int64_t start, int64_t count,
                           int64_t panel, const float* v, const float* u, float* m) {
  if (plan.width(panel) == kPanel) {
    winograd_panel<2>(op, plan, start, count, panel * kPanel, v, u, m);
  } else {
    winograd_panel<1>(op, plan, start, count, panel * kPanel, v, u, m);
  }
}

static int64_t winograd_floats(const Winograd& op, int threads) {
  return WinogradPlan(op, threads).floats(threads);
}

static void winograd(const Winograd& op, int threads) {
  const WinogradPlan plan(op, threads);
  float* const zeros = op.scratch;
  float* const whole = zeros + plan.zeros();
  for (int64_t i = 0; i < plan.zeros(); ++i) zeros[i] = 0;
#pragma omp parallel num_threads(threads)
  {
    if (plan.whole_u) {
#pragma omp for schedule(static)
      for (int64_t piece = 0; piece < plan.panels * plan.in_vectors; ++piece) {
        const int64_t panel = piece / plan.in_vectors;
        transform_weight(op, plan, panel, piece % plan.in_vectors, whole + panel * 16 * plan.u_plane);
      }
    } else {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < plan.tiles; ++i) transform_input(op, plan, i, i, zeros, whole);
    }
#pragma omp for schedule(static)
    for (int64_t share = 0; share < threads; ++share) {
      float* const mine = whole + plan.whole + share * plan.own;
      float* const m = mine + plan.own - 16 * plan.m_plane;
      if (plan.whole_u) {
        const int64_t end = plan.tiles * (share + 1) / threads;
        for (int64_t start = plan.tiles * share / threads; start < end; start += plan.block) {
          const int64_t count = smaller(plan.block, end - start);
          for (int64_t i = 0; i < count; ++i) transform_input(op, plan, start + i, i, zeros, mine);
          for (int64_t panel = 0; panel < plan.panels; ++panel)
            winograd_panel(op, plan, start, count, panel, mine, whole + panel * 16 * plan.u_plane, m);
        }
      } else {
        const int64_t end = plan.panels * (share + 1) / threads;
        for (int64_t panel = plan.panels * share / threads; panel < end; ++panel) {
          for (int64_t i = 0; i < plan.in_vectors; ++i) transform_weight(op, plan, panel, i, mine);
          for (int64_t start = 0; start < plan.tiles; start += plan.step) {
            const int64_t count = smaller(plan.step, plan.tiles - start);
            winograd_panel(op, plan, start, count, panel, whole + start * kLanes, mine, m);
          }
        }
      }
    }
  }
}
