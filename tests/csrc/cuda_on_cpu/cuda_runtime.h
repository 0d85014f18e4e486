// CUDA's language and runtime as far as csrc uses them, for a C++ compiler: kernels run on the CPU, to test them.
//
// A thread of a block is a fiber. It runs until a barrier or a shuffle, where it waits for the others. Each warp goes
// as far as it can before the next one starts, and blocks run last to first, so that a result that rests on a missing
// __syncthreads or on an order of the blocks shows. What would hang or be undefined on a GPU (threads at different
// barriers, a barrier that some have returned before, a shuffle from a lane that takes no part) is an exception.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static  // blocks run one after the other
#define __launch_bounds__(...)

// ---- types ----

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

// ---- the host's side ----

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 3;  // few, so that kernels whose blocks stay and loop do loop
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

// ---- a block's threads ----

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace cuda_on_cpu {

constexpr unsigned kLanes = 32;
constexpr size_t kStack = 256 << 10;  // bytes; untouched pages cost nothing

enum class State { runs, at_block_barrier, at_warp_barrier, returned };

struct Thread {
  State state = State::returned;
  const char* file = nullptr;  // of the barrier
  int line = 0;
  unsigned lanes = 0;  // of the warp's barrier
  unsigned exchanges = 0;  // so far
  alignas(16) char given[2][16];  // by turns: a thread may be one exchange ahead of those who still read
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf place;  // where it stands; unlike swapcontext, jumps make no system call
  bool started = false;
};

class Block {
 public:
  void run(unsigned count, const std::function<void()>& kernel) {
    body = &kernel;
    while (threads.size() < count) start_thread();
    size = count;
    for (unsigned i = 0; i < size; i++) threads[i]->state = State::runs;
    try {
      for (bool done = false; !done; ascending = !ascending) {
        const unsigned warps = (size + kLanes - 1) / kLanes;
        for (unsigned i = 0; i < warps; i++) run_warp((ascending ? i : warps - 1 - i) * kLanes);
        done = release_block();
      }
    } catch (...) {
      threads.clear();  // they stand somewhere inside the kernel
      throw;
    }
  }

  void wait(State at, unsigned lanes, const char* file, int line) {
    Thread& own = *threads[current];
    own.state = at;
    own.lanes = lanes;
    own.file = file;
    own.line = line;
    if (_setjmp(own.place) == 0) _longjmp(scheduler, 1);
  }

  // The value that lane `source` of the own warp gives, once all of `lanes` have given theirs.
  template <class T>
  T exchange(unsigned lanes, T value, unsigned source, const char* file, int line) {
    static_assert(sizeof(T) <= sizeof(Thread::given[0]));
    Thread& own = *threads[current];
    const unsigned turn = own.exchanges++ % 2, first = current / kLanes * kLanes;
    memcpy(own.given[turn], &value, sizeof(T));
    // A lane outside `lanes` is waited for in vain, and then named.
    wait(State::at_warp_barrier, lanes | 1u << lane() | 1u << source, file, line);
    memcpy(&value, threads[first + source]->given[turn], sizeof(T));
    return value;
  }

  unsigned lane() const { return current % kLanes; }

 private:
  std::vector<std::unique_ptr<Thread>> threads;  // those of earlier blocks wait to be used again
  unsigned size = 0, current = 0;
  bool ascending = true;
  const std::function<void()>* body = nullptr;
  jmp_buf scheduler;

  static void enter();

  void start_thread() {
    Thread& added = *threads.emplace_back(std::make_unique<Thread>());
    getcontext(&added.start);
    added.start.uc_stack.ss_sp = added.stack.get();
    added.start.uc_stack.ss_size = kStack;
    makecontext(&added.start, enter, 0);
  }

  // Until its thread waits.
  __attribute__((noinline)) void resume(Thread& thread) {
    if (_setjmp(scheduler) != 0) return;
    if (thread.started) _longjmp(thread.place, 1);
    thread.started = true;
    setcontext(&thread.start);
  }

  // Until each of its threads has returned or waits for the block.
  void run_warp(unsigned first) {
    const unsigned end = std::min(first + kLanes, size);
    do {
      for (unsigned i = first; i < end; i++) {
        if (threads[i]->state != State::runs) continue;
        current = i;
        threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        resume(*threads[i]);
      }
    } while (release_lanes(first, end));
  }

  // Lets those lanes go on who wait for each other and are all there. False: no lane waits for its warp any more.
  bool release_lanes(unsigned first, unsigned end) {
    std::vector<unsigned> complete;
    const Thread* stuck = nullptr;
    for (unsigned i = first; i < end; i++) {
      const Thread& own = *threads[i];
      if (own.state != State::at_warp_barrier) continue;
      bool all = true;
      for (unsigned lane = 0; lane < kLanes; lane++)
        if (own.lanes >> lane & 1) all = all && first + lane < end && meets(own, *threads[first + lane]);
      if (all)
        complete.push_back(i);
      else
        stuck = &own;
    }
    for (const unsigned i : complete) threads[i]->state = State::runs;
    if (complete.empty() && stuck != nullptr) fail("lanes of a warp wait in vain for others of it", *stuck);
    return !complete.empty();
  }

  static bool meets(const Thread& a, const Thread& b) {
    return a.state == b.state && a.lanes == b.lanes && a.line == b.line && strcmp(a.file, b.file) == 0;
  }

  // True when all have returned.
  bool release_block() {
    const Thread& first = *threads[0];
    for (unsigned i = 1; i < size; i++) {
      const Thread &other = *threads[i], &waits = first.state == State::returned ? other : first;
      if (first.state != other.state) fail("a __syncthreads that some threads have returned before", waits);
      if (first.state == State::at_block_barrier && !meets(first, other))
        fail("threads of a block are at different __syncthreads", other);
    }
    if (first.state == State::returned) return true;
    for (unsigned i = 0; i < size; i++) threads[i]->state = State::runs;
    return false;
  }

  [[noreturn]] static void fail(const char* problem, const Thread& waits) {
    std::ostringstream message;
    message << waits.file << ":" << waits.line << ": " << problem << " (block " << blockIdx.x << ", " << blockIdx.y
            << ", " << blockIdx.z << ")";
    throw std::runtime_error(message.str());
  }
};

inline Block block;

inline void Block::enter() {
  for (;;) {
    (*block.body)();
    block.wait(State::returned, 0, nullptr, 0);
  }
}

inline unsigned in_group(unsigned lane, int width) { return block.lane() / width * width + lane; }

}  // namespace cuda_on_cpu

