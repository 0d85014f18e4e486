// total += x, with total in fp32 and x in a narrower type, in one pass. (PyTorch's CPU copies x to fp32 first.)
#include "common/cpu.h"

namespace llm3d {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements a thread is worth starting for

template <class T>
void add(float* __restrict total, const T* __restrict x, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; i++) total[i] += widen(x[i]);
}

void accumulate_(Tensor total, const Tensor& x) {
  check_type(total, ScalarType::Float, "total");
  check_contiguous(total, "total");
  check_size(x, total.numel(), "x");
  check(x.dim() == total.dim(), "x has ", x.dim(), " dimensions, total ", total.dim());
  for (int64_t i = 0; i < x.dim(); i++)
    check(x.size(i) == total.size(i), "x has ", x.size(i), " in dimension ", i, ", total ", total.size(i));
  float* to = data<float>(total);
  for_floating_type(x.scalar_type(), "accumulate_", [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, double>) {
      const T* from = data<T>(x);
      parallel_ranges(x.numel(), kGrain,
                      [&](int64_t begin, int64_t end) { add<T>(to + begin, from + begin, end - begin); });
    } else {
      check(false, "accumulate_: x is wider than total");
    }
  });
}

}  // namespace

LLM3D_CPU(m) { m.impl("accumulate_", LLM3D_OP(accumulate_)); }

}  // namespace llm3d
