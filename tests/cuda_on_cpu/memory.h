// Which memory a launch may touch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulated {

struct Range {
  uintptr_t begin, end;
  bool writes;
};

void allow(uintptr_t begin, size_t bytes, bool writes);
void count_as_vector(uintptr_t begin, size_t bytes);
void forget();

}  // namespace emulated
