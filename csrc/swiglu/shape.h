// What SwiGLU is given.
#pragma once

#include "common/tensor.h"

namespace llm3d {

inline Rows check_gate_up(const Tensor& gate_up) {
  const Rows rows = rows_of(gate_up, "gate_up");
  check(rows.columns % 2 == 0, "gate_up has ", rows.columns, " columns, an odd number");
  return rows;
}

inline Rows check_grad_out(const Tensor& grad_out, const Tensor& gate_up, const Rows& rows) {
  const Rows grads = rows_of(grad_out, "grad_out");
  check(grads.count == rows.count && 2 * grads.columns == rows.columns, "grad_out does not fit gate_up");
  check_type(grad_out, gate_up.scalar_type(), "grad_out");
  return grads;
}

}  // namespace llm3d
