// SwiGLU on the fused output of the gate and up projections, on a GPU; the arithmetic is that of swiglu/math.h.
//
// gate_up: [tokens, 2 * intermediate], a row's gates before its ups. A thread takes a pack of gates and the pack of
// ups that belongs to it; the blocks of a row follow each other.
//
//   forward:   out = silu(gate) * up                                                   3 numbers moved an element
//   backward:  gate, up = grad * up * d silu(gate) / d gate, grad * silu(gate)         5 numbers, in place
#include "common/elements.h"
#include "swiglu/math.h"
#include "swiglu/shape.h"

namespace llm3d {
namespace {

constexpr int kThreads = 256;

struct SwigluShape {
  int64_t columns, stride, grad_stride;  // of a row's gates; from row to row of gate_up and of grad_out
  unsigned parts;                        // blocks of a row
};

template <int n>
__device__ __forceinline__ int64_t column_of(const SwigluShape& shape) {
  return (blockIdx.x % shape.parts * kThreads + threadIdx.x) * n;  // in 32 bits, or nvcc splits the packs' stores
}

template <class T, int n>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const T* __restrict__ gate_up, T* __restrict__ out, SwigluShape shape) {
  const int64_t row = blockIdx.x / shape.parts, column = column_of<n>(shape);
  if (column >= shape.columns) return;
  const T* from = gate_up + row * shape.stride + column;
  const auto gate = load<n>(from), up = load<n>(from + shape.columns);
  Elements<T, n> y;
#pragma unroll
  for (int i = 0; i < n; i++) y.values[i] = narrow<T>(swiglu(widen(gate.values[i]), widen(up.values[i])));
  store<n>(out + row * shape.columns + column, y);
}

template <class T, int n>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const T* __restrict__ grad_out, T* __restrict__ gate_up, SwigluShape shape) {
  const int64_t row = blockIdx.x / shape.parts, column = column_of<n>(shape);
  if (column >= shape.columns) return;
  T* at = gate_up + row * shape.stride + column;
  const auto grad = load<n>(grad_out + row * shape.grad_stride + column);
  auto gate = load<n>(at), up = load<n>(at + shape.columns);
#pragma unroll
  for (int i = 0; i < n; i++) {
    const auto g = swiglu_gradient(widen(gate.values[i]), widen(up.values[i]), widen(grad.values[i]));
    gate.values[i] = narrow<T>(g.gate);
    up.values[i] = narrow<T>(g.up);
  }
  store<n>(at, gate);
  store<n>(at + shape.columns, up);
}

SwigluShape shape_of(const Rows& gate_up, int64_t grad_stride, int width) {
  const int64_t columns = gate_up.columns / 2, a_block = static_cast<int64_t>(kThreads) * width;
  check(columns < (int64_t{1} << 31), "gate_up has ", gate_up.columns, " columns, too many");
  return {columns, gate_up.stride, grad_stride, static_cast<unsigned>((columns + a_block - 1) / a_block)};
}

Tensor swiglu_forward(const Tensor& gate_up) {
  const Rows rows = check_gate_up(gate_up);
  const int64_t columns = rows.columns / 2;
  Tensor out = empty(gate_up, {rows.count, columns}, gate_up.scalar_type());
  for_floating_type(gate_up.scalar_type(), "swiglu_forward", [&](auto type) {
    using T = typename decltype(type)::type;
    const T* in = data<T>(gate_up);
    for_width<T>(in_packs(in, rows.stride, columns), [&](auto width) {
      constexpr int n = decltype(width)::value;
      const SwigluShape shape = shape_of(rows, 0, n);
      launch(forward_kernel<T, n>, grid_of(rows.count, shape.parts), kThreads, gate_up, in, data<T>(out), shape);
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
    const bool packs = in_packs(in, rows.stride, grads.columns) && in_packs(grad, grads.stride, grads.columns);
    for_width<T>(packs, [&](auto width) {
      constexpr int n = decltype(width)::value;
      const SwigluShape shape = shape_of(rows, grads.stride, n);
      launch(backward_kernel<T, n>, grid_of(rows.count, shape.parts), kThreads, gate_up, grad, in, shape);
    });
  });
}

}  // namespace

LLM3D_CUDA(m) {
  m.impl("swiglu_forward", LLM3D_OP(swiglu_forward));
  m.impl("swiglu_backward_", LLM3D_OP(swiglu_backward_));
}

}  // namespace llm3d
