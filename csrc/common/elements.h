// What a CUDA thread takes at once: a pack of 16 bytes where the tensors allow it, else one element.
#pragma once

#include "common/cuda.h"

namespace llm3d {

template <class T, int n>
struct alignas(n * sizeof(T) < 16 ? n * sizeof(T) : 16) Elements {
  T values[n];
};

template <int n, class T>
__device__ __forceinline__ Elements<T, n> load(const T* from) {
  return *reinterpret_cast<const Elements<T, n>*>(from);
}

template <int n, class T>
__device__ __forceinline__ void store(T* to, const Elements<T, n>& elements) {
  *reinterpret_cast<Elements<T, n>*>(to) = elements;
}

template <int n>
struct Width {
  static constexpr int value = n;
};

// Calls body(Width<n>{}), n elements of T at once.
template <class T, class F>
void for_width(bool packs, const F& body) {
  if (packs)
    body(Width<Pack<T>::size>{});
  else
    body(Width<1>{});
}

// Blocks of a grid in which each of `rows` rows takes `parts` blocks, one after the other.
inline dim3 grid_of(int64_t rows, int64_t parts) {
  check(rows * parts < (int64_t{1} << 31), rows, " rows in ", parts, " parts each are more than a grid holds");
  return dim3(static_cast<unsigned>(rows * parts));
}

}  // namespace llm3d
