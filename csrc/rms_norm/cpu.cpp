// RMSNorm, alone or after adding a residual. Zhang and Sennrich 2019.
//
//   n = x / sqrt(mean(x^2) + eps),   y = n * weight
//
// Backward, with g = grad_y * weight:
//   grad_x = (g - n * mean(g * n)) / rms        grad_weight = sum over tokens of grad_y * n
#include <algorithm>
#include <vector>

#include "common/cpu.h"
#include "rms_norm/shape.h"

namespace llm3d {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements a thread is worth starting for

// x = x + residual where there is one; returns the sum of the squares of x.
template <class T>
arithmetic<T> add_and_square(T* __restrict x, const T* __restrict residual, int64_t count) {
  using A = arithmetic<T>;
  A squares = 0;
  if (residual != nullptr) {
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < count; i++) {
      x[i] = narrow<T>(widen(x[i]) + widen(residual[i]));
      const A value = widen(x[i]);
      squares += value * value;
    }
  } else {
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < count; i++) squares += widen(x[i]) * widen(x[i]);
  }
  return squares;
}

// The second pass over a row finds it in the first-level cache. Returns 1 / rms.
template <class T>
arithmetic<T> forward_row(T* x, const T* residual, const T* __restrict weight, T* __restrict y, int64_t columns,
                          arithmetic<T> eps) {
  using A = arithmetic<T>;
  A squares = 0;
  const auto block = [&](int64_t begin, int64_t end) {
    squares += add_and_square(x + begin, residual == nullptr ? nullptr : residual + begin, end - begin);
  };
  in_blocks(columns, block, x, residual == nullptr ? x : residual, y);
  const A inverse_rms = A(1) / std::sqrt(squares / columns + eps);
#pragma omp simd
  for (int64_t i = 0; i < columns; i++)
    y[i] = narrow<T>(widen(x[i]) * inverse_rms * widen(weight[i]));
  return inverse_rms;
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor* residual, const Tensor& weight, double eps) {
  const NormShape shape = norm_shape(x, residual, weight);
  const Rows rows = shape.x;
  Tensor y = empty(x, {rows.count, rows.columns}, x.scalar_type());
  Tensor inverse_rms = empty(x, {rows.count, 1}, arithmetic_type(x.scalar_type()));
  for_floating_type(x.scalar_type(), "rms_norm", [&](auto type) {
    using T = typename decltype(type)::type;
    T *in = data<T>(x), *out = data<T>(y);
    const T *scale = data<T>(weight), *add = residual == nullptr ? nullptr : data<T>(*residual);
    auto* inverse = data<arithmetic<T>>(inverse_rms);
    parallel_rows(rows, kGrain, [&](int64_t row) {
      const T* added = add == nullptr ? nullptr : add + row * shape.residual_stride;
      inverse[row] = forward_row<T>(in + row * rows.stride, added, scale, out + row * rows.columns,
                                    rows.columns, arithmetic<T>(eps));
    });
  });
  return {y, inverse_rms};
}

std::tuple<Tensor, Tensor> rms_norm_forward(const Tensor& x, const Tensor& weight, double eps) {
  return forward(x, nullptr, weight, eps);
}

std::tuple<Tensor, Tensor> add_rms_norm_forward(Tensor x, const Tensor& residual, const Tensor& weight,
                                                double eps) {
  return forward(x, &residual, weight, eps);
}

// grad_weight += this row's part; returns the sum of grad_y * weight * n.
template <class T>
arithmetic<T> add_to_grad_weight(const T* __restrict grad_y, const T* __restrict x, const T* __restrict weight,
                                 arithmetic<T>* __restrict grad_weight, int64_t count, arithmetic<T> inverse_rms) {
  using A = arithmetic<T>;
  A dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t i = 0; i < count; i++) {
    const A product = widen(grad_y[i]) * (widen(x[i]) * inverse_rms);
    grad_weight[i] += product;
    dot += product * widen(weight[i]);
  }
  return dot;
}

