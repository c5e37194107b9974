// Vectors of floats, as wide as the instruction set has them, and what convolutions do with them; included by
// kernels.inl.

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16, kMostRows = 14;  // 28 sums, 2 vectors of U and a value of V: 31 registers
#elif defined(__AVX__)
constexpr int64_t kLanes = 8, kMostRows = 6;
#else
constexpr int64_t kLanes = 4, kMostRows = 6;
#endif
constexpr int64_t kPanel = 2 * kLanes;  // output channels at a time
typedef float Vector __attribute__((vector_size(4 * kLanes)));

static inline Vector load_vector(const float* from) {
  Vector v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

static inline void store_vector(float* to, Vector v) { __builtin_memcpy(to, &v, sizeof v); }

// What a loop's body is told at compile time.
template <bool kValue>
struct Is {
  static constexpr bool value = kValue;
};

template <int kValue>
struct Number {
  static constexpr int value = kValue;
};

// The first `count` lanes; the others are zero, or left alone. Loops tell whole vectors apart (kWhole), so
// that nothing is decided within them.
template <bool kWhole>
static inline Vector load_lanes(const float* from, int64_t count) {
  if (kWhole) return load_vector(from);
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << larger(0, count)) - 1), from);
#else
  Vector v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = from[i];
  return v;
#endif
}

template <bool kWhole>
static inline void store_lanes(float* to, Vector v, int64_t count) {
  if (kWhole) return store_vector(to, v);
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << larger(0, count)) - 1), v);
#else
  for (int64_t i = 0; i < count; ++i) to[i] = v[i];
#endif
}

// Where a clamp passes gradients; see stored_bound().
struct Clamp {
  Vector lower, upper;

  Clamp(double lower, double upper)
      : lower(Vector{} + stored_bound<float>(lower, -__builtin_inf())),
        upper(Vector{} + stored_bound<float>(upper, __builtin_inf())) {}

  // g, and zero where a was clamped; under the guided rule where g is not positive, too.
  template <bool kGuided>
  Vector passing(Vector a, Vector g) const {
    const Vector zero = {};
    Vector inside = a <= lower ? zero : g;  // comparisons with NaN are false, so NaN passes
    inside = a >= upper ? zero : inside;
    return kGuided ? (g > zero ? inside : zero) : inside;
  }
};

// Exchanges the rows and columns of a square of vectors: blocks of half the size, then of a quarter, ...
static inline void transpose(Vector* rows) {
  typedef int Lanes __attribute__((vector_size(4 * kLanes)));
  for (int64_t half = kLanes / 2; half >= 1; half /= 2) {
    Lanes low = {}, high = {};
    for (int64_t i = 0; i < kLanes; ++i) {
      low[i] = static_cast<int>(i & half ? i - half + kLanes : i);
      high[i] = static_cast<int>(i & half ? i + kLanes : i + half);
    }
    for (int64_t i = 0; i < kLanes; ++i) {
      if (i & half) continue;
      const Vector a = rows[i], b = rows[i + half];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + half] = __builtin_shuffle(a, b, high);
    }
  }
}

// For each of kLanes input channels a vector of output channels, from a weight whose element (o, i) lies at
// o * step_out + i * step_in. What lies beyond `outs` output and `ins` input channels is zero.
static inline void load_square(const float* from, int64_t step_out, int64_t step_in, int64_t outs,
                               int64_t ins, Vector* to) {
  if (step_in == 1 && ins >= kLanes && outs >= kLanes) {
    Vector square[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) square[i] = load_vector(from + i * step_out);
    transpose(square);
    for (int64_t i = 0; i < kLanes; ++i) to[i] = square[i];
  } else if (step_out == 1 && ins >= kLanes && outs >= kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) to[i] = load_vector(from + i * step_in);
  } else {
    for (int64_t i = 0; i < kLanes; ++i) {
      to[i] = Vector{};
      for (int64_t j = 0; i < ins && j < smaller(kLanes, outs); ++j)
        to[i][j] = from[i * step_in + j * step_out];
    }
  }
}

// sum[r][s] += the sum over `channels` of x[r] * u[s], in order: R rows of x by S vectors of a packed matrix. A
// vector of channels of x lies `step` after the one before, and the vectors of two rows lie next to each other.
template <int R, int S>
static inline __attribute__((always_inline)) void add_products(const float* x, int64_t step,
                                                               const float* u, int64_t channels,
                                                               Vector (&sum)[R][S]) {
  for (int64_t i = 0; i < channels; i += kLanes, x += step) {
    const int64_t lanes = smaller(kLanes, channels - i);
#pragma GCC unroll 2
    for (int64_t lane = 0; lane < lanes; ++lane, u += S * kLanes) {
      Vector b[S];
      for (int s = 0; s < S; ++s) b[s] = load_vector(u + s * kLanes);
      for (int r = 0; r < R; ++r)
        for (int s = 0; s < S; ++s) sum[r][s] += x[r * kLanes + lane] * b[s];
    }
  }
}
