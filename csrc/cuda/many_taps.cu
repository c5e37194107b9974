#include "launch.cuh"
#include "many_taps.cuh"

namespace attrfast::cuda {

void many_taps(const std::vector<Tap>& taps, bool absolute, const Queue& queue) {
  TapTable table = {};
  int64_t items = 0;
  int shared = 0;
  const auto launch = [&](const Tap& last) {
    if (table.count == 0) return;
    run({"many_taps, the last", last.dtype, last.shape}, queue, many_taps_kernel, items,
        shared + static_cast<int>(sizeof(TapHeader)), table, items, absolute);
    table.count = 0;
    items = 0;
    shared = 0;
  };
  for (const Tap& tap : taps) {
    check_sizes({"many_taps", tap.dtype, tap.shape});
    if (empty(tap.shape)) continue;
    const int element = element_bytes(tap.dtype);
    Cut cut = cut_of(tap.shape, element, kWarp);
    // A block finishes its sums by itself: no second stage.
    cut.items /= cut.pieces;
    table.taps[table.count++] = {tap.x,
                                 tap.g,
                                 tap.s,
                                 tap.shape.n,
                                 tap.shape.c,
                                 tap.shape.p,
                                 tap.stride,
                                 items,
                                 cut,
                                 tap.dtype,
                                 all_aligned(tap.x, tap.g)};
    items += cut.items;
    const int wanted = shared_of(cut, element, compute_bytes(tap.dtype));
    shared = wanted > shared ? wanted : shared;
    if (table.count == kMostTaps) launch(tap);
  }
  if (!taps.empty()) launch(taps.back());
}

}  // namespace attrfast::cuda
