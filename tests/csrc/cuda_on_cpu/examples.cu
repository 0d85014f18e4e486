// Kernels right and wrong, to test the emulation with: torch.ops.llm3d_on_cpu.example(like, which) runs one, two blocks of
// two warps, and returns what its threads wrote.
#include "common/cuda.h"

namespace llm3d {
namespace {

constexpr int kThreads = 2 * kWarp;

__device__ float* own(float* out) { return out + blockIdx.x * kThreads + threadIdx.x; }

__global__ void sums(float* out) { *own(out) = block_sum<2>(static_cast<float>(threadIdx.x)); }

__global__ void shuffles(float* out) {
  const int lane = threadIdx.x % kWarp;
  const int down = __shfl_down_sync(kAllLanes, lane, 3), third = __shfl_sync(kAllLanes, lane, 3);
  const unsigned odd = __ballot_sync(kAllLanes, lane % 2);
  const int half = __shfl_xor_sync(kAllLanes, lane, 1, 16);
  const bool right = down == (lane + 3 < kWarp ? lane + 3 : lane) && third == 3 && odd == 0xaaaaaaaau &&
                     half == (lane ^ 1) && __any_sync(kAllLanes, lane == 7) && !__any_sync(kAllLanes, lane == 32);
  *own(out) = right ? 1 : 0;
}

// Each thread reads what one of the other warp wrote, without waiting for it.
__global__ void missing_barrier(float* out) {
  __shared__ float values[kThreads];
  values[threadIdx.x] = 0;
  __syncthreads();
  values[threadIdx.x] = 1;
  *own(out) = values[(threadIdx.x + kWarp) % kThreads];
}

// The last block that writes is the first of the grid.
__global__ void order_of_blocks(float* out) { out[threadIdx.x] = blockIdx.x; }

__global__ void barrier_after_return(float*) {
  if (threadIdx.x >= kWarp) return;
  __syncthreads();
}

__global__ void different_barriers(float*) {
  if (threadIdx.x < kWarp)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void absent_lane(float*) {
  if (threadIdx.x % kWarp < 31) __shfl_sync(0x7fffffffu, 1, 31);
}

__global__ void half_a_warp(float*) {
  if (threadIdx.x % kWarp < 16) __syncwarp();
}

Tensor example(const Tensor& like, int64_t which) {
  constexpr void (*kernels[])(float*) = {sums, shuffles, missing_barrier, order_of_blocks, barrier_after_return,
                                         different_barriers, absent_lane, half_a_warp};
  const Tensor out = empty(like, {2, kThreads}, ScalarType::Float);
  launch(kernels[which], 2, kThreads, out, data<float>(out));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(LLM3D_NAMESPACE, m) { m.def("example(Tensor like, int which) -> Tensor"); }
LLM3D_CUDA(m) { m.impl("example", TORCH_BOX(&example)); }

}  // namespace llm3d
