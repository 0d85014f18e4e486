// Threads for the CPU kernels, PyTorch's own, so that there is one pool and torch.set_num_threads rules it; and blocks
// that are fetched ahead of their use.
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

constexpr int64_t kBlock = 512;   // elements that are fetched together
constexpr int64_t kAhead = 4096;  // bytes from what is computed on to what is fetched

// Fetches what lies kAhead bytes behind these elements. The processor's own prefetching falls behind where much is
// computed on each line: without this, loops with an exponential take up to three times as long.
template <class T>
void fetch_ahead(T* elements, int64_t count) {
  constexpr int to_write = std::is_const_v<T> ? 0 : 1;
  const char* bytes = reinterpret_cast<const char*>(elements) + kAhead;
  for (int64_t at = 0; at < count * static_cast<int64_t>(sizeof(T)); at += 64)
    __builtin_prefetch(bytes + at, to_write);
}

// body(begin, end) on blocks of [0, count), fetching each array ahead.
template <class F, class... T>
void in_blocks(int64_t count, const F& body, T*... arrays) {
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(count, begin + kBlock);
    (fetch_ahead(arrays + begin, end - begin), ...);
    body(begin, end);
  }
}

}  // namespace llm3d
