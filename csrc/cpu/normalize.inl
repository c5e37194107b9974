// Normalisation of each layer by its own size, all layers in one launch; included by kernels.inl.

// Magnitude of x, by which the largest of a segment is found: NaN is the largest, as in PyTorch.
template <class C>
static inline bool larger_magnitude(C x, C than) {
  return (x > than) | ((x != x) & (than == than));
}

template <class T>
static void segment_normalize_typed(const SegmentNormalize& op, int threads) {
  using E = Element<T>;
  using C = Compute<T>;
  const T* theta = static_cast<const T*>(op.theta);
  T* out = static_cast<T*>(op.out);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t l = 0; l < op.segments; ++l) {
    const int64_t start = op.offsets[l], stop = op.offsets[l + 1];
    C largest = 0;
    for (int64_t i = start; i < stop; ++i) {
      const C x = E::load(theta[i]), magnitude = x < 0 ? -x : x;
      if (larger_magnitude(magnitude, largest)) largest = magnitude;
    }
    double size = 1;
    if (largest != 0) {  // a segment of zeros stays as it is
      double total = 0;
      for (int64_t i = start; i < stop; ++i) {
        const double unit = static_cast<double>(E::load(theta[i])) / largest;
        total += op.kind == kL2 ? unit * unit : unit < 0 ? -unit : unit;
      }
      if (op.kind == kL2) size = __builtin_sqrt(total);
      if (op.kind == kMean) size = total / static_cast<double>(stop - start);
      if (op.kind == kMax && total != total) size = total;
    } else {
      largest = 1;
    }
    for (int64_t i = start; i < stop; ++i)
      out[i] = E::store(static_cast<C>(static_cast<double>(E::load(theta[i])) / largest / size));
  }
}
