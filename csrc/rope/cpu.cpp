// Rotary position embeddings in place, in the half-split convention of Hugging Face's LLaMA. Su et al. 2021.
//
// The pair (x[i], x[i + head_dim / 2]) of a head of the token at position p turns by the angle in row p of the
// tables; backward turns it back.
#include "common/cpu.h"
#include "rope/shape.h"

namespace llm3d {
namespace {

constexpr int64_t kGrain = 1 << 13;  // elements a thread is worth starting for

template <class T>
void rotate_head(T* __restrict first, T* __restrict second, const float* __restrict cos,
                 const float* __restrict sin, int64_t half, float direction) {
  using A = arithmetic<T>;
  fetch_ahead(first, 2 * half);
#pragma omp simd
  for (int64_t i = 0; i < half; i++) {
    const A a = widen(first[i]), b = widen(second[i]), s = sin[i] * direction;
    first[i] = narrow<T>(a * cos[i] - b * s);
    second[i] = narrow<T>(b * cos[i] + a * s);
  }
}

void rope_(Tensor x, const Tensor& cos, const Tensor& sin, const Tensor& positions, bool inverse) {
  const RopeShape shape = rope_shape(x, cos, sin, positions);
  const int32_t* at = data<int32_t>(positions);
  for (int64_t token = 0; token < shape.tokens; token++)
    check(0 <= at[token] && at[token] < shape.positions, "token ", token, " is at position ", at[token],
          ", the tables have ", shape.positions);
  for_floating_type(x.scalar_type(), "rope_", [&](auto type) {
    using T = typename decltype(type)::type;
    T* heads = data<T>(x);
    const float *cosines = data<float>(cos), *sines = data<float>(sin), direction = inverse ? -1 : 1;
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, shape.heads * shape.half));
    parallel_ranges(shape.tokens, grain, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; token++) {
        const float *c = cosines + at[token] * shape.half, *s = sines + at[token] * shape.half;
        for (int64_t head = 0; head < shape.heads; head++) {
          T* first = heads + token * shape.token_stride + head * shape.head_stride;
          rotate_head<T>(first, first + shape.half, c, s, shape.half, direction);
        }
      }
    });
  });
}

}  // namespace

LLM3D_CPU(m) { m.impl("rope_", LLM3D_OP(rope_)); }

}  // namespace llm3d
