// The kernels of RMSNorm's backward, with g = grad_y weight and r = 1 / rms:
//
//   grad_x = g r - x slope + grad_sum,   slope = mean(g x r) r^2        grad_weight = sum over tokens of grad_y x r
//
// Blocks stay and take every so-many-th row; a thread, always at the same columns, adds up their grad_weight in
// registers. Each block writes its part, and a last kernel sums the parts in a fixed order. Nothing is atomic.
//
// A row that is no whole packs of 16 bytes, or longer than registers hold, is read twice: for its slope, then by
// blocks that each have their own columns of many rows.
#pragma once

#include "rms_norm/row.cuh"

namespace llm3d {

constexpr int kBackwardThreads = 512;  // of a row at most, for the sake of their registers: 16384 columns in bf16
constexpr int kColumnThreads = 128;  // where a row is read twice
constexpr int kSumThreads = 512;

template <class T>
struct NormGradient {
  const T *grad_y, *x, *weight, *grad_sum;  // grad_sum: null for none
  const float* inverse_rms;
  T* grad_x;
  float* partial;  // [parts, columns] of the weight's gradient
  int64_t grad_stride, x_stride, sum_stride, rows;
  int columns;
};

// The sum of g x r.
template <class T, int n>
__device__ __forceinline__ float dot_of(const Elements<T, n>& grad_y, const Elements<T, n>& x,
                                        const Elements<T, n>& weight, float inverse) {
  float dot = 0;
#pragma unroll
  for (int i = 0; i < n; i++)
    dot += widen(grad_y.values[i]) * (widen(x.values[i]) * inverse) * widen(weight.values[i]);
  return dot;
}

template <class T, int n>
__device__ __forceinline__ void add_products(const Elements<T, n>& grad_y, const Elements<T, n>& x, float inverse,
                                             float* grad_weight) {
#pragma unroll
  for (int i = 0; i < n; i++) grad_weight[i] += widen(grad_y.values[i]) * (widen(x.values[i]) * inverse);
}

template <class T, int n>
__device__ __forceinline__ Elements<T, n> gradient_of(const Elements<T, n>& grad_y, Elements<T, n> x,
                                                      const Elements<T, n>& weight, const Elements<T, n>& grad_sum,
                                                      float inverse, float slope) {
#pragma unroll
  for (int i = 0; i < n; i++) {
    const float g = widen(grad_y.values[i]) * widen(weight.values[i]);
    x.values[i] = narrow<T>(g * inverse - widen(x.values[i]) * slope + widen(grad_sum.values[i]));
  }
  return x;
}

template <class T>
__global__ void __launch_bounds__(kBackwardThreads) norm_gradient_kernel(NormGradient<T> norm) {
  constexpr int n = Pack<T>::size;
  const auto held = [&](const auto& body) { for_held<n>(norm.columns, threadIdx.x, blockDim.x, body); };
  uint4 weight[kHeld];
  float grad_weight[kHeld][n] = {};
  held([&](int k, int column) { weight[k] = load_bits(norm.weight + column); });
  int turn = 0;
  for (int64_t row = blockIdx.x; row < norm.rows; row += gridDim.x, turn++) {
    uint4 x[kHeld], grad_y[kHeld], grad_sum[kHeld];
    held([&](int k, int column) {
      x[k] = load_bits(norm.x + row * norm.x_stride + column);
      grad_y[k] = load_bits(norm.grad_y + row * norm.grad_stride + column);
      grad_sum[k] = {0, 0, 0, 0};
      if (norm.grad_sum != nullptr) grad_sum[k] = load_bits(norm.grad_sum + row * norm.sum_stride + column);
    });
    const float inverse = norm.inverse_rms[row];
    float dot = 0;
    held([&](int k, int) {
      const auto own = opened<T>(x[k]), grad = opened<T>(grad_y[k]);
      dot += dot_of(grad, own, opened<T>(weight[k]), inverse);
      add_products(grad, own, inverse, grad_weight[k]);
    });
    const float slope = sum_over_row(dot, blockDim.x / kWarp, turn) / norm.columns * inverse * inverse;
    T* grad_x = norm.grad_x + row * norm.columns;
    held([&](int k, int column) {
      store<n>(grad_x + column, gradient_of(opened<T>(grad_y[k]), opened<T>(x[k]), opened<T>(weight[k]),
                                            opened<T>(grad_sum[k]), inverse, slope));
    });
  }
  float* partial = norm.partial + static_cast<int64_t>(blockIdx.x) * norm.columns;
  held([&](int k, int column) {
#pragma unroll
    for (int i = 0; i < n; i++) partial[column + i] = grad_weight[k][i];
  });
}

// slopes[row], a block a row.
template <class T, int n>
__global__ void __launch_bounds__(kMostRowThreads) slope_kernel(NormGradient<T> norm, float* slopes) {
  const int64_t row = blockIdx.x;
  const T *x = norm.x + row * norm.x_stride, *grad_y = norm.grad_y + row * norm.grad_stride;
  const float inverse = norm.inverse_rms[row];
  float dot = 0;
  for (int i = threadIdx.x * n; i < norm.columns; i += blockDim.x * n)
    dot += dot_of(load<n>(grad_y + i), load<n>(x + i), load<n>(norm.weight + i), inverse);
  dot = sum_over_row(dot, blockDim.x / kWarp, 0);
  if (threadIdx.x == 0) slopes[row] = dot / norm.columns * inverse * inverse;
}

// A thread has n columns of every gridDim.y-th row.
template <class T, int n>
__global__ void __launch_bounds__(kColumnThreads)
    column_gradient_kernel(NormGradient<T> norm, const float* __restrict__ slopes) {
  const int column = (blockIdx.x * kColumnThreads + threadIdx.x) * n;
  if (column >= norm.columns) return;
  const auto weight = load<n>(norm.weight + column);
  float grad_weight[n] = {};
  for (int64_t row = blockIdx.y; row < norm.rows; row += gridDim.y) {
    const auto x = load<n>(norm.x + row * norm.x_stride + column);
    const auto grad_y = load<n>(norm.grad_y + row * norm.grad_stride + column);
    Elements<T, n> grad_sum = {};
    if (norm.grad_sum != nullptr) grad_sum = load<n>(norm.grad_sum + row * norm.sum_stride + column);
    const float inverse = norm.inverse_rms[row];
    add_products(grad_y, x, inverse, grad_weight);
    store<n>(norm.grad_x + row * norm.columns + column,
             gradient_of(grad_y, x, weight, grad_sum, inverse, slopes[row]));
  }
  float* partial = norm.partial + static_cast<int64_t>(blockIdx.y) * norm.columns + column;
#pragma unroll
  for (int i = 0; i < n; i++) partial[i] = grad_weight[i];
}

// grad_weight = the sum of the parts, for a warp's width of columns: each warp sums every so-many-th part, then the
// first one their sums.
static __global__ void __launch_bounds__(kSumThreads)
    part_sum_kernel(const float* __restrict__ partial, float* __restrict__ grad_weight, int parts, int columns) {
  constexpr int warps = kSumThreads / kWarp;
  __shared__ float sums[warps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, column = blockIdx.x * kWarp + lane;
  float sum = 0;
  if (column < columns) {
#pragma unroll 8
    for (int part = warp; part < parts; part += warps) sum += partial[static_cast<int64_t>(part) * columns + column];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= columns) return;
  for (int other = 1; other < warps; other++) sum += sums[other][lane];
  grad_weight[column] = sum;
}

}  // namespace llm3d
