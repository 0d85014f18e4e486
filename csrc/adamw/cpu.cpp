// AdamW over a flat range of parameters, in one pass: gradient in, master weight and moments updated, parameter out.
//
// Memory a parameter, bf16 gradient in and bf16 parameter out: 2 + 12 bytes read, 12 + 2 written. The arithmetic hides
// behind that. What is written without being read, the parameter, is stored past the caches.
#include "adamw/math.h"
#include "adamw/shape.h"
#include "common/cpu.h"
#include "common/stream.h"

namespace llm3d {
namespace {

constexpr int64_t kGrain = 32 * kBlock;  // parameters a thread is worth starting for

// P: what to write out, void for nothing.
template <class G, class M, class P>
void update_block(const AdamW& step, float* __restrict master, M* __restrict exp_avg, M* __restrict exp_avg_sq,
                  const G* __restrict gradient, P* __restrict parameter, int64_t count, uint64_t index) {
#pragma omp simd
  for (int64_t i = 0; i < count; i++) {
    const AdamWState updated =
        adamw(step, {master[i], widen(exp_avg[i]), widen(exp_avg_sq[i])}, widen(gradient[i]));
    master[i] = updated.master;
    if constexpr (std::is_same_v<M, bf16>) {
      exp_avg[i] = narrow_stochastically(updated.exp_avg, random16(step.seed, index + i, 0));
      exp_avg_sq[i] = narrow_stochastically(updated.exp_avg_sq, random16(step.seed, index + i, 1));
    } else {
      exp_avg[i] = updated.exp_avg;
      exp_avg_sq[i] = updated.exp_avg_sq;
    }
    if constexpr (!std::is_void_v<P>) parameter[i] = narrow<P>(updated.master);
  }
}

void adamw_(Tensor master, Tensor exp_avg, Tensor exp_avg_sq, const Tensor& gradient,
            std::optional<Tensor> parameter, const Tensor& step, const Tensor& lr, const Tensor& gradient_scale,
            double beta1, double beta2, double eps, double weight_decay, int64_t seed, int64_t offset) {
  check_adamw(master, exp_avg, exp_avg_sq, gradient, parameter, step, lr, gradient_scale);
  const double scale = *data<double>(gradient_scale);
  if (!std::isfinite(scale)) return;
  const AdamW constants = adamw_of_step(*data<double>(lr), static_cast<double>(*data<int64_t>(step)), scale,
                                        beta1, beta2, eps, weight_decay, static_cast<uint64_t>(seed));
  const int64_t blocks = (master.numel() + kBlock - 1) / kBlock;
  for_adamw_types(gradient, exp_avg, parameter, [&](auto g, auto m, auto p) {
    using G = typename decltype(g)::type;
    using M = typename decltype(m)::type;
    using P = typename decltype(p)::type;
    float* masters = data<float>(master);
    M *averages = data<M>(exp_avg), *squares = data<M>(exp_avg_sq);
    const G* gradients = data<G>(gradient);
    parallel_ranges(blocks, kGrain / kBlock, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; block++) {
        const int64_t start = block * kBlock, count = std::min(kBlock, master.numel() - start);
        if constexpr (std::is_void_v<P>) {
          update_block<G, M, void>(constants, masters + start, averages + start, squares + start,
                                   gradients + start, nullptr, count, offset + start);
        } else {
          alignas(64) P gathered[kBlock];
          update_block<G, M, P>(constants, masters + start, averages + start, squares + start, gradients + start,
                                gathered, count, offset + start);
          stream_out(data<P>(*parameter) + start, gathered, count * sizeof(P));
        }
      }
      finish_streaming();
    });
  });
}

}  // namespace

LLM3D_CPU(m) { m.impl("adamw_", LLM3D_OP(adamw_)); }

}  // namespace llm3d
