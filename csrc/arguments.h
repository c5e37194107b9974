// How Python hands over tensors and pairs, and what launches take for them.
#pragma once

#include <cstdint>
#include <utility>

#include "attribution.h"

namespace attrfast {

using Address = std::uintptr_t;
using Two = std::pair<int64_t, int64_t>;

inline const void* in(Address a) { return reinterpret_cast<const void*>(a); }
inline void* out(Address a) { return reinterpret_cast<void*>(a); }

inline Shape shape_of(int64_t n, int64_t c, int64_t p, int layout) {
  return {n, c, p, static_cast<Layout>(layout)};
}

inline Pool pool_of(Two input, Two output, Two kernel, Two stride, Two padding) {
  return {input.first,
          input.second,
          output.first,
          output.second,
          {kernel.first, kernel.second},
          {stride.first, stride.second},
          {padding.first, padding.second}};
}

inline AffineReluBackward backward_of(Address a, Address g, Address scale, Address residual, Address g1,
                                      Address gz, Address s, double lower, double upper, bool guided,
                                      int attribute) {
  return {in(a),
          in(g),
          in(scale),
          in(residual),
          out(g1),
          out(gz),
          out(s),
          lower,
          upper,
          guided,
          static_cast<Attribute>(attribute)};
}

}  // namespace attrfast
