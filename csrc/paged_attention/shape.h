// What the operations on a paged key-value cache are given.
//
// A cache is [blocks, block_size, kv_heads, head_dim]. A token's keys lie in its slot, block * block_size + offset;
// a sequence's tokens lie in the blocks that its row of the block table names, in order.
#pragma once

#include "common/tensor.h"

namespace llm3d {

struct Cache {
  int64_t blocks, block_size, kv_heads, head_dim;
};

inline Cache cache_of(const Tensor& keys, const Tensor& values) {
  check(keys.dim() == 4, "key_cache has ", keys.dim(), " dimensions, not 4: [blocks, block_size, kv_heads, head_dim]");
  check_contiguous(keys, "key_cache");
  check(values.dim() == 4, "value_cache has ", values.dim(), " dimensions, not 4");
  for (int64_t i = 0; i < 4; i++)
    check(keys.size(i) == values.size(i), "key_cache has ", keys.size(i), " in dimension ", i, ", value_cache ",
          values.size(i));
  check_contiguous(values, "value_cache");
  check_type(values, keys.scalar_type(), "value_cache");
  return {keys.size(0), keys.size(1), keys.size(2), keys.size(3)};
}

// Heads of tokens, [tokens, heads, head_dim], often a view into a packed qkv. Strides are in elements.
struct Heads {
  int64_t tokens, heads, token_stride, head_stride;
};

inline Heads heads_of(const Tensor& x, const Tensor& cache, const char* name) {
  check(x.dim() == 3, name, " has ", x.dim(), " dimensions, not 3: [tokens, heads, head_dim]");
  check(x.size(2) == cache.size(3), name, " has head_dim ", x.size(2), ", the cache ", cache.size(3));
  check(x.size(2) <= 1 || x.stride(2) == 1, name, ": the elements of a head are not side by side");
  check_type(x, cache.scalar_type(), name);
  return {x.size(0), x.size(1), x.stride(0), x.stride(1)};
}

struct Append {
  Cache cache;
  Heads k, v;
};

inline Append append_of(const Tensor& key_cache, const Tensor& value_cache, const Tensor& k, const Tensor& v,
                        const Tensor& slots) {
  const Append shape{cache_of(key_cache, value_cache), heads_of(k, key_cache, "k"), heads_of(v, key_cache, "v")};
  for (const Heads& heads : {shape.k, shape.v})
    check(heads.heads == shape.cache.kv_heads && heads.tokens == shape.k.tokens, "k or v is not [", shape.k.tokens,
          ", ", shape.cache.kv_heads, ", head_dim]");
  check_type(slots, ScalarType::Long, "slots");
  check_size(slots, shape.k.tokens, "slots");
  return shape;
}

struct Decode {
  Cache cache;
  Heads q;             // a token of each sequence
  int64_t group;       // query heads that share a key-value head
  int64_t max_blocks;  // of a sequence
};

inline Decode decode_of(const Tensor& q, const Tensor& key_cache, const Tensor& value_cache,
                        const Tensor& block_table, const Tensor& lengths) {
  const Cache cache = cache_of(key_cache, value_cache);
  const Heads heads = heads_of(q, key_cache, "q");
  check(cache.kv_heads > 0 && heads.heads % cache.kv_heads == 0, cache.kv_heads, " key-value heads do not divide ",
        heads.heads, " heads");
  check_type(block_table, ScalarType::Int, "block_table");
  check(block_table.dim() == 2 && block_table.size(0) == heads.tokens, "block_table is not [", heads.tokens,
        ", max_blocks]");
  check_contiguous(block_table, "block_table");
  check_type(lengths, ScalarType::Int, "lengths");
  check_size(lengths, heads.tokens, "lengths");
  return {cache, heads, heads.heads / cache.kv_heads, block_table.size(1)};
}

}  // namespace llm3d
