// silu(gate) * up and its gradients, for one element.
#pragma once

#include "common/scalar.h"

namespace llm3d {

template <class A>
struct GateUp {
  A gate, up;
};

template <class A>
LLM3D_FUNCTION A swiglu(A gate, A up) {
  return gate / (A(1) + exponential(-gate)) * up;
}

// With s = sigmoid(gate): d silu / d gate = s (1 + gate (1 - s)).
template <class A>
LLM3D_FUNCTION GateUp<A> swiglu_gradient(A gate, A up, A grad) {
  const A s = sigmoid(gate);
  return {grad * up * s * (A(1) + gate * (A(1) - s)), grad * gate * s};
}

}  // namespace llm3d
