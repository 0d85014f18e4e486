// RMSNorm, alone or after adding a residual, on a GPU. Zhang and Sennrich 2019.
#include "rms_norm/backward.cuh"
#include "rms_norm/forward.cuh"
#include "rms_norm/shape.h"

namespace llm3d {
namespace {

// Whether the packs of a row fit the registers of at most so many threads.
template <class T>
bool fits(int64_t columns, int most_threads) {
  return threads_for(columns, Pack<T>::size) <= most_threads;
}

// Threads of a row that is read more than once, n elements at a time.
int looping_threads(int64_t columns, int n) { return std::min(threads_for(columns, n), kMostRowThreads); }

template <class T>
void launch_forward(const Tensor& x, const Norm<T>& norm, bool packs) {
  if (!packs || !fits<T>(norm.columns, kMostRowThreads))
    return for_width<T>(packs, [&](auto width) {
      constexpr int n = decltype(width)::value;
      launch(looping_norm_kernel<T, n>, grid_of(norm.rows, 1), looping_threads(norm.columns, n), x, norm);
    });
  const int threads = threads_for(norm.columns, Pack<T>::size), block = threads == kWarp ? 4 * kWarp : threads;
  const int64_t rows = block / threads;
  const dim3 blocks = grid_of((norm.rows + rows - 1) / rows, 1);
  launch(norm.residual == nullptr ? norm_kernel<T, false> : norm_kernel<T, true>, blocks, block, x, norm, threads);
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor* residual, const Tensor& weight, double eps) {
  const NormShape shape = norm_shape(x, residual, weight);
  const Rows rows = shape.x;
  Tensor y = empty(x, {rows.count, rows.columns}, x.scalar_type());
  Tensor inverse_rms = empty(x, {rows.count, 1}, ScalarType::Float);
  for_floating_type(x.scalar_type(), "rms_norm", [&](auto type) {
    using T = typename decltype(type)::type;
    Norm<T> norm{data<T>(x), nullptr, data<T>(weight), data<T>(y), data<float>(inverse_rms)};
    norm.residual = residual == nullptr ? nullptr : data<T>(*residual);
    norm.x_stride = rows.stride;
    norm.residual_stride = shape.residual_stride;
    norm.rows = rows.count;
    norm.columns = static_cast<int>(rows.columns);
    norm.eps = static_cast<float>(eps);
    launch_forward(x, norm,
                   in_packs(norm.x, rows.stride, rows.columns) && in_packs(norm.weight, 0, rows.columns) &&
                       in_packs(norm.residual, shape.residual_stride, rows.columns));
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

// ---- backward ----

// Blocks that stay: as many as run at once, by the registers of their threads.
int64_t backward_blocks(const Tensor& x, int64_t rows, int threads) {
  return std::min<int64_t>(rows, int64_t{multiprocessors(x)} * (kBackwardThreads / threads));
}

template <class T>
void launch_columns(const Tensor& x, const NormGradient<T>& norm, int64_t parts, bool packs) {
  const Tensor slopes = empty(x, {norm.rows}, ScalarType::Float);
  for_width<T>(packs, [&](auto width) {
    constexpr int n = decltype(width)::value, a_block = kColumnThreads * n;
    launch(slope_kernel<T, n>, grid_of(norm.rows, 1), looping_threads(norm.columns, n), x, norm,
           data<float>(slopes));
    const dim3 blocks((norm.columns + a_block - 1) / a_block, parts);
    launch(column_gradient_kernel<T, n>, blocks, kColumnThreads, x, norm, data<float>(slopes));
  });
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                             const Tensor& inverse_rms, std::optional<Tensor> grad_sum) {
  const NormGradientShape shape = norm_gradient_shape(grad_y, x, weight, inverse_rms, grad_sum);
  const int64_t rows = shape.x.count, columns = shape.x.columns;
  Tensor grad_x = empty(x, {rows, columns}, x.scalar_type());
  Tensor grad_weight = empty(x, {columns}, ScalarType::Float);
  for_floating_type(x.scalar_type(), "rms_norm_backward", [&](auto type) {
    using T = typename decltype(type)::type;
    NormGradient<T> norm{data<T>(grad_y), data<T>(x), data<T>(weight)};
    norm.grad_sum = grad_sum.has_value() ? data<T>(*grad_sum) : nullptr;
    norm.inverse_rms = data<float>(inverse_rms);
    norm.grad_x = data<T>(grad_x);
    norm.grad_stride = shape.grad_stride;
    norm.x_stride = shape.x.stride;
    norm.sum_stride = shape.sum_stride;
    norm.rows = rows;
    norm.columns = static_cast<int>(columns);
    const bool packs = in_packs(norm.x, norm.x_stride, columns) && in_packs(norm.grad_y, norm.grad_stride, columns) &&
                       in_packs(norm.weight, 0, columns) && in_packs(norm.grad_sum, norm.sum_stride, columns);
    const int threads = threads_for(columns, Pack<T>::size);
    const bool holds = packs && fits<T>(columns, kBackwardThreads);
    const int64_t parts = backward_blocks(x, rows, holds ? threads : kColumnThreads);
    const Tensor partial = empty(x, {parts, columns}, ScalarType::Float);
    norm.partial = data<float>(partial);
    if (holds)
      launch(norm_gradient_kernel<T>, grid_of(parts, 1), threads, x, norm);
    else
      launch_columns(x, norm, parts, packs);
    launch(part_sum_kernel, grid_of((columns + kWarp - 1) / kWarp, 1), kSumThreads, x, norm.partial,
           data<float>(grad_weight), static_cast<int>(parts), norm.columns);
  });
  return {grad_x, grad_weight};
}

}  // namespace

LLM3D_CUDA(m) {
  m.impl("rms_norm_forward", LLM3D_OP(rms_norm_forward));
  m.impl("add_rms_norm_forward", LLM3D_OP(add_rms_norm_forward));
  m.impl("rms_norm_backward", LLM3D_OP(rms_norm_backward));
}

}  // namespace llm3d