// ---- what kernels call; the file and line are the caller's ----

#define LLM3D_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(LLM3D_CALLER) {
  cuda_on_cpu::block.wait(cuda_on_cpu::State::at_block_barrier, 0, file, line);
}
inline void __syncwarp(unsigned lanes = 0xffffffffu, LLM3D_CALLER) {
  cuda_on_cpu::block.wait(cuda_on_cpu::State::at_warp_barrier, lanes, file, line);
}

template <class T>
T __shfl_sync(unsigned lanes, T value, int source, int width = 32, LLM3D_CALLER) {
  return cuda_on_cpu::block.exchange(lanes, value, cuda_on_cpu::in_group(source % width, width), file, line);
}
template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int mask, int width = 32, LLM3D_CALLER) {
  const int source = static_cast<int>(cuda_on_cpu::block.lane() % width) ^ mask;
  return __shfl_sync(lanes, value, source < width ? source : source ^ mask, width, file, line);
}
template <class T>
T __shfl_down_sync(unsigned lanes, T value, unsigned delta, int width = 32, LLM3D_CALLER) {
  const int own = cuda_on_cpu::block.lane() % width, source = own + static_cast<int>(delta);
  return __shfl_sync(lanes, value, source < width ? source : own, width, file, line);
}

inline unsigned __ballot_sync(unsigned lanes, int predicate, LLM3D_CALLER) {
  unsigned votes = 0;
  for (unsigned lane = 0; lane < cuda_on_cpu::kLanes; lane++)
    if (lanes >> lane & 1) votes |= (__shfl_sync(lanes, predicate, lane, 32, file, line) != 0 ? 1u : 0u) << lane;
  return votes;
}
inline int __any_sync(unsigned lanes, int predicate, LLM3D_CALLER) {
  return __ballot_sync(lanes, predicate, file, line) != 0;
}

inline float rsqrtf(float x) { return 1 / sqrtf(x); }

namespace llm3d {

template <class... Parameters, class X, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, const X&, Arguments... arguments) {
  const std::function<void()> body = [&] { kernel(static_cast<Parameters>(arguments)...); };
  gridDim = blocks;
  blockDim = threads;
  for (unsigned left = blocks.x * blocks.y * blocks.z; left > 0; left--) {
    const unsigned at = left - 1;
    blockIdx = {at % blocks.x, at / blocks.x % blocks.y, at / blocks.x / blocks.y};
    cuda_on_cpu::block.run(threads.x * threads.y * threads.z, body);
  }
}

}  // namespace llm3d
