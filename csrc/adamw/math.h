// AdamW's update of one element (Loshchilov and Hutter 2019), and stochastic rounding to bf16.
#pragma once

#include "common/scalar.h"

namespace llm3d {

// What is the same for every element of a step.
struct AdamW {
  float gradient_scale;  // unscaling and clipping
  float beta2, eps;
  float gain1, gain2;  // 1 - beta1, 1 - beta2: from beta2 in float, the latter would be off by up to 1e-4
  float decay;      // 1 - lr * weight_decay
  float step_size;  // lr / (1 - beta1^step)
  float root_of_correction2;  // 1 / sqrt(1 - beta2^step)
  uint32_t seed;    // of stochastic rounding, of this step
};

// betas, eps and weight_decay as set; step counts from 1. In double, rounded once.
LLM3D_FUNCTION AdamW adamw_of_step(double lr, double step, double gradient_scale, double beta1, double beta2,
                                   double eps, double weight_decay, uint64_t seed) {
  const double correction1 = 1 - pow(beta1, step), correction2 = 1 - pow(beta2, step);
  const uint64_t mixed = (seed * 0x9e3779b97f4a7c15u) ^ (static_cast<uint64_t>(step) * 0xd1342543de82ef95u);
  return {static_cast<float>(gradient_scale),
          static_cast<float>(beta2),
          static_cast<float>(eps),
          static_cast<float>(1 - beta1),
          static_cast<float>(1 - beta2),
          static_cast<float>(1 - lr * weight_decay),
          static_cast<float>(lr / correction1),
          static_cast<float>(1 / sqrt(correction2)),
          static_cast<uint32_t>(mixed ^ (mixed >> 32))};
}

struct AdamWState {
  float master, exp_avg, exp_avg_sq;
};

LLM3D_FUNCTION AdamWState adamw(const AdamW& step, AdamWState state, float gradient) {
  const float g = gradient * step.gradient_scale;
  const float exp_avg = state.exp_avg + step.gain1 * (g - state.exp_avg);
  const float exp_avg_sq = step.beta2 * state.exp_avg_sq + step.gain2 * g * g;
  const float denominator = sqrtf(exp_avg_sq) * step.root_of_correction2 + step.eps;
  return {state.master * step.decay - step.step_size * (exp_avg / denominator), exp_avg, exp_avg_sq};
}

// 16 random bits for element `index` of a step: a hash, so that nothing is stored and any part can be computed alone.
LLM3D_FUNCTION uint32_t random16(uint32_t seed, uint64_t index, uint32_t stream) {
  uint32_t x = static_cast<uint32_t>(index) ^ (static_cast<uint32_t>(index >> 32) * 0x85ebca6bu) ^ seed;
  x = (x ^ (x >> 16)) * 0x7feb352du;  // lowbias32, Wellons 2018
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  x = x ^ (x >> 16);
  return stream == 0 ? x & 0xffffu : x >> 16;
}

// To one of the two neighbors in bf16, the nearer the likelier, so that the mean over many is x.
LLM3D_FUNCTION bf16 narrow_stochastically(float x, uint32_t random) {
  const uint32_t bits = to_bits(x), special = (bits & 0x7f800000u) == 0x7f800000u;
  const uint32_t rounded = (bits + (special ? 0u : random)) >> 16;
  return {static_cast<uint16_t>(x == x ? rounded : 0x7fc0u)};
}

}  // namespace llm3d
