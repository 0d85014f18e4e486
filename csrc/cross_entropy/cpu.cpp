// The two passes over the logits that a cross-entropy makes, for one part of the vocabulary.
//
// Forward reads them once: a running maximum m and sum of exp(x - m), rescaled where the maximum grows (Milakov and
// Gimelshein 2018). Backward overwrites them:
//
//   grad = scale * exp(x - maximum) + shift, plus at_target at the target
//
// which covers cross-entropy, z-loss, label smoothing and log-probabilities (llm3d/parallel/cross_entropy.py).
#include <limits>

#include "common/cpu.h"
#include "cross_entropy/shape.h"

namespace llm3d {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kGrain = 1 << 12;  // elements a thread is worth starting for

template <class A>
struct Softmax {
  A maximum, total, sum;
};

template <class T>
arithmetic<T> maximum_of(const T* __restrict x, int64_t count) {
  using A = arithmetic<T>;
  A lanes[kLanes];
  for (A& lane : lanes) lane = -std::numeric_limits<A>::infinity();
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; lane++) {
      const A value = widen(x[i + lane]);
      lanes[lane] = value > lanes[lane] ? value : lanes[lane];  // NaN is passed over: the total carries it
    }
  for (; i < count; i++) lanes[0] = std::max(lanes[0], arithmetic<T>(widen(x[i])));
  return *std::max_element(lanes, lanes + kLanes);
}

// A block is read twice, the second time from the first-level cache.
template <class T>
Softmax<arithmetic<T>> softmax_of(const T* x, int64_t count) {
  using A = arithmetic<T>;
  constexpr A nothing = -std::numeric_limits<A>::infinity();
  Softmax<A> row{nothing, 0, 0};
  const auto block = [&row, x](int64_t begin, int64_t end) {
    const A maximum = std::max(row.maximum, maximum_of<T>(x + begin, end - begin));
    if (maximum > row.maximum) row.total *= exponential(row.maximum - maximum);
    row.maximum = maximum;
    const A origin = maximum == nothing ? A(0) : maximum;  // -inf - -inf is no number
    A total = 0, sum = 0;
#pragma omp simd reduction(+ : total, sum)
    for (int64_t i = begin; i < end; i++) {
      const A value = widen(x[i]);
      total += exponential(value - origin);
      sum += value;
    }
    row.total += total;
    row.sum += sum;
  };
  in_blocks(count, block, x);
  return row;
}

Tensor softmax_stats(const Tensor& logits, const Tensor& targets) {
  const Rows rows = check_logits(logits, targets);
  Tensor stats = empty(logits, {4, rows.count}, arithmetic_type(logits.scalar_type()));
  const int64_t* columns = data<int64_t>(targets);
  for_floating_type(logits.scalar_type(), "softmax_stats", [&](auto type) {
    using T = typename decltype(type)::type;
    using A = arithmetic<T>;
    const T* in = data<T>(logits);
    A* out = data<A>(stats);
    parallel_rows(rows, kGrain, [&](int64_t row) {
      const T* x = in + row * rows.stride;
      const Softmax<A> s = softmax_of<T>(x, rows.columns);
      const bool here = columns[row] >= 0 && columns[row] < rows.columns;
      out[row] = s.maximum;
      out[rows.count + row] = s.total;
      out[2 * rows.count + row] = here ? widen(x[columns[row]]) : A(0);
      out[3 * rows.count + row] = s.sum;
    });
  });
  return stats;
}

template <class T>
void gradient_row(T* x, int64_t count, int64_t target, arithmetic<T> maximum,
                  arithmetic<T> scale, arithmetic<T> at_target, arithmetic<T> shift) {
  using A = arithmetic<T>;
  if (scale == 0 && at_target == 0 && shift == 0) {  // an ignored token: whatever its logits are, NaN too
    std::fill(x, x + count, narrow<T>(A(0)));
    return;
  }
  const bool here = target >= 0 && target < count;
  const A kept = here ? scale * exponential(widen(x[target]) - maximum) + shift + at_target : A(0);
  const auto block = [=](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; i++) x[i] = narrow<T>(scale * exponential(widen(x[i]) - maximum) + shift);
  };
  in_blocks(count, block, x);
  if (here) x[target] = narrow<T>(kept);
}

void cross_entropy_backward_(Tensor logits, const Tensor& targets, const Tensor& maximum,
                             const Tensor& scale, const Tensor& at_target, const Tensor& shift) {
  const Rows rows = check_logits(logits, targets);
  check_factors(logits, rows.count, {&maximum, &scale, &at_target, &shift});
  const int64_t* columns = data<int64_t>(targets);
  for_floating_type(logits.scalar_type(), "cross_entropy_backward_", [&](auto type) {
    using T = typename decltype(type)::type;
    using A = arithmetic<T>;
    T* x = data<T>(logits);
    const A *maxima = data<A>(maximum), *scales = data<A>(scale);
    const A *at_targets = data<A>(at_target), *shifts = data<A>(shift);
    parallel_rows(rows, kGrain, [&](int64_t row) {
      gradient_row<T>(x + row * rows.stride, rows.columns, columns[row], maxima[row], scales[row],
                      at_targets[row], shifts[row]);
    });
  });
}

}  // namespace

LLM3D_CPU(m) {
  m.impl("softmax_stats", LLM3D_OP(softmax_stats));
  m.impl("cross_entropy_backward_", LLM3D_OP(cross_entropy_backward_));
}

}  // namespace llm3d
