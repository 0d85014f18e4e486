// What a block of a GPU does with one split of a sequence, for up to `heads` query heads of a key-value head; the
// kernel that puts it together stands in cuda.cu.
#pragma once

#include "common/elements.h"

namespace llm3d {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTile = 128;                          // tokens
constexpr int kLanes = 4;                           // threads that share a key
constexpr int kKeys = kTile / (kThreads / kLanes);  // keys of a thread, in a tile
constexpr int kMaxHeadDim = kThreads;

// What the threads of a block share.
template <class A, int heads>
struct Shared {
  alignas(16) A query[heads][kMaxHeadDim];  // times the scale
  alignas(16) A scores[kTile][heads];       // then their exponentials
  A maximum[heads], total[heads], shrink[heads];  // m, l, and exp(m - m') of this tile
  int64_t rows[kTile];                      // where the tokens of this tile lie in the caches
};

// Tokens that a split takes of a sequence: whole tiles, as many for each split.
__device__ __forceinline__ int share_of(int length, int splits) {
  const int tiles = (length + kTile - 1) / kTile;
  return (tiles + splits - 1) / splits * kTile;
}

template <class T, int heads, class A = arithmetic<T>>
__device__ __forceinline__ void start(Shared<A, heads>& shared, const T* __restrict__ q, int64_t head_stride,
                                      int count, int head_dim, A scale) {
  for (int i = threadIdx.x; i < heads * head_dim; i += kThreads) {
    const int head = i / head_dim, column = i % head_dim;
    shared.query[head][column] = head < count ? widen(q[head * head_stride + column]) * scale : A(0);
  }
  if (threadIdx.x < heads) {
    shared.maximum[threadIdx.x] = A(-HUGE_VAL);
    shared.total[threadIdx.x] = 0;
  }
}

// Scores of the tile's `count` tokens for `some` heads, -inf beyond them. Four threads share a key, and have two
// under way.
template <int some, int n, class T, class A, int heads>
__device__ __forceinline__ void score(Shared<A, heads>& shared, int from, const T* __restrict__ keys, int count,
                                      int head_dim) {
  const int lane = threadIdx.x % kLanes, first = threadIdx.x / kLanes;
  A sums[kKeys][some] = {};
  for (int column = lane * n; column < head_dim; column += kLanes * n) {
    Elements<T, n> key[kKeys];
#pragma unroll
    for (int k = 0; k < kKeys; k++) key[k] = load<n>(keys + shared.rows[first + k * (kTile / kKeys)] + column);
#pragma unroll
    for (int head = 0; head < some; head++) {
      const auto query = load<n>(shared.query[from + head] + column);
#pragma unroll
      for (int k = 0; k < kKeys; k++)
#pragma unroll
        for (int i = 0; i < n; i++) sums[k][head] += query.values[i] * widen(key[k].values[i]);
    }
  }
#pragma unroll
  for (int k = 0; k < kKeys; k++)
#pragma unroll
    for (int head = 0; head < some; head++) {
      A sum = sums[k][head];
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
      const int token = first + k * (kTile / kKeys);
      if (head % kLanes == lane) shared.scores[token][from + head] = token < count ? sum : A(-HUGE_VAL);
    }
}

// From scores to exponentials, a warp a head.
template <class A, int heads>
__device__ __forceinline__ void exponentiate(Shared<A, heads>& shared) {
  static_assert(heads <= kWarps);
  const int head = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (head >= heads) return;
  const A before = shared.maximum[head];
  A maximum = before, sum = 0;
#pragma unroll
  for (int i = 0; i < kTile; i += kWarp) maximum = fmax(maximum, shared.scores[i + lane][head]);
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    maximum = fmax(maximum, __shfl_xor_sync(kAllLanes, maximum, offset));
  const A origin = maximum == A(-HUGE_VAL) ? A(0) : maximum;  // -inf - -inf is no number
#pragma unroll
  for (int i = 0; i < kTile; i += kWarp) {
    const A weight = exponential(shared.scores[i + lane][head] - origin);
    shared.scores[i + lane][head] = weight;
    sum += weight;
  }
  sum = warp_sum(sum);
  if (lane != 0) return;
  const A shrink = before == maximum ? A(1) : exponential(before - maximum);
  shared.shrink[head] = shrink;
  shared.total[head] = shared.total[head] * shrink + sum;
  shared.maximum[head] = maximum;
}

// A thread's part of out: a pack of columns, over every `slices`-th token from `slice` on.
template <class T, int n, int heads, class A = arithmetic<T>>
__device__ __forceinline__ void add_values(const Shared<A, heads>& shared, A (&out)[heads][n],
                                           const T* __restrict__ values, int slice, int slices, int count) {
#pragma unroll
  for (int head = 0; head < heads; head++)
#pragma unroll
    for (int i = 0; i < n; i++) out[head][i] *= shared.shrink[head];
#pragma unroll 4
  for (int token = slice; token < count; token += slices) {
    const auto value = load<n>(values + shared.rows[token]);
    const auto weight = load<heads>(shared.scores[token]);
#pragma unroll
    for (int head = 0; head < heads; head++)
#pragma unroll
      for (int i = 0; i < n; i++) out[head][i] += weight.values[head] * widen(value.values[i]);
  }
}

// What a split leaves of each head, partials[split]: out, then m and l.
template <class A, int n, int heads>
__device__ __forceinline__ void finish(const Shared<A, heads>& shared, const A (&out)[heads][n], A* partials,
                                       int64_t head_stride, int count, int column, int slice, int slices,
                                       int head_dim) {
  __shared__ A parts[kThreads * n];  // [slices, head_dim]
#pragma unroll
  for (int head = 0; head < heads; head++) {
    __syncthreads();
    if (slice < slices)
#pragma unroll
      for (int i = 0; i < n; i++) parts[slice * head_dim + column + i] = out[head][i];
    __syncthreads();
    const int thread = threadIdx.x;
    if (head >= count || thread >= head_dim) continue;
    A sum = 0;
    for (int i = 0; i < slices; i++) sum += parts[i * head_dim + thread];
    A* partial = partials + head * head_stride;
    partial[thread] = sum;
    if (thread == 0) {
      partial[head_dim] = shared.maximum[head];
      partial[head_dim + 1] = shared.total[head];
    }
  }
}

}  // namespace llm3d
