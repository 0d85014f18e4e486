// The two passes over the logits that a cross-entropy makes, for one part of the vocabulary, on a GPU.
//
// Forward, a block a row, reads them once. Of its own elements a thread keeps the maximum m, the sum l of
// exp(x - m), rescaled where the maximum grows (Milakov and Gimelshein 2018), and the sum of x; the block's are
//
//   M = max m        L = sum of l exp(m - M)        S = sum of the sums
//
// added in a fixed order. Backward overwrites the logits, a thread a few packs:
//
//   grad = scale * exp(x - maximum) + shift, plus at_target at the target
#include "common/elements.h"
#include "cross_entropy/shape.h"

namespace llm3d {
namespace {

constexpr int kStatsThreads = 512;
constexpr int kGradientThreads = 256;
constexpr int kLoads = 4;  // packs that a thread has under way

// ---- forward ----

// The largest value of the block's threads, in every thread.
template <int warps, class A>
__device__ __forceinline__ A block_max(A value) {
  __shared__ A partial[warps];
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value = fmax(value, __shfl_xor_sync(kAllLanes, value, offset));
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < warps; warp++) value = fmax(value, partial[warp]);
  return value;
}

template <class A>
struct Softmax {
  A maximum, total, sum;

  template <class T, int n>
  __device__ __forceinline__ void take(const Elements<T, n>& x) {
    A largest = maximum;
#pragma unroll
    for (int i = 0; i < n; i++) largest = fmax(largest, widen(x.values[i]));  // NaN is passed over: total carries it
    if (largest > maximum) {
      total *= exponential(maximum - largest);
      maximum = largest;
    }
    const A origin = maximum == A(-HUGE_VAL) ? A(0) : maximum;  // -inf - -inf is no number
#pragma unroll
    for (int i = 0; i < n; i++) {
      total += exponential(widen(x.values[i]) - origin);
      sum += widen(x.values[i]);
    }
  }
};

template <class T, int n, class A = arithmetic<T>>
__global__ void __launch_bounds__(kStatsThreads)
    stats_kernel(const T* __restrict__ logits, const int64_t* __restrict__ targets, A* __restrict__ stats, Rows rows) {
  constexpr int warps = kStatsThreads / kWarp, step = kStatsThreads * n;
  const int64_t row = blockIdx.x;
  const T* x = logits + row * rows.stride;
  Softmax<A> own{A(-HUGE_VAL), 0, 0};
  for (int64_t start = threadIdx.x * n; start < rows.columns; start += step * kLoads) {
    Elements<T, n> packs[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; k++)
      if (start + k * step < rows.columns) packs[k] = load<n>(x + start + k * step);
#pragma unroll
    for (int k = 0; k < kLoads; k++)
      if (start + k * step < rows.columns) own.take(packs[k]);
  }
  const A maximum = block_max<warps>(own.maximum);
  const A shrink = own.maximum == maximum ? A(1) : exponential(own.maximum - maximum);
  const A total = block_sum<warps>(own.total * shrink), sum = block_sum<warps>(own.sum);
  if (threadIdx.x != 0) return;
  const int64_t target = targets[row];
  stats[row] = maximum;
  stats[rows.count + row] = total;
  stats[2 * rows.count + row] = target >= 0 && target < rows.columns ? widen(x[target]) : A(0);
  stats[3 * rows.count + row] = sum;
}

Tensor softmax_stats(const Tensor& logits, const Tensor& targets) {
  const Rows rows = check_logits(logits, targets);
  Tensor stats = empty(logits, {4, rows.count}, arithmetic_type(logits.scalar_type()));
  for_floating_type(logits.scalar_type(), "softmax_stats", [&](auto type) {
    using T = typename decltype(type)::type;
    const T* x = data<T>(logits);
    for_width<T>(in_packs(x, rows.stride, rows.columns), [&](auto width) {
      launch(stats_kernel<T, decltype(width)::value>, grid_of(rows.count, 1), kStatsThreads, logits, x,
             data<int64_t>(targets), data<arithmetic<T>>(stats), rows);
    });
  });
  return stats;
}

// ---- backward ----

template <class A>
struct Factors {
  const A *maximum, *scale, *at_target, *shift;  // [tokens] each
};

template <class T, int n, class A = arithmetic<T>>
__global__ void __launch_bounds__(kGradientThreads)
    gradient_kernel(T* __restrict__ logits, const int64_t* __restrict__ targets, Factors<A> factors, Rows rows,
                    unsigned parts) {
  constexpr unsigned step = kGradientThreads * n;
  const int64_t row = blockIdx.x / parts;
  const unsigned start = blockIdx.x % parts * step * kLoads + threadIdx.x * n;  // of 32 bits, see swiglu/cuda.cu
  const A maximum = factors.maximum[row], scale = factors.scale[row];
  const A at_target = factors.at_target[row], shift = factors.shift[row];
  const int64_t target = targets[row];
  const bool counts = scale != 0 || at_target != 0 || shift != 0;  // else 0, whatever the logits are, NaN too
  T* x = logits + row * rows.stride + start;
  Elements<T, n> packs[kLoads];
#pragma unroll
  for (int k = 0; k < kLoads; k++)
    if (counts && start + k * step < rows.columns) packs[k] = load<n>(x + k * step);
#pragma unroll
  for (int k = 0; k < kLoads; k++) {
    if (start + k * step >= rows.columns) break;
    const int64_t at = target - static_cast<int64_t>(start + k * step);  // the target's place in this pack
#pragma unroll
    for (int i = 0; i < n; i++) {
      const A own = at == i ? at_target : A(0);
      const A value = scale * exponential(widen(packs[k].values[i]) - maximum) + shift + own;
      packs[k].values[i] = narrow<T>(counts ? value : A(0));
    }
    store<n>(x + k * step, packs[k]);
  }
}

void cross_entropy_backward_(Tensor logits, const Tensor& targets, const Tensor& maximum,
                             const Tensor& scale, const Tensor& at_target, const Tensor& shift) {
  const Rows rows = check_logits(logits, targets);
  check_factors(logits, rows.count, {&maximum, &scale, &at_target, &shift});
  check(rows.columns < (int64_t{1} << 31), "logits has ", rows.columns, " columns, too many");
  for_floating_type(logits.scalar_type(), "cross_entropy_backward_", [&](auto type) {
    using T = typename decltype(type)::type;
    using A = arithmetic<T>;
    T* x = data<T>(logits);
    const Factors<A> factors{data<A>(maximum), data<A>(scale), data<A>(at_target), data<A>(shift)};
    for_width<T>(in_packs(x, rows.stride, rows.columns), [&](auto width) {
      constexpr int n = decltype(width)::value, a_block = kGradientThreads * n * kLoads;
      const int64_t parts = (rows.columns + a_block - 1) / a_block;
      launch(gradient_kernel<T, n>, grid_of(rows.count, parts), kGradientThreads, logits, x, data<int64_t>(targets),
             factors, rows, static_cast<unsigned>(parts));
    });
  });
}

}  // namespace

LLM3D_CUDA(m) {
  m.impl("softmax_stats", LLM3D_OP(softmax_stats));
  m.impl("cross_entropy_backward_", LLM3D_OP(cross_entropy_backward_));
}

}  // namespace llm3d
