// The gradient for what a 1x1 convolution read, straight from that for the output of its stage: where the gradient
// passes the clamp, and the attribution, are found while positions are brought to the products. Included by
// kernels.inl.

// How positions are cut for the sums, by shape alone: a sample in slots, each summed by one thread.
struct Slots {
  int64_t positions, per_sample, size, count;

  explicit Slots(const Pointwise& op)
      : positions(op.positions),
        per_sample(smaller(8, ceil_div(op.positions, 2 * kRows))),
        size(ceil_div(op.positions, per_sample)),
        count(op.n * per_sample) {}
  int64_t start(int64_t slot) const {
    return slot / per_sample * positions + smaller(positions, slot % per_sample * size);
  }
  int64_t of(int64_t position) const {
    return position / positions * per_sample + position % positions / size;
  }
};

// Positions of one group of kRows within a slot: g1 to the products, and what they add to the attribution to acc.
template <class T, bool kGuided, bool kSplit, Attribute kWhat>
static void mask_rows(const PointwiseBackward& op, const PointwisePlan<T>& plan, int64_t first,
                      int64_t last, float* to, float* acc) {
  const int64_t channels = op.product.channels_in;
  const T *const as = static_cast<const T*>(op.a), *const gs = static_cast<const T*>(op.product.x);
  const T* const residual = static_cast<const T*>(op.residual);
  T* const g1 = static_cast<T*>(op.g1);
  const Clamp<T> clamp(op.lower, op.upper);
  const auto mask = [&](auto whole, int64_t at, int64_t c, float* place) {
    constexpr bool kWhole = decltype(whole)::value;
    const int64_t count = channels - c;
    const Vector a = load_lanes<kWhole>(as + at + c, count);
    const Vector g = load_lanes<kWhole>(gs + at + c, count);
    const Vector inside = clamp.template passing<kGuided>(a, g);
    if (kSplit) store_lanes<kWhole>(g1 + at + c, inside, count);
    Operands<T>::store(place, inside);
    if (kWhat == kNone) return;
    Vector flow = a * g;
    if (kWhat == kBranch) flow = (a - load_lanes<kWhole>(residual + at + c, count)) * inside;
    store_vector(acc + c, load_vector(acc + c) + flow);
  };
  for (int64_t i = first; i < last; ++i, to += kLanes) {
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes)
      mask(Is<true>{}, i * channels, c, operands_of<T>(to, plan.step, c));
    if (c < channels) mask(Is<false>{}, i * channels, c, operands_of<T>(to, plan.step, c));
  }
}

template <class T, bool kGuided, bool kSplit, Attribute kWhat>
static void pointwise_backward_typed(const PointwiseBackward& op, int threads) {
  const Pointwise& product = op.product;
  const PointwisePlan<T> plan(product, true);
  const Slots slots(product);
  const int64_t channels = product.channels_in;
  double* const partial = kWhat == kNone ? nullptr : new double[slots.count * channels];
  multiply_positions(
      product, plan, threads, [&](int64_t share) { return slots.start(slots.count * share / threads); },
      [&](int64_t first, int64_t last, int64_t share, float* to) {
        float* const acc = plan.sums_of(product, share);
        for (int64_t stop = first; first < last; first = stop) {
          const int64_t slot = slots.of(first), begin = slots.start(slot);
          const int64_t group = begin + (first - begin) / kRows * kRows;
          const int64_t end = smaller(slots.start(slot + 1), group + kRows);
          stop = smaller(last, end);
          if (kWhat != kNone && first == group) {
            for (int64_t c = 0; c < plan.sums; ++c) acc[c] = 0;
          }
          mask_rows<T, kGuided, kSplit, kWhat>(op, plan, first, stop, to, acc);
          to += (stop - first) * kLanes;
          if (kWhat == kNone || stop < end) continue;  // the next block goes on
          double* const sum = partial + slot * channels;
          if (group == begin) {
            for (int64_t c = 0; c < channels; ++c) sum[c] = 0;
          }
          for (int64_t c = 0; c < channels; ++c) sum[c] += acc[c];
        }
      });
  if (kWhat == kNone) return;
  add_parts(partial, product.n, slots.per_sample, channels, op.s);
  delete[] partial;
}

template <class T, bool kGuided, bool kSplit>
static void pointwise_backward_what(const PointwiseBackward& op, int threads) {
  switch (op.attribute) {
    case kNone: return pointwise_backward_typed<T, kGuided, kSplit, kNone>(op, threads);
    case kOutput: return pointwise_backward_typed<T, kGuided, kSplit, kOutput>(op, threads);
    case kBranch: return pointwise_backward_typed<T, kGuided, kSplit, kBranch>(op, threads);
  }
}

template <class T>
static void pointwise_backward_ruled(const PointwiseBackward& op, int threads) {
  const bool split = op.g1 != nullptr;
  const auto run =
      op.guided
          ? (split ? pointwise_backward_what<T, true, true> : pointwise_backward_what<T, true, false>)
      : split ? pointwise_backward_what<T, false, true>
              : pointwise_backward_what<T, false, false>;
  run(op, threads);
}
