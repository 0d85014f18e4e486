// What the update is given, and in which types.
#pragma once

#include "common/tensor.h"

namespace llm3d {

inline void check_adamw(const Tensor& master, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                        const Tensor& gradient, const std::optional<Tensor>& parameter, const Tensor& step,
                        const Tensor& lr, const Tensor& gradient_scale) {
  const int64_t count = master.numel();
  check_type(master, ScalarType::Float, "master");
  check_contiguous(master, "master");
  check_size(exp_avg, count, "exp_avg");
  check_size(exp_avg_sq, count, "exp_avg_sq");
  check_type(exp_avg_sq, exp_avg.scalar_type(), "exp_avg_sq");
  check_size(gradient, count, "gradient");
  if (parameter.has_value()) check_size(*parameter, count, "parameter");
  check_type(step, ScalarType::Long, "step");
  check_type(lr, ScalarType::Double, "lr");
  check_type(gradient_scale, ScalarType::Double, "gradient_scale");
  for (const Tensor* scalar : {&step, &lr, &gradient_scale}) check_size(*scalar, 1, "step, lr or gradient_scale");
}

// Calls body(Type<gradient>, Type<moments>, Type<parameter>); the last is Type<void> where there is no parameter.
template <class F>
void for_adamw_types(const Tensor& gradient, const Tensor& moments, const std::optional<Tensor>& parameter,
                     const F& body) {
  const auto with_moments = [&](auto g, auto p) {
    if (moments.scalar_type() == ScalarType::Float) return body(g, Type<float>{}, p);
    check_type(moments, ScalarType::BFloat16, "exp_avg");
    return body(g, Type<bf16>{}, p);
  };
  const auto with_parameter = [&](auto g) {
    if (!parameter.has_value()) return with_moments(g, Type<void>{});
    if (parameter->scalar_type() == ScalarType::BFloat16) return with_moments(g, Type<bf16>{});
    check_type(*parameter, ScalarType::Half, "parameter");
    return with_moments(g, Type<fp16>{});
  };
  switch (gradient.scalar_type()) {
    case ScalarType::Float:
      return with_parameter(Type<float>{});
    case ScalarType::BFloat16:
      return with_parameter(Type<bf16>{});
    default:
      check_type(gradient, ScalarType::Half, "gradient");
      return with_parameter(Type<fp16>{});
  }
}

}  // namespace llm3d
