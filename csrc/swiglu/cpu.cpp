// SwiGLU on the fused output of the gate and up projections: silu(gate) * up. Shazeer 2020.
//
// gate_up: [tokens, 2 * intermediate], a row's gates before its ups.
#include "common/cpu.h"
#include "swiglu/math.h"
#include "swiglu/shape.h"

namespace llm3d {
namespace {

constexpr int64_t kGrain = 1 << 13;  // elements a thread is worth starting for

template <class T>
void forward_row(const T* gate, const T* up, T* out, int64_t columns) {
  const auto block = [=](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; i++) out[i] = narrow<T>(swiglu(widen(gate[i]), widen(up[i])));
  };
  in_blocks(columns, block, gate, up, out);
}

template <class T>
void backward_row(const T* grad, T* gate, T* up, int64_t columns) {
  const auto block = [=](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; i++) {
      const auto g = swiglu_gradient(widen(gate[i]), widen(up[i]), widen(grad[i]));
      gate[i] = narrow<T>(g.gate);
      up[i] = narrow<T>(g.up);
    }
  };
  in_blocks(columns, block, grad, gate, up);
}

Tensor swiglu_forward(const Tensor& gate_up) {
  const Rows rows = check_gate_up(gate_up);
  const int64_t columns = rows.columns / 2;
  Tensor out = empty(gate_up, {rows.count, columns}, gate_up.scalar_type());
  for_floating_type(gate_up.scalar_type(), "swiglu_forward", [&](auto type) {
    using T = typename decltype(type)::type;
    const T* in = data<T>(gate_up);
    T* to = data<T>(out);
    parallel_rows(rows, kGrain, [&](int64_t row) {
      const T* gate = in + row * rows.stride;
      forward_row<T>(gate, gate + columns, to + row * columns, columns);
    });
  });
  return out;
}

void swiglu_backward_(const Tensor& grad_out, Tensor gate_up) {
  const Rows rows = check_gate_up(gate_up), grads = check_grad_out(grad_out, gate_up, rows);
  for_floating_type(gate_up.scalar_type(), "swiglu_backward_", [&](auto type) {
    using T = typename decltype(type)::type;
    const T* grad = data<T>(grad_out);
    T* in = data<T>(gate_up);
    parallel_rows(rows, kGrain, [&](int64_t row) {
      T* gate = in + row * rows.stride;
      backward_row<T>(grad + row * grads.stride, gate, gate + grads.columns, grads.columns);
    });
  });
}

}  // namespace

LLM3D_CPU(m) {
  m.impl("swiglu_forward", LLM3D_OP(swiglu_forward));
  m.impl("swiglu_backward_", LLM3D_OP(swiglu_backward_));
}

}  // namespace llm3d
