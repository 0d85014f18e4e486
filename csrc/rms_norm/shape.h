// What RMSNorm and its backward are given.
#pragma once

#include "common/tensor.h"

namespace llm3d {

// A matrix like x, named in errors; its stride between rows.
inline int64_t stride_like(const Tensor& other, const char* name, const Tensor& x, const Rows& rows) {
  const Rows given = rows_of(other, name);
  check(given.count == rows.count && given.columns == rows.columns, name, " and x differ in shape");
  check(other.scalar_type() == x.scalar_type(), name, " and x differ in dtype");
  return given.stride;
}

struct NormShape {
  Rows x;
  int64_t residual_stride;
};

inline NormShape norm_shape(const Tensor& x, const Tensor* residual, const Tensor& weight) {
  const Rows rows = rows_of(x, "x");
  check_size(weight, rows.columns, "weight");
  check_type(weight, x.scalar_type(), "weight");
  return {rows, residual == nullptr ? 0 : stride_like(*residual, "residual", x, rows)};
}

struct NormGradientShape {
  Rows x;
  int64_t grad_stride, sum_stride;
};

inline NormGradientShape norm_gradient_shape(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                             const Tensor& inverse_rms, const std::optional<Tensor>& grad_sum) {
  const Rows rows = norm_shape(x, nullptr, weight).x;
  check_size(inverse_rms, rows.count, "inverse_rms");
  check_type(inverse_rms, arithmetic_type(x.scalar_type()), "inverse_rms");
  return {rows, stride_like(grad_y, "grad_y", x, rows),
          grad_sum.has_value() ? stride_like(*grad_sum, "grad_sum", x, rows) : 0};
}

}  // namespace llm3d