template <class T>
void backward_row(const T* __restrict grad_y, const T* __restrict x, const T* __restrict weight,
                  const T* __restrict grad_sum, T* __restrict grad_x, arithmetic<T>* grad_weight, int64_t columns,
                  arithmetic<T> inverse_rms) {
  using A = arithmetic<T>;
  A dot = 0;
  const auto block = [&](int64_t begin, int64_t end) {
    dot += add_to_grad_weight(grad_y + begin, x + begin, weight + begin, grad_weight + begin, end - begin, inverse_rms);
  };
  in_blocks(columns, block, grad_y, x, grad_sum == nullptr ? x : grad_sum, grad_x);
  const A slope = dot / columns * inverse_rms * inverse_rms;
  if (grad_sum != nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < columns; i++)
      grad_x[i] = narrow<T>(widen(grad_y[i]) * widen(weight[i]) * inverse_rms - widen(x[i]) * slope +
                            widen(grad_sum[i]));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < columns; i++)
      grad_x[i] = narrow<T>(widen(grad_y[i]) * widen(weight[i]) * inverse_rms - widen(x[i]) * slope);
  }
}

// A part of the tokens has its own sum of the weight's gradient; how many there are depends on the shape alone,
// so that the result does not depend on the number of threads.
constexpr int64_t kParts = 64, kRowsInPart = 32;

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                             const Tensor& inverse_rms, std::optional<Tensor> grad_sum) {
  const NormGradientShape shape = norm_gradient_shape(grad_y, x, weight, inverse_rms, grad_sum);
  const Rows rows = shape.x;
  Tensor grad_x = empty(x, {rows.count, rows.columns}, x.scalar_type());
  Tensor grad_weight = empty(x, {rows.columns}, arithmetic_type(x.scalar_type()));
  const int64_t rows_in_part = std::max(kRowsInPart, (rows.count + kParts - 1) / kParts);
  const int64_t parts = (rows.count + rows_in_part - 1) / rows_in_part;
  for_floating_type(x.scalar_type(), "rms_norm_backward", [&](auto type) {
    using T = typename decltype(type)::type;
    using A = arithmetic<T>;
    std::vector<A> partial(parts * rows.columns);
    const T *grads = data<T>(grad_y), *in = data<T>(x), *scale = data<T>(weight);
    const T* sums = grad_sum.has_value() ? data<T>(*grad_sum) : nullptr;
    T* out = data<T>(grad_x);
    const A* inverse = data<A>(inverse_rms);
    parallel_rows({parts, rows_in_part * rows.columns, 0}, kGrain, [&](int64_t part) {
      const int64_t stop = std::min(rows.count, (part + 1) * rows_in_part);
      for (int64_t row = part * rows_in_part; row < stop; row++)
        backward_row<T>(grads + row * shape.grad_stride, in + row * rows.stride, scale,
                        sums == nullptr ? nullptr : sums + row * shape.sum_stride, out + row * rows.columns,
                        partial.data() + part * rows.columns, rows.columns, inverse[row]);
    });
    A* total = data<A>(grad_weight);
    parallel_ranges(rows.columns, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, parts)),
                    [&](int64_t begin, int64_t end) {
                      std::fill(total + begin, total + end, A(0));
                      for (int64_t part = 0; part < parts; part++)
                        for (int64_t i = begin; i < end; i++) total[i] += partial[part * rows.columns + i];
                    });
  });
  return {grad_x, grad_weight};
}

}  // namespace

LLM3D_CPU(m) {
  m.impl("rms_norm_forward", LLM3D_OP(rms_norm_forward));
  m.impl("add_rms_norm_forward", LLM3D_OP(add_rms_norm_forward));
  m.impl("rms_norm_backward", LLM3D_OP(rms_norm_backward));
}

}  // namespace llm3d
