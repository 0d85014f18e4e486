// Stores that go past the caches, for what is written without having been read: a plain store would read it first.
#pragma once

#include <cstdint>
#include <cstring>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace llm3d {

// from: aligned to 64 bytes, in the cache; to: anywhere.
inline void stream_out(void* to, const void* from, int64_t bytes) {
#ifdef __SSE2__
  if (reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    const auto* in = static_cast<const __m128i*>(from);
    auto* out = static_cast<__m128i*>(to);
    const int64_t whole = bytes / 16;
    for (int64_t i = 0; i < whole; i++) _mm_stream_si128(out + i, _mm_load_si128(in + i));
    memcpy(out + whole, in + whole, bytes - whole * 16);
    return;
  }
#endif
  memcpy(to, from, bytes);
}

// Makes what was streamed out visible to other threads, as plain stores are.
inline void finish_streaming() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

}  // namespace llm3d
