// The numbers that tensors store, and the arithmetic on them: the same functions on the CPU and on the GPU.
//
// Storage is double (CPU only, to check gradients), float, bf16 or fp16; arithmetic is in float, for double in double.
// Nothing here branches, so that loops over these functions become vector instructions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define LLM3D_FUNCTION __host__ __device__ __forceinline__
#else
#define LLM3D_FUNCTION inline __attribute__((always_inline))
#endif

namespace llm3d {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};
template <class T>
using arithmetic = typename Arithmetic<T>::type;  // what T is computed in

LLM3D_FUNCTION float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

LLM3D_FUNCTION uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

// ---- widen: from storage to arithmetic, exactly ----

LLM3D_FUNCTION double widen(double x) { return x; }
LLM3D_FUNCTION float widen(float x) { return x; }
LLM3D_FUNCTION float widen(bf16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
LLM3D_FUNCTION float widen(fp16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  // Exponent and mantissa moved into place, and the exponents' origins brought together. A denormal number is what its
  // mantissa adds to 2^-14: float's own denormals, which processors are slow with, do not come up.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  const uint32_t moved = (magnitude << 13) + (112u << 23);
  const float denormal = from_bits(moved + (1u << 23)) - 0x1p-14f;
  const uint32_t special = magnitude >= 0x7c00u ? 112u << 23 : 0u;  // infinity and NaN
  return from_bits(sign | (magnitude < 0x400u ? to_bits(denormal) : moved + special));
#endif
}

// ---- narrow: from arithmetic to storage, to the nearest, ties to even ----

template <class T>
LLM3D_FUNCTION T narrow(arithmetic<T> x);

template <>
LLM3D_FUNCTION double narrow<double>(double x) {
  return x;
}
template <>
LLM3D_FUNCTION float narrow<float>(float x) {
  return x;
}
template <>
LLM3D_FUNCTION bf16 narrow<bf16>(float x) {
#ifdef __CUDA_ARCH__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  const uint32_t bits = to_bits(x), rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return {static_cast<uint16_t>(x == x ? rounded >> 16 : 0x7fc0u)};
#endif
}
template <>
LLM3D_FUNCTION fp16 narrow<fp16>(float x) {
#ifdef __CUDA_ARCH__
  return {__half_as_ushort(__float2half_rn(x))};
#else
  // Adding a power of two whose last place is fp16's lets the float addition do the rounding, denormals included.
  const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const uint32_t exponent = magnitude & 0x7f800000u, least = 113u << 23;  // 2^-14, the least normal number of fp16
  const float place = from_bits((exponent < least ? least : exponent) + (13u << 23));
  const uint32_t rounded = to_bits(from_bits(magnitude) + place) - to_bits(place);  // in units of its last place
  const uint32_t base = exponent < least ? 0u : ((exponent - least) >> 13);
  const uint32_t finite = base + rounded;
  const uint32_t overflowed = magnitude >= 0x477ff000u ? 0x7c00u : finite;  // 65520 and beyond: infinity
  return {static_cast<uint16_t>(sign | (x == x ? overflowed : 0x7e00u))};
#endif
}

// x as it will be read back from storage of type T.
template <class T>
LLM3D_FUNCTION arithmetic<T> rounded(arithmetic<T> x) {
  return widen(narrow<T>(x));
}

// ---- functions ----

LLM3D_FUNCTION double exponential(double x) { return exp(x); }

// e^x to 1 unit in the last place; 0 below the least normal number, infinity above 88.4, NaN for NaN.
LLM3D_FUNCTION float exponential(float x) {
#ifdef __CUDA_ARCH__
  return expf(x);
#else
  // e^x = 2^n e^r with n = round(x / ln 2), |r| <= ln 2 / 2 from ln 2 in two parts, e^r by its minimax polynomial.
  // At the bounds n is -127 and 128, whose powers come out as 0 and infinity.
  const float at_least = x < -88.0f ? -88.0f : x, bounded = at_least > 88.7f ? 88.7f : at_least;
  const float shifted = bounded * 1.44269504f + 0x1.8p23f;  // the sum's low bits are n
  const float n = shifted - 0x1.8p23f;
  const float r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r + 1.0f;
  return (p * r + 1.0f) * from_bits((to_bits(shifted) << 23) + 0x3f800000u);
#endif
}

template <class A>
LLM3D_FUNCTION A sigmoid(A x) {
  return A(1) / (A(1) + exponential(-x));
}

}  // namespace llm3d
