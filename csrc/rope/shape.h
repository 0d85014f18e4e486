// What RoPE works on, and a token's position in its sequence.
#pragma once

#include "common/tensor.h"

namespace llm3d {

struct RopeShape {
  int64_t tokens, heads, half;           // half: pairs of a head
  int64_t token_stride, head_stride;     // in elements
  int64_t positions, sequences;          // rows of the tables; sequences of cu_seqlens
};

inline RopeShape rope_shape(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& cu_seqlens) {
  check(x.dim() == 3, "x has ", x.dim(), " dimensions, not 3: [tokens, heads, head_dim]");
  check(x.size(2) % 2 == 0, "head_dim ", x.size(2), " is odd");
  check(x.size(2) == 0 || x.stride(2) == 1, "the elements of a head are not side by side");
  const int64_t half = x.size(2) / 2;
  check(cos.dim() == 2 && cos.size(1) == half, "cos is not [positions, ", half, "]");
  check_size(sin, cos.numel(), "sin");
  check_contiguous(cos, "cos");
  check_type(cos, ScalarType::Float, "cos");
  check_type(sin, ScalarType::Float, "sin");
  check_type(cu_seqlens, ScalarType::Int, "cu_seqlens");
  check(cu_seqlens.dim() == 1 && cu_seqlens.numel() > 0, "cu_seqlens is not [sequences + 1]");
  check_contiguous(cu_seqlens, "cu_seqlens");
  return {x.size(0), x.size(1), half, x.stride(0), x.stride(1), cos.size(0), cu_seqlens.numel() - 1};
}

// The last start at or before the token, by bisection; -1 for a token that is in no sequence.
LLM3D_FUNCTION int64_t position_of(int64_t token, const int32_t* starts, int64_t sequences) {
  int64_t low = 0, high = sequences;  // starts[low] <= token < starts[high]
  if (token < starts[0] || token >= starts[sequences]) return -1;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (starts[middle] <= token)
      low = middle;
    else
      high = middle;
  }
  return token - starts[low];
}

}  // namespace llm3d
