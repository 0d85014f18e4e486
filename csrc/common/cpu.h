// Threads for the CPU kernels: PyTorch's own, so that there is one pool and torch.set_num_threads rules it.
#pragma once

#include <algorithm>

#include "common/tensor.h"

namespace llm3d {

// body(begin, end) on parts of [0, count), at least `grain` each, beside each other.
template <class F>
void parallel_ranges(int64_t count, int64_t grain, const F& body) {
  if (count > 0) torch::stable::parallel_for(0, count, grain, body);
}

// body(row) for each row; a thread gets at least `grain` elements.
template <class F>
void parallel_rows(const Rows& rows, int64_t grain, const F& body) {
  const int64_t grain_rows = std::max<int64_t>(1, grain / std::max<int64_t>(1, rows.columns));
  parallel_ranges(rows.count, grain_rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) body(row);
  });
}

}  // namespace llm3d
