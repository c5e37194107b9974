#include "launch.cuh"
#include "many_taps.cuh"

namespace attrfast::cuda {

int64_t tap_table_bytes(int64_t taps) { return taps * static_cast<int64_t>(sizeof(TapWork)); }

void many_taps(const std::vector<Tap>& taps, bool absolute, void* table, const Queue& queue) {
  std::vector<TapWork> work;
  int64_t items = 0;
  int shared = 0;
  for (const Tap& tap : taps) {
    check_sizes({"many_taps", tap.dtype, tap.shape});
    if (empty(tap.shape)) continue;
    const int element = element_bytes(tap.dtype);
    Cut cut = cut_of(tap.shape, element, kWarp);
    // A block finishes its sums by itself: no second stage.
    cut.items /= cut.pieces;
    work.push_back({tap.x, tap.g, tap.s, tap.shape.n, tap.shape.c, tap.shape.p, tap.stride, items, cut,
                    tap.dtype, all_aligned(tap.x, tap.g)});
    items += cut.items;
    const int wanted = shared_of(cut, element, compute_bytes(tap.dtype));
    shared = wanted > shared ? wanted : shared;
  }
  if (work.empty()) return;
  const Call call = {"many_taps, the first", taps[0].dtype, taps[0].shape};
  call.check(select_device(queue.device));
  call.check(upload(table, work.data(), work.size() * sizeof(TapWork), queue.stream));
  run(call, queue, many_taps_kernel, items, shared + static_cast<int>(sizeof(TapHeader)),
      static_cast<const TapWork*>(table), static_cast<int>(work.size()), items, absolute);
}

}  // namespace attrfast::cuda
