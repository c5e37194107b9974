// The four element types: how each is read into its compute type and written back.
//
// Included once per instruction set, inside that set's own namespace, so that the linker can never
// replace one set's inline function by another's.

template <class T>
struct Element;

template <>
struct Element<float> {
  using Compute = float;
  static inline float load(float x) { return x; }
  static inline float store(float x) { return x; }
};

template <>
struct Element<double> {
  using Compute = double;
  static inline double load(double x) { return x; }
  static inline double store(double x) { return x; }
};

static inline float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

static inline uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

struct BFloat16 {
  uint16_t bits;
};

template <>
struct Element<BFloat16> {
  using Compute = float;
  static inline float load(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
  static inline BFloat16 store(float x) {
    // Rounds to nearest, ties to even; a NaN would round to infinity and gets a quiet bit instead.
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t nan = (bits >> 16) | 0x40u;
    return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
  }
};

// a or b, without a branch: the compiler would move arithmetic into one, and not vectorise the loop.
static inline uint32_t either(bool choice, uint32_t a, uint32_t b) {
  const uint32_t mask = 0u - static_cast<uint32_t>(choice);
  return (a & mask) | (b & ~mask);
}

struct Half {
  uint16_t bits;
};

template <>
struct Element<Half> {
  using Compute = float;
  static inline float load(Half h) {
    const uint32_t magnitude = static_cast<uint32_t>(h.bits & 0x7fffu) << 13;
    const uint32_t normal = magnitude + 0x38000000u;  // the exponent is rebiased by 112
    // Subnormal numbers: given the least exponent of a normal one, they are too large by 2^-14. (A
    // product with 2^112 would be shorter, but reads as zero where the processor flushes subnormals.)
    const uint32_t small = bits_of(float_of(magnitude + 0x38800000u) - float_of(0x38800000u));
    const uint32_t special = magnitude | 0x7f800000u;  // infinity and NaN
    const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000u) << 16;
    const uint32_t finite = either(magnitude < 0x00800000u, small, normal);
    return float_of(sign | either(magnitude >= 0x0f800000u, special, finite));
  }
  static inline Half store(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Normal results: rebias the exponent and round to nearest even; a carry moves it up rightly.
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Subnormal results: adding 0.5 puts the wanted bits at the bottom of the mantissa, rounded.
    const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t large = either(magnitude > 0x7f800000u, 0x7e00u, 0x7c00u);  // NaN, infinity
    const uint32_t finite = either(magnitude < 0x38800000u, small, normal);
    return {static_cast<uint16_t>(sign | either(magnitude >= 0x477ff000u, large, finite))};
  }
};
