// Rotary position embeddings in place, on a GPU.
//
// The pair (a, b) = (x[i], x[i + head_dim / 2]) of a head of the token at position p, with c and s from row p of the
// tables, becomes (a c - b s, b c + a s); backward, with -s, turns it back.
//
// A block takes a few tokens, and all its threads share the packs of all their heads. A token's row of the tables
// comes from memory once and stays in the first-level cache for its other heads.
#include "common/elements.h"
#include "rope/shape.h"

namespace llm3d {
namespace {

constexpr int kThreads = 256;
constexpr int kTokens = 4;  // a block's

template <class T, int n>
__device__ __forceinline__ void rotate(T* first, T* second, const float* __restrict__ cos,
                                       const float* __restrict__ sin, float direction) {
  using A = arithmetic<T>;
  auto x = load<n>(first), y = load<n>(second);
  const auto c = load<n>(cos), s = load<n>(sin);
#pragma unroll
  for (int i = 0; i < n; i++) {
    const A a = widen(x.values[i]), b = widen(y.values[i]), turn = s.values[i] * direction;
    x.values[i] = narrow<T>(a * c.values[i] - b * turn);
    y.values[i] = narrow<T>(b * c.values[i] + a * turn);
  }
  store<n>(first, x);
  store<n>(second, y);
}

template <class T, int n>
__global__ void __launch_bounds__(kThreads)
    rope_kernel(T* x, const float* __restrict__ cos, const float* __restrict__ sin,
                const int32_t* __restrict__ positions, RopeShape shape, float direction) {
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kTokens;
  const int64_t left = shape.tokens - first_token;
  const int tokens = left < kTokens ? static_cast<int>(left) : kTokens;
  const int half = shape.half, heads = shape.heads, packs = half / n;
  for (int i = threadIdx.x; i < tokens * heads * packs; i += kThreads) {
    const int column = i % packs * n, head = i / packs % heads;
    const int64_t token = first_token + i / packs / heads, position = positions[token];
    // A position that the tables do not have is the caller's mistake: the token stays as it is.
    if (position < 0 || position >= shape.positions) continue;
    T* first = x + token * shape.token_stride + head * shape.head_stride + column;
    const int64_t at = position * half + column;
    rotate<T, n>(first, first + half, cos + at, sin + at, direction);
  }
}

void rope_(Tensor x, const Tensor& cos, const Tensor& sin, const Tensor& positions, bool inverse) {
  const RopeShape shape = rope_shape(x, cos, sin, positions);
  check(shape.heads * shape.half < (int64_t{1} << 28), shape.heads, " heads of ", 2 * shape.half, " are too many");
  const float *cosines = data<float>(cos), *sines = data<float>(sin);
  for_floating_type(x.scalar_type(), "rope_", [&](auto type) {
    using T = typename decltype(type)::type;
    T* heads = data<T>(x);
    const bool packs = in_packs(heads, shape.token_stride, shape.half) &&
                       in_packs(heads, shape.head_stride, shape.half) &&
                       in_packs(cosines, shape.half, shape.half) && in_packs(sines, shape.half, shape.half);
    for_width<T>(packs, [&](auto width) {
      constexpr int n = decltype(width)::value;
      launch(rope_kernel<T, n>, grid_of((shape.tokens + kTokens - 1) / kTokens, 1), kThreads, x, heads, cosines,
             sines, data<int32_t>(positions), shape, inverse ? -1.0f : 1.0f);
    });
  });
}

}  // namespace

LLM3D_CUDA(m) { m.impl("rope_", LLM3D_OP(rope_)); }

}  // namespace llm3d
