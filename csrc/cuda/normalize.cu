#include "launch.cuh"
#include "normalize.cuh"

namespace attrfast::cuda {

void segment_normalize(Dtype dtype, const SegmentNormalize& op, const Queue& queue) {
  const Shape shape = {1, op.segments, 1, kChannelsFirst};
  by_dtype(dtype, [&](auto type) {
    run({"segment_normalize", dtype, shape}, queue, segment_normalize_kernel<Pointee<decltype(type)>>,
        op.segments, kThreads / kWarp * static_cast<int>(sizeof(double)), op);
  });
}

}  // namespace attrfast::cuda
