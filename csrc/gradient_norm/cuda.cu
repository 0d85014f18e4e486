// The squared norm of a flat tensor, and how many of its elements are not finite, on a GPU, in one read.
//
// Each block sums its share in fp64; a last block sums the blocks' in a fixed order. Nothing is atomic, and how many
// blocks there are depends on the size and the device alone, so that the same elements give the same bits.
#include "common/elements.h"

namespace llm3d {
namespace {

constexpr int kThreads = 512;
constexpr int kBlocksEach = 4;  // of a multiprocessor: all that run at once

struct Squares {
  double sum, not_finite;
};

template <class T, int n>
__device__ __forceinline__ void take(Squares& squares, const Elements<T, n>& x) {
#pragma unroll
  for (int i = 0; i < n; i++) {
    const float value = widen(x.values[i]);
    squares.sum += static_cast<double>(value) * static_cast<double>(value);
    squares.not_finite += value - value == 0 ? 0 : 1;
  }
}

__device__ __forceinline__ void store_sum(Squares own, Squares* to) {
  const double sum = block_sum<kThreads / kWarp>(own.sum), not_finite = block_sum<kThreads / kWarp>(own.not_finite);
  if (threadIdx.x == 0) *to = {sum, not_finite};
}

// `packs` whole packs, the rest one by one.
template <class T>
__global__ void __launch_bounds__(kThreads)
    squares_kernel(const T* __restrict__ x, Squares* __restrict__ partial, int64_t packs, int64_t count) {
  constexpr int n = Pack<T>::size;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t all = static_cast<int64_t>(gridDim.x) * kThreads;
  Squares own{0, 0};
#pragma unroll 4
  for (int64_t pack = first; pack < packs; pack += all) take(own, load<n>(x + pack * n));
#pragma unroll 4
  for (int64_t i = packs * n + first; i < count; i += all) take(own, load<1>(x + i));
  store_sum(own, partial + blockIdx.x);
}

__global__ void __launch_bounds__(kThreads)
    total_kernel(const Squares* __restrict__ partial, Squares* __restrict__ total, int blocks) {
  Squares own{0, 0};
  for (int block = threadIdx.x; block < blocks; block += kThreads) {
    own.sum += partial[block].sum;
    own.not_finite += partial[block].not_finite;
  }
  store_sum(own, total);
}

Tensor squared_norm(const Tensor& x) {
  check_contiguous(x, "x");
  const int64_t count = x.numel();
  const Tensor result = empty(x, {2}, ScalarType::Double);
  for_floating_type(x.scalar_type(), "squared_norm", [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int n = Pack<T>::size;
    const T* in = data<T>(x);
    const int64_t packs = in_packs(in, 0, 0) ? count / n : 0, a_block = int64_t{kThreads} * n;
    const int64_t blocks = std::min<int64_t>((count + a_block - 1) / a_block, multiprocessors(x) * kBlocksEach);
    const Tensor partial = empty(x, {blocks, 2}, ScalarType::Double);
    auto* parts = reinterpret_cast<Squares*>(data<double>(partial));
    launch(squares_kernel<T>, grid_of(blocks, 1), kThreads, x, in, parts, packs, count);
    launch(total_kernel, 1, kThreads, x, parts, reinterpret_cast<Squares*>(data<double>(result)),
           static_cast<int>(blocks));
  });
  return result;
}

}  // namespace

LLM3D_CUDA(m) { m.impl("squared_norm", LLM3D_OP(squared_norm)); }

}  // namespace llm3d
