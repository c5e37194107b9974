// Vectors of floats, as wide as the instruction set has them, which are floats or bfloat16 in memory, and what
// convolutions do with them; included by kernels.inl.

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16, kMostRows = 14;  // 28 sums, 2 vectors of U and a value of V: 31 registers
#elif defined(__AVX__)
constexpr int64_t kLanes = 8, kMostRows = 6;
#else
constexpr int64_t kLanes = 4, kMostRows = 6;
#endif
constexpr int64_t kPanel = 2 * kLanes;  // output channels at a time
typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfWords __attribute__((vector_size(2 * kLanes)));

static inline Vector load_vector(const float* from) {
  Vector v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

static inline void store_vector(float* to, Vector v) { __builtin_memcpy(to, &v, sizeof v); }

static inline Vector widened(HalfWords bits) {
  const Words wide = __builtin_convertvector(bits, Words) << 16;
  Vector v;
  __builtin_memcpy(&v, &wide, sizeof v);
  return v;
}

// Each lane rounded to a bfloat16, in the lower half of its word; see Element<BFloat16>::store.
static inline Words rounded(Vector v) {
  Words bits;
  __builtin_memcpy(&bits, &v, sizeof v);
  const Words nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, nan = (bits >> 16) | 0x40u;
  return (bits & 0x7fffffffu) > 0x7f800000u ? nan : nearest;
}

static inline Vector load_vector(const BFloat16* from) {
  HalfWords bits;
  __builtin_memcpy(&bits, from, sizeof bits);
  return widened(bits);
}

static inline HalfWords narrowed(Vector v) {
#if defined(__AVX512BF16__)
  return (HalfWords)_mm512_cvtneps_pbh((__m512)v);  // but subnormal lanes become zero
#else
  return __builtin_convertvector(rounded(v), HalfWords);
#endif
}

static inline void store_vector(BFloat16* to, Vector v) {
  const HalfWords bits = narrowed(v);
  __builtin_memcpy(to, &bits, sizeof bits);
}

// What a loop's body is told at compile time.
template <bool kValue>
struct Is {
  static constexpr bool value = kValue;
};

template <int kValue>
struct Number {
  static constexpr int value = kValue;
};

#if defined(__AVX512F__)
static inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>((1u << larger(0, count)) - 1);
}
#endif

// The first `count` lanes; the others are zero, or left alone. Loops tell whole vectors apart (kWhole), so
// that nothing is decided within them.
template <bool kWhole>
static inline Vector load_lanes(const float* from, int64_t count) {
  if (kWhole) return load_vector(from);
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(first_lanes(count), from);
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
  _mm512_mask_storeu_ps(to, first_lanes(count), v);
#else
  for (int64_t i = 0; i < count; ++i) to[i] = v[i];
#endif
}

template <bool kWhole>
static inline Vector load_lanes(const BFloat16* from, int64_t count) {
  if (kWhole) return load_vector(from);
#if defined(__AVX512F__)
  return widened((HalfWords)_mm256_maskz_loadu_epi16(first_lanes(count), from));
#else
  Vector v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = Element<BFloat16>::load(from[i]);
  return v;
#endif
}

template <bool kWhole>
static inline void store_lanes(BFloat16* to, Vector v, int64_t count) {
  if (kWhole) return store_vector(to, v);
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(to, first_lanes(count), (__m256i)narrowed(v));
#else
  for (int64_t i = 0; i < count; ++i) to[i] = Element<BFloat16>::store(v[i]);
#endif
}

// Where a clamp of elements of type T passes gradients; see stored_bound().
template <class T>
struct Clamp {
  Vector lower, upper;

  Clamp(double lower, double upper)
      : lower(Vector{} + stored_bound<T>(lower, -__builtin_inf())),
        upper(Vector{} + stored_bound<T>(upper, __builtin_inf())) {}

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
template <class T>
static inline void load_square(const T* from, int64_t step_out, int64_t step_in, int64_t outs,
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
        to[i][j] = Element<T>::load(from[i * step_in + j * step_out]);
    }
  }
}

// How operands of products lie in memory: elements are floats, each in a room of its own, but two bfloat16 share
// one where the processor multiplies and adds two at once. (It reads subnormal ones as zero.)
template <class T>
struct Operands {
  static constexpr int64_t kShare = 1;
  // kLanes elements; a row of as many channels, of which `rows` has one vector each.
  static inline void store(float* to, Vector v) { store_vector(to, v); }
  static inline void store_row(float* to, const Vector* rows) { store_vector(to, rows[0]); }
  static inline Vector add(Vector sum, const float* x, Vector u) { return sum + *x * u; }
  // A vector of rooms from memory; beyond `count` elements they are zero.
  static inline void copy(const T* from, float* to, int64_t count) {
    store_vector(to, count >= kLanes ? load_vector(from) : load_lanes<false>(from, count));
  }
};

#if defined(__AVX512BF16__)
template <>
struct Operands<BFloat16> {
  static constexpr int64_t kShare = 2;
  static inline void store(float* to, Vector v) { store_vector(reinterpret_cast<BFloat16*>(to), v); }
  static inline void store_row(float* to, const Vector* rows) {
    const Words pairs = __builtin_convertvector(narrowed(rows[0]), Words) |
                        __builtin_convertvector(narrowed(rows[1]), Words) << 16;
    __builtin_memcpy(to, &pairs, sizeof pairs);
  }
  static inline Vector add(Vector sum, const float* x, Vector u) {
    int32_t pair;
    __builtin_memcpy(&pair, x, sizeof pair);
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)u, (__m512bh)_mm512_set1_epi32(pair));
  }
  static inline void copy(const BFloat16* from, float* to, int64_t count) {
    const int64_t there = smaller(2 * kLanes, count);
    const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << there) - 1);
    _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(mask, from));
  }
};
#endif

// Channels in a vector of rooms, and where a group of kLanes of them begins, of vectors that lie `step` apart.
template <class T>
constexpr int64_t kVector = kLanes * Operands<T>::kShare;

template <class T>
static inline float* operands_of(float* at, int64_t step, int64_t channel) {
  return at + channel / kVector<T> * step + channel % kVector<T> / Operands<T>::kShare;
}

// sum[r][s] += the sum over `rooms` of x[r] * u[s], in order: R rows of x by S vectors of a packed matrix. A
// vector of rooms of x lies `step` after the one before, and the vectors of two rows lie next to each other.
template <class T, int R, int S>
static inline __attribute__((always_inline)) void add_products(const float* x, int64_t step,
                                                               const float* u, int64_t rooms,
                                                               Vector (&sum)[R][S]) {
  for (int64_t i = 0; i < rooms; i += kLanes, x += step) {
    const int64_t lanes = smaller(kLanes, rooms - i);
#pragma GCC unroll 2
    for (int64_t lane = 0; lane < lanes; ++lane, u += S * kLanes) {
      Vector b[S];
      for (int s = 0; s < S; ++s) b[s] = load_vector(u + s * kLanes);
      for (int r = 0; r < R; ++r)
        for (int s = 0; s < S; ++s) sum[r][s] = Operands<T>::add(sum[r][s], x + r * kLanes + lane, b[s]);
    }
  }
}
