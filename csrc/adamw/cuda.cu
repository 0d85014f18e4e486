// AdamW over a flat range of parameters, in one pass, on a GPU: as cpu.cpp, four parameters of a thread at once.
//
// Step, learning rate and gradient scale are read on the device, so that a captured graph goes on with the next ones:
// a thread of each block works out what is the same for all parameters of the step (math.h), then with the scaled
// gradient g
//
//   m = m + (1 - beta1) (g - m)        v = beta2 v + (1 - beta2) g^2
//   w = w (1 - lr weight_decay) - lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps)
#include "adamw/math.h"
#include "adamw/shape.h"
#include "common/elements.h"

namespace llm3d {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksEach = 4;  // of a multiprocessor, as many as run at once: each works out the constants
constexpr int kFour = 4;        // 16 bytes of fp32, 8 of bf16

struct Settings {
  const int64_t* step;
  const double *lr, *gradient_scale;
  double beta1, beta2, eps, weight_decay;
  uint64_t seed, offset;
};

// G, M, P: types of gradient, moments and parameter, P void for none.
template <class G, class M, class P>
struct Flat {
  float* master;
  M *exp_avg, *exp_avg_sq;
  const G* gradient;
  P* parameter;
  int64_t count;
};

template <class M>
__device__ __forceinline__ M moment(float x, const AdamW& step, uint64_t index, uint32_t stream) {
  if constexpr (std::is_same_v<M, bf16>)
    return narrow_stochastically(x, random16(step.seed, index, stream));
  else
    return x;
}

// The n parameters from `i` on; `offset`: what random numbers count the first of all as.
template <int n, class G, class M, class P>
__device__ __forceinline__ void update(const AdamW& step, const Flat<G, M, P>& flat, int64_t i, uint64_t offset) {
  auto master = load<n>(flat.master + i);
  auto exp_avg = load<n>(flat.exp_avg + i), exp_avg_sq = load<n>(flat.exp_avg_sq + i);
  const auto gradient = load<n>(flat.gradient + i);
#pragma unroll
  for (int k = 0; k < n; k++) {
    const AdamWState before{master.values[k], widen(exp_avg.values[k]), widen(exp_avg_sq.values[k])};
    const AdamWState updated = adamw(step, before, widen(gradient.values[k]));
    master.values[k] = updated.master;
    exp_avg.values[k] = moment<M>(updated.exp_avg, step, offset + i + k, 0);
    exp_avg_sq.values[k] = moment<M>(updated.exp_avg_sq, step, offset + i + k, 1);
  }
  store<n>(flat.master + i, master);
  store<n>(flat.exp_avg + i, exp_avg);
  store<n>(flat.exp_avg_sq + i, exp_avg_sq);
  if constexpr (!std::is_void_v<P>) {
    Elements<P, n> parameter;
#pragma unroll
    for (int k = 0; k < n; k++) parameter.values[k] = narrow<P>(master.values[k]);
    store<n>(flat.parameter + i, parameter);
  }
}

// `fours` packs of four, the rest one by one.
template <class G, class M, class P>
__global__ void __launch_bounds__(kThreads) adamw_kernel(Flat<G, M, P> flat, Settings settings, int64_t fours) {
  __shared__ AdamW constants;
  const double scale = *settings.gradient_scale;
  if (!(scale - scale == 0)) return;  // not finite: this step is not taken
  if (threadIdx.x == 0)
    constants = adamw_of_step(*settings.lr, static_cast<double>(*settings.step), scale, settings.beta1,
                              settings.beta2, settings.eps, settings.weight_decay, settings.seed);
  __syncthreads();
  const AdamW step = constants;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t all = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t four = first; four < fours; four += all) update<kFour>(step, flat, four * kFour, settings.offset);
  for (int64_t i = fours * kFour + first; i < flat.count; i += all) update<1>(step, flat, i, settings.offset);
}

template <class T>
bool in_fours(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % (kFour * sizeof(T)) == 0;
}
bool in_fours(const void* none) { return none == nullptr; }

void adamw_(Tensor master, Tensor exp_avg, Tensor exp_avg_sq, const Tensor& gradient,
            std::optional<Tensor> parameter, const Tensor& step, const Tensor& lr, const Tensor& gradient_scale,
            double beta1, double beta2, double eps, double weight_decay, int64_t seed, int64_t offset) {
  check_adamw(master, exp_avg, exp_avg_sq, gradient, parameter, step, lr, gradient_scale);
  const Settings settings{data<int64_t>(step), data<double>(lr), data<double>(gradient_scale),
                          beta1, beta2, eps, weight_decay,
                          static_cast<uint64_t>(seed), static_cast<uint64_t>(offset)};
  for_adamw_types(gradient, exp_avg, parameter, [&](auto g, auto m, auto p) {
    using G = typename decltype(g)::type;
    using M = typename decltype(m)::type;
    using P = typename decltype(p)::type;
    const Flat<G, M, P> flat{data<float>(master), data<M>(exp_avg), data<M>(exp_avg_sq), data<G>(gradient),
                             parameter.has_value() ? data<P>(*parameter) : nullptr, master.numel()};
    const bool aligned = in_fours(flat.master) && in_fours(flat.exp_avg) && in_fours(flat.exp_avg_sq) &&
                         in_fours(flat.gradient) && in_fours(flat.parameter);
    const int64_t fours = aligned ? flat.count / kFour : 0, a_block = int64_t{kThreads} * (aligned ? kFour : 1);
    const int64_t most = multiprocessors(master) * kBlocksEach, needed = (flat.count + a_block - 1) / a_block;
    launch(adamw_kernel<G, M, P>, static_cast<unsigned>(std::min(most, needed)), kThreads, master, flat, settings, fours);
  });
}

}  // namespace

LLM3D_CUDA(m) { m.impl("adamw_", LLM3D_OP(adamw_)); }

}  // namespace llm3d
