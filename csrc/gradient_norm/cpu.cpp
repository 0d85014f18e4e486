// The squared norm of a flat tensor, and how many of its elements are not finite, in one read.
#include <vector>

#include "common/cpu.h"

namespace llm3d {
namespace {

constexpr int64_t kPart = 1 << 15;  // elements with a sum of their own, so that threads change nothing

struct Squares {
  double sum, not_finite;
};

template <class T>
double sum_of_squares(const T* x, int64_t count) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; i++) sum += static_cast<double>(widen(x[i])) * static_cast<double>(widen(x[i]));
  return sum;
}

template <class T>
Squares squares_of(const T* x, int64_t count) {
  Squares total{0, 0};
  const auto block = [&total, x](int64_t begin, int64_t end) {
    const double sum = sum_of_squares(x + begin, end - begin);
    total.sum += sum;
    if (!std::isfinite(sum))
      for (int64_t i = begin; i < end; i++) total.not_finite += std::isfinite(widen(x[i])) ? 0 : 1;
  };
  in_blocks(count, block, x);
  return total;
}

Tensor squared_norm(const Tensor& x) {
  check_contiguous(x, "x");
  const int64_t count = x.numel(), parts = (count + kPart - 1) / kPart;
  Tensor result = empty(x, {2}, ScalarType::Double);
  std::vector<Squares> partial(parts);
  for_floating_type(x.scalar_type(), "squared_norm", [&](auto type) {
    using T = typename decltype(type)::type;
    const T* in = data<T>(x);
    parallel_ranges(parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; part++)
        partial[part] = squares_of<T>(in + part * kPart, std::min(kPart, count - part * kPart));
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

LLM3D_CPU(m) { m.impl("squared_norm", LLM3D_OP(squared_norm)); }

}  // namespace llm3d
