// What the passes over the logits are given.
#pragma once

#include "common/tensor.h"

namespace llm3d {

inline Rows check_logits(const Tensor& logits, const Tensor& targets) {
  const Rows rows = rows_of(logits, "logits");
  check_type(targets, ScalarType::Long, "targets");
  check_size(targets, rows.count, "targets");
  return rows;
}

inline void check_factors(const Tensor& logits, int64_t tokens, std::initializer_list<const Tensor*> factors) {
  for (const Tensor* factor : factors) {
    check_type(*factor, arithmetic_type(logits.scalar_type()), "a factor of the gradient");
    check_size(*factor, tokens, "a factor of the gradient");
  }
}

}  // namespace llm3d
