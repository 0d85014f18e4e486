// The squared norm of a flat tensor, and how many of its elements are not finite, in one read.
#include <vector>

#include "common/cpu.h"

namespace llm3d {
namespace {

constexpr int64_t kBlock = 1 << 15;  // elements with a sum of their own, so that threads change nothing

struct Squares {
  double sum, not_finite;
};

template <class T>
Squares squares_of(const T* __restrict x, int64_t count) {
  double sum = 0;
  int32_t not_finite = 0;
#pragma omp simd reduction(+ : sum, not_finite)
  for (int64_t i = 0; i < count; i++) {
    const auto value = widen(x[i]);
    sum += static_cast<double>(value) * static_cast<double>(value);
    not_finite += value - value == 0 ? 0 : 1;
  }
  return {sum, static_cast<double>(not_finite)};
}

Tensor squared_norm(const Tensor& x) {
  check_contiguous(x, "x");
  const int64_t count = x.numel(), blocks = (count + kBlock - 1) / kBlock;
  Tensor result = empty(x, {2}, ScalarType::Double);
  std::vector<Squares> partial(blocks);
  for_floating_type(x.scalar_type(), "squared_norm", [&](auto type) {
    using T = typename decltype(type)::type;
    const T* in = data<T>(x);
    parallel_ranges(blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; block++)
        partial[block] = squares_of<T>(in + block * kBlock, std::min(kBlock, count - block * kBlock));
    });
  });
  Squares total{0, 0};
  for (const Squares& part : partial) {
    total.sum += part.sum;
    total.not_finite += part.not_finite;
  }
  data<double>(result)[0] = total.sum;
  data<double>(result)[1] = total.not_finite;
  return result;
}

}  // namespace

LLM3D_CPU(m) { m.impl("squared_norm", TORCH_BOX(&squared_norm)); }

}  // namespace llm3d
