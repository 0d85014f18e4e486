// A row in the registers of its threads, and its sum.
#pragma once

#include "common/elements.h"

namespace llm3d {

constexpr int kHeld = 4;               // packs of a row that a thread holds
constexpr int kMostRowThreads = 1024;  // one row has

// Calls body(k, column) for the packs that a thread holds of a row: its k-th begins at that column. All threads
// together take neighboring packs.
template <int n, class F>
__device__ __forceinline__ void for_held(int columns, int thread, int threads, const F& body) {
#pragma unroll
  for (int k = 0; k < kHeld; k++) {
    const int column = (thread + k * threads) * n;
    if (column < columns) body(k, column);
  }
}

// The elements of a pack held as bits. Without the asm the compiler keeps them widened between one use and the next, in
// twice as many registers.
template <class T>
__device__ __forceinline__ Elements<T, Pack<T>::size> opened(uint4 bits) {
  asm volatile("" : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w));
  Elements<T, Pack<T>::size> elements;
  memcpy(&elements, &bits, 16);
  return elements;
}

template <class T>
__device__ __forceinline__ uint4 bits_of(const Elements<T, Pack<T>::size>& elements) {
  uint4 bits;
  memcpy(&bits, &elements, 16);
  return bits;
}

// The pack that begins at `from`, as bits.
template <class T>
__device__ __forceinline__ uint4 load_bits(const T* from) {
  return *reinterpret_cast<const uint4*>(from);
}

// Threads, in whole warps, that hold a row of such packs.
inline int threads_for(int64_t columns, int pack) {
  const int64_t a_warp = int64_t{kWarp} * kHeld * pack;
  return static_cast<int>(std::max<int64_t>(1, (columns + a_warp - 1) / a_warp)) * kWarp;
}

// The sum over the threads of a row, in each of them: a warp's own, or the whole block's. `turn` is one more from call
// to call: while some threads still read what the last call wrote, others may write.
__device__ __forceinline__ float sum_over_row(float value, int warps, int turn) {
  __shared__ float partial[2][kMostRowThreads / kWarp];
  value = warp_sum(value);
  if (warps == 1) return value;
  float* own = partial[turn % 2];
  if (threadIdx.x % kWarp == 0) own[threadIdx.x / kWarp] = value;
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  return warp_sum(lane < warps ? own[lane] : 0.0f);
}

}  // namespace llm3d
