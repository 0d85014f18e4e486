// RMSNorm's kernels:
//
//   x = x + residual, where there is one        r = 1 / sqrt(mean(x^2) + eps)        y = x r weight
//
// A row is read once: its threads, one warp or one block, hold it in registers between the sum and y. A row that is
// no whole packs of 16 bytes, or longer than registers hold, is read twice.
#pragma once

#include "rms_norm/row.cuh"

namespace llm3d {

template <class T>
struct Norm {
  T* x;
  const T *residual, *weight;  // residual: null for none
  T* y;
  float* inverse_rms;
  int64_t x_stride, residual_stride, rows;
  int columns;
  float eps;
};

template <class T, int n>
__device__ __forceinline__ Elements<T, n> sum_of(Elements<T, n> x, const Elements<T, n>& residual) {
#pragma unroll
  for (int i = 0; i < n; i++) x.values[i] = narrow<T>(widen(x.values[i]) + widen(residual.values[i]));
  return x;
}

template <class T, int n>
__device__ __forceinline__ float squares_of(const Elements<T, n>& x) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < n; i++) sum += widen(x.values[i]) * widen(x.values[i]);
  return sum;
}

template <class T, int n>
__device__ __forceinline__ Elements<T, n> normalized(Elements<T, n> x, const Elements<T, n>& weight, float inverse) {
#pragma unroll
  for (int i = 0; i < n; i++) x.values[i] = narrow<T>(widen(x.values[i]) * inverse * widen(weight.values[i]));
  return x;
}

// `threads` hold a row; where they are one warp, the block's other warps take the next rows.
template <class T, bool added>
__global__ void __launch_bounds__(kMostRowThreads) norm_kernel(Norm<T> norm, int threads) {
  constexpr int n = Pack<T>::size;
  const int thread = threadIdx.x % threads;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / threads) + threadIdx.x / threads;
  if (row >= norm.rows) return;
  T *x = norm.x + row * norm.x_stride, *y = norm.y + row * norm.columns;
  uint4 held[kHeld], residual[added ? kHeld : 1];
  for_held<n>(norm.columns, thread, threads, [&](int k, int column) {
    held[k] = load_bits(x + column);
    if constexpr (added) residual[k] = load_bits(norm.residual + row * norm.residual_stride + column);
  });
  float squares = 0;
  for_held<n>(norm.columns, thread, threads, [&](int k, int column) {
    auto own = opened<T>(held[k]);
    if constexpr (added) {
      own = sum_of(own, opened<T>(residual[k]));
      store<n>(x + column, own);
      held[k] = bits_of(own);
    }
    squares += squares_of(own);
  });
  const float mean = sum_over_row(squares, threads / kWarp, 0) / norm.columns, inverse = 1 / sqrtf(mean + norm.eps);
  for_held<n>(norm.columns, thread, threads, [&](int k, int column) {
    store<n>(y + column, normalized(opened<T>(held[k]), load<n>(norm.weight + column), inverse));
  });
  if (thread == 0) norm.inverse_rms[row] = inverse;
}

// A block a row.
template <class T, int n>
__global__ void __launch_bounds__(kMostRowThreads) looping_norm_kernel(Norm<T> norm) {
  const int64_t row = blockIdx.x;
  T *x = norm.x + row * norm.x_stride, *y = norm.y + row * norm.columns;
  const int step = blockDim.x * n;
  float squares = 0;
  for (int i = threadIdx.x * n; i < norm.columns; i += step) {
    auto own = load<n>(x + i);
    if (norm.residual != nullptr) {
      own = sum_of(own, load<n>(norm.residual + row * norm.residual_stride + i));
      store<n>(x + i, own);
    }
    squares += squares_of(own);
  }
  const float mean = sum_over_row(squares, blockDim.x / kWarp, 0) / norm.columns;
  const float inverse = 1 / sqrtf(mean + norm.eps);
  for (int i = threadIdx.x * n; i < norm.columns; i += step)
    store<n>(y + i, normalized(load<n>(x + i), load<n>(norm.weight + i), inverse));
  if (threadIdx.x == 0) norm.inverse_rms[row] = inverse;
}

}  // namespace llm3d
