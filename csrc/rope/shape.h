// What RoPE works on.
#pragma once

#include "common/tensor.h"

namespace llm3d {

struct RopeShape {
  int64_t tokens, heads, half;           // half: pairs of a head
  int64_t token_stride, head_stride;     // in elements
  int64_t positions;                     // rows of the tables
};

inline RopeShape rope_shape(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& positions) {
  check(x.dim() == 3, "x has ", x.dim(), " dimensions, not 3: [tokens, heads, head_dim]");
  check(x.size(2) % 2 == 0, "head_dim ", x.size(2), " is odd");
  check(x.size(2) == 0 || x.stride(2) == 1, "the elements of a head are not side by side");
  const int64_t half = x.size(2) / 2;
  check(cos.dim() == 2 && cos.size(1) == half, "cos is not [positions, ", half, "]");
  check_size(sin, cos.numel(), "sin");
  check_contiguous(cos, "cos");
  check_type(cos, ScalarType::Float, "cos");
  check_type(sin, ScalarType::Float, "sin");
  check_size(positions, x.size(0), "positions");
  check_type(positions, ScalarType::Int, "positions");
  return {x.size(0), x.size(1), half, x.stride(0), x.stride(1), cos.size(0)};
}

}  // namespace llm3d
