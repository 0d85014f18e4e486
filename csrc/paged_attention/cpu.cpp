// Keys and values of past tokens in a paged cache (Kwon et al. 2023), and attention of one new token to them.
//
// The tokens of a sequence are taken a tile at a time. With s the scores of a tile, m and l the maximum and the sum
// of exponentials so far (Milakov and Gimelshein 2018):
//
//   m' = max(m, max s)   p = exp(s - m')   l' = l exp(m - m') + sum p   out' = out exp(m - m') + p values
//
// and out / l at the end. The query heads that share a key-value head go together: a key is read once for all.
#include <limits>
#include <vector>

#include "common/cpu.h"
#include "paged_attention/shape.h"

namespace llm3d {
namespace {

constexpr int64_t kTile = 64;        // tokens whose scores are kept at once
constexpr int64_t kGrain = 1 << 13;  // elements a thread is worth starting for

void check_slots(const int64_t* slots, int64_t tokens, int64_t capacity) {
  for (int64_t token = 0; token < tokens; token++)
    check(slots[token] < capacity, "slot ", slots[token], " of token ", token, " is beyond the cache's ", capacity);
}

void kv_cache_append_(Tensor key_cache, Tensor value_cache, const Tensor& k, const Tensor& v, const Tensor& slots) {
  const Append shape = append_of(key_cache, value_cache, k, v, slots);
  const Cache& cache = shape.cache;
  const int64_t* slot = data<int64_t>(slots);
  check_slots(slot, shape.k.tokens, cache.blocks * cache.block_size);
  for_floating_type(key_cache.scalar_type(), "kv_cache_append_", [&](auto type) {
    using T = typename decltype(type)::type;
    const auto store = [&](const Tensor& from, const Heads& heads, const Tensor& to, int64_t token) {
      const T* in = data<T>(from) + token * heads.token_stride;
      T* out = data<T>(to) + slot[token] * cache.kv_heads * cache.head_dim;
      for (int64_t head = 0; head < cache.kv_heads; head++)
        std::copy_n(in + head * heads.head_stride, cache.head_dim, out + head * cache.head_dim);
    };
    parallel_rows({shape.k.tokens, cache.kv_heads * cache.head_dim, 0}, kGrain, [&](int64_t token) {
      if (slot[token] < 0) return;
      store(k, shape.k, key_cache, token);
      store(v, shape.v, value_cache, token);
    });
  });
}

template <class T>
void widen_row(const T* __restrict from, arithmetic<T>* __restrict to, int64_t size, arithmetic<T> factor) {
#pragma omp simd
  for (int64_t i = 0; i < size; i++) to[i] = widen(from[i]) * factor;
}

template <class A>
A dot(const A* __restrict x, const A* __restrict y, int64_t size) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; i++) sum += x[i] * y[i];
  return sum;
}

template <class A>
void add_scaled(A* __restrict x, const A* __restrict y, A factor, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; i++) x[i] += y[i] * factor;
}

template <class A>
void scale_row(A* x, A factor, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; i++) x[i] *= factor;
}

// One query head on its way through the tokens.
template <class A>
struct Head {
  A maximum, total;
  A *query, *out;  // [head_dim]; the query times the scale
  A* scores;       // [kTile], then their exponentials

  void take_tile(int64_t count, int64_t head_dim) {
    constexpr A nothing = -std::numeric_limits<A>::infinity();
    A largest = maximum;
    for (int64_t i = 0; i < count; i++) largest = scores[i] > largest ? scores[i] : largest;
    if (largest > maximum) {
      const A shrink = exponential(maximum - largest);
      total *= shrink;
      scale_row(out, shrink, head_dim);
      maximum = largest;
    }
    const A origin = maximum == nothing ? A(0) : maximum;  // -inf - -inf is no number
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; i++) {
      scores[i] = exponential(scores[i] - origin);
      sum += scores[i];
    }
    total += sum;
  }
};

// The query heads that share a key-value head, and the memory that they work in.
template <class A>
struct Group {
  std::vector<A> memory, row;
  std::vector<Head<A>> heads;

  Group(int64_t group, int64_t head_dim) : memory(group * (2 * head_dim + kTile)), row(head_dim) {
    A* at = memory.data();
    for (int64_t i = 0; i < group; i++, at += 2 * head_dim + kTile)
      heads.push_back({0, 0, at, at + head_dim, at + 2 * head_dim});
  }
};

// The keys or the values of one key-value head, over the tokens of one sequence.
template <class T>
struct Paged {
  const T* head;  // of slot 0
  const int32_t* table;
  int64_t block_size, slot_stride;

  const T* row(int64_t token) const {
    return head + (table[token / block_size] * block_size + token % block_size) * slot_stride;
  }
};

