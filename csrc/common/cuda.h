// What every CUDA kernel uses: launches, 16-byte packs, sums over a warp and a block in a fixed order.
//
// Kernels are started by `launch`, not by <<<>>>, and use warp shuffles, __syncthreads and static shared memory
// only, so that the tests can compile the same sources for the CPU and run them there (tests/csrc/cuda_on_cpu).
#pragma once

#include <cuda_runtime.h>

#include "common/tensor.h"

namespace llm3d {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

inline int multiprocessors(const Tensor& x) {
  int count = 0;
  const cudaError_t status = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, x.get_device_index());
  check(status == cudaSuccess, "CUDA: ", cudaGetErrorString(status));
  return count;
}

#ifdef __CUDACC__
inline cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// kernel<<<blocks, threads>>>(arguments...) on x's device and its current stream.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, const Tensor& x, Arguments... arguments) {
  if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  kernel<<<blocks, threads, 0, current_stream(x)>>>(static_cast<Parameters>(arguments)...);
  const cudaError_t status = cudaGetLastError();
  check(status == cudaSuccess, "CUDA: ", cudaGetErrorString(status));
}
#endif

// 16 bytes, the most that a thread loads at once.
template <class T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T values[size];
};

// Whether rows that start at `pointer`, `stride` elements apart, of `columns` elements, are whole aligned packs.
template <class T>
bool in_packs(const T* pointer, int64_t stride, int64_t columns) {
  constexpr int64_t size = Pack<T>::size;
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride % size == 0 && columns % size == 0;
}

template <class A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// The sum over the block's threads, in every thread. Every thread of the block calls it, `warps` warps of them.
template <int warps, class A>
__device__ __forceinline__ A block_sum(A value) {
  __shared__ A partial[warps];
  value = warp_sum(value);
  if constexpr (warps == 1) return value;
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  A total = 0;
#pragma unroll
  for (int warp = 0; warp < warps; warp++) total += partial[warp];
  __syncthreads();  // before the next call writes
  return total;
}

}  // namespace llm3d