template <class T, class A = arithmetic<T>>
void attend(Group<A>& group, const Paged<T>& keys, const Paged<T>& values, int64_t length, int64_t head_dim) {
  for (int64_t start = 0; start < length; start += kTile) {
    const int64_t count = std::min(kTile, length - start);
    for (int64_t i = 0; i < count; i++) {
      widen_row<T>(keys.row(start + i), group.row.data(), head_dim, 1);
      for (Head<A>& head : group.heads) head.scores[i] = dot(head.query, group.row.data(), head_dim);
    }
    for (Head<A>& head : group.heads) head.take_tile(count, head_dim);
    for (int64_t i = 0; i < count; i++) {
      widen_row<T>(values.row(start + i), group.row.data(), head_dim, 1);
      for (Head<A>& head : group.heads) add_scaled(head.out, group.row.data(), head.scores[i], head_dim);
    }
  }
}

template <class T, class A = arithmetic<T>>
void start_group(Group<A>& group, const T* q, int64_t head_stride, int64_t head_dim, A scale) {
  for (Head<A>& head : group.heads) {
    head.maximum = -std::numeric_limits<A>::infinity();
    head.total = 0;
    widen_row<T>(q, head.query, head_dim, scale);
    std::fill_n(head.out, head_dim, A(0));
    q += head_stride;
  }
}

template <class T, class A = arithmetic<T>>
void finish_group(const Group<A>& group, T* out, int64_t head_dim, int64_t length) {
  for (const Head<A>& head : group.heads) {
    const A factor = length > 0 ? A(1) / head.total : A(0);
#pragma omp simd
    for (int64_t i = 0; i < head_dim; i++) out[i] = narrow<T>(head.out[i] * factor);
    out += head_dim;
  }
}

// Returns the number of tokens over all sequences.
int64_t check_table(const Decode& shape, const int32_t* table, const int32_t* lengths) {
  int64_t tokens = 0;
  for (int64_t sequence = 0; sequence < shape.q.tokens; sequence++, table += shape.max_blocks) {
    const int64_t length = lengths[sequence], size = shape.cache.block_size;
    check(length >= 0 && length <= shape.max_blocks * size, "sequence ", sequence, " has ", length,
          " tokens, its row of block_table is for ", shape.max_blocks * size);
    for (int64_t token = 0; token < length; token += size)
      check(table[token / size] >= 0 && table[token / size] < shape.cache.blocks, "sequence ", sequence,
            " is in block ", table[token / size], ", the cache has ", shape.cache.blocks);
    tokens += length;
  }
  return tokens;
}

Tensor paged_decode_attention(const Tensor& q, const Tensor& key_cache, const Tensor& value_cache,
                              const Tensor& block_table, const Tensor& lengths, double scale) {
  const Decode shape = decode_of(q, key_cache, value_cache, block_table, lengths);
  const Cache& cache = shape.cache;
  const int32_t *table = data<int32_t>(block_table), *counts = data<int32_t>(lengths);
  const int64_t tokens = check_table(shape, table, counts), work = shape.q.tokens * cache.kv_heads;
  Tensor out = empty(q, {shape.q.tokens, shape.q.heads, cache.head_dim}, q.scalar_type());
  for_floating_type(q.scalar_type(), "paged_decode_attention", [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t each = tokens * shape.group * cache.head_dim / std::max<int64_t>(1, shape.q.tokens);
    parallel_ranges(work, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, each)), [&](int64_t begin, int64_t end) {
      Group<arithmetic<T>> group(shape.group, cache.head_dim);
      for (int64_t i = begin; i < end; i++) {
        const int64_t sequence = i / cache.kv_heads, kv_head = i % cache.kv_heads, first = kv_head * shape.group;
        const auto paged = [&](const Tensor& x) {
          return Paged<T>{data<T>(x) + kv_head * cache.head_dim, table + sequence * shape.max_blocks,
                          cache.block_size, cache.kv_heads * cache.head_dim};
        };
        start_group<T>(group, data<T>(q) + sequence * shape.q.token_stride + first * shape.q.head_stride,
                       shape.q.head_stride, cache.head_dim, static_cast<arithmetic<T>>(scale));
        attend<T>(group, paged(key_cache), paged(value_cache), counts[sequence], cache.head_dim);
        finish_group<T>(group, data<T>(out) + (sequence * shape.q.heads + first) * cache.head_dim, cache.head_dim,
                        counts[sequence]);
      }
    });
  });
  return out;
}

}  // namespace

LLM3D_CPU(m) {
  m.impl("kv_cache_append_", LLM3D_OP(kv_cache_append_));
  m.impl("paged_decode_attention", LLM3D_OP(paged_decode_attention));
}

}  // namespace llm3d
