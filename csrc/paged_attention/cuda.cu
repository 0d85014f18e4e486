// Keys and values of past tokens in a paged cache (Kwon et al. 2023), and attention of one new token to them, on a
// GPU, by flash decoding (Dao et al. 2023).
//
// The tokens of a sequence are split over blocks. A block takes its share a tile at a time, for all query heads of
// a key-value head (a key is read once for all of them), with s the scores of a tile:
//
//   m' = max(m, max s)   p = exp(s - m')   l' = l exp(m - m') + sum p   out' = out exp(m - m') + p values
//
// and leaves m, l and out. A second kernel adds up the splits in their order:
//
//   M = max m        result = (sum of out exp(m - M)) / (sum of l exp(m - M))
//
// The number of splits follows from shapes alone; how many tokens each takes is found on the device. So the kernels
// can be captured in a CUDA graph and replayed for other lengths, and a sequence's result does not vary between runs.
#include "paged_attention/shape.h"
#include "paged_attention/split.cuh"

namespace llm3d {
namespace {

constexpr int kBlocksPerMultiprocessor = 4;  // that splitting aims at
constexpr int64_t kMaxSplits = 128;

// ---- append: a block a token ----

template <class T, int n>
__global__ void __launch_bounds__(kThreads)
    append_kernel(T* __restrict__ keys, T* __restrict__ values, const T* __restrict__ k, const T* __restrict__ v,
                  const int64_t* __restrict__ slots, Append shape) {
  const int64_t token = blockIdx.x, slot = slots[token];
  if (slot < 0 || slot >= shape.cache.blocks * shape.cache.block_size) return;
  const int packs = shape.cache.head_dim / n, all = packs * shape.cache.kv_heads;
  for (int i = threadIdx.x; i < all; i += kThreads) {
    const int64_t head = i / packs, column = i % packs * n, to = slot * all * n + i * n;
    store<n>(keys + to, load<n>(k + token * shape.k.token_stride + head * shape.k.head_stride + column));
    store<n>(values + to, load<n>(v + token * shape.v.token_stride + head * shape.v.head_stride + column));
  }
}

template <class T>
bool heads_in_packs(const T* x, const Heads& heads, int64_t head_dim) {
  return in_packs(x, heads.token_stride, head_dim) && in_packs(x, heads.head_stride, head_dim);
}

void kv_cache_append_(Tensor key_cache, Tensor value_cache, const Tensor& k, const Tensor& v, const Tensor& slots) {
  const Append shape = append_of(key_cache, value_cache, k, v, slots);
  const int64_t size = shape.cache.head_dim;
  for_floating_type(key_cache.scalar_type(), "kv_cache_append_", [&](auto type) {
    using T = typename decltype(type)::type;
    T *keys = data<T>(key_cache), *values = data<T>(value_cache);
    const bool packs = in_packs(keys, size, size) && in_packs(values, size, size) &&
                       heads_in_packs(data<T>(k), shape.k, size) && heads_in_packs(data<T>(v), shape.v, size);
    for_width<T>(packs, [&](auto width) {
      launch(append_kernel<T, decltype(width)::value>, grid_of(shape.k.tokens, 1), kThreads, key_cache, keys, values,
             data<T>(k), data<T>(v), data<int64_t>(slots), shape);
    });
  });
}

// ---- decode: a block takes one split, for up to `heads` query heads of a key-value head ----

template <class T, int n, int heads, class A = arithmetic<T>>
__global__ void __launch_bounds__(kThreads, heads == 1 ? 3 : 2)
    split_kernel(const T* __restrict__ q, const T* __restrict__ keys, const T* __restrict__ values,
                 const int32_t* __restrict__ block_table, const int32_t* __restrict__ lengths,
                 A* __restrict__ partials, Decode shape, A scale) {
  __shared__ Shared<A, heads> shared;
  const int split = blockIdx.x, splits = gridDim.x, head_dim = shape.cache.head_dim;
  const int64_t sequence = blockIdx.z, parts = (shape.group + heads - 1) / heads;
  const int64_t kv_head = blockIdx.y / parts, in_group = blockIdx.y % parts * heads;
  const int64_t head = kv_head * shape.group + in_group;
  const int count = shape.group - in_group < heads ? shape.group - in_group : heads;
  const int length = lengths[sequence], share = share_of(length, splits);
  const int begin = split * share, end = begin + share < length ? begin + share : length;
  if (begin >= end) return;
  start<T>(shared, q + sequence * shape.q.token_stride + head * shape.q.head_stride, shape.q.head_stride, count,
           head_dim, scale);
  const int packs = head_dim / n, slices = kThreads / packs;
  const int slice = threadIdx.x / packs, column = threadIdx.x % packs * n;
  const int32_t* table = block_table + sequence * shape.max_blocks;
  const int block_size = shape.cache.block_size;
  A out[heads][n] = {};
  for (int tile = begin; tile < end; tile += kTile) {
    const int tokens = end - tile < kTile ? end - tile : kTile;
    __syncthreads();
    if (threadIdx.x < kTile) {
      const int last = tokens - 1, own = threadIdx.x, token = tile + (own < last ? own : last);
      const int64_t slot = static_cast<int64_t>(table[token / block_size]) * block_size + token % block_size;
      shared.rows[threadIdx.x] = (slot * shape.cache.kv_heads + kv_head) * head_dim;
    }
    __syncthreads();
    constexpr int some = heads < 4 ? heads : 4;  // that registers hold; the keys come from the first-level cache again
#pragma unroll 1
    for (int from = 0; from < heads; from += some) score<some, n>(shared, from, keys, tokens, head_dim);
    __syncthreads();
    exponentiate(shared);
    __syncthreads();
    if (slice < slices) add_values<T, n>(shared, out, values + column, slice, slices, tokens);
  }
  const int64_t stride = splits * static_cast<int64_t>(head_dim + 2);  // from head to head
  finish(shared, out, partials + (sequence * shape.q.heads + head) * stride + split * (head_dim + 2), stride, count,
         column, slice, slices, head_dim);
}

// ---- decode: the sum of the splits, a block a head of a sequence, a thread a column ----

template <class T, class A = arithmetic<T>>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const A* __restrict__ partials, const int32_t* __restrict__ lengths, T* __restrict__ out,
                   int64_t heads, int head_dim, int splits) {
  const int column = threadIdx.x;
  if (column >= head_dim) return;
  const int length = lengths[blockIdx.x / heads], share = share_of(length, splits);
  const int used = length > 0 ? (length + share - 1) / share : 0, row = head_dim + 2;
  const A* partial = partials + blockIdx.x * static_cast<int64_t>(splits) * row;
  A maximum = A(-HUGE_VAL), total = 0, sum = 0;
  for (int i = 0; i < used; i++) maximum = fmax(maximum, partial[i * row + head_dim]);
  for (int i = 0; i < used; i++) {
    const A m = partial[i * row + head_dim], shrink = m == maximum ? A(1) : exponential(m - maximum);
    total += partial[i * row + head_dim + 1] * shrink;
    sum += partial[i * row + column] * shrink;
  }
  out[blockIdx.x * static_cast<int64_t>(head_dim) + column] = narrow<T>(used > 0 ? sum / total : A(0));
}

// As many as fill the device, if the sequences are as long as the table allows.
int64_t splits_of(const Tensor& q, const Decode& shape, int64_t blocks) {
  const int64_t tiles = (shape.max_blocks * shape.cache.block_size + kTile - 1) / kTile;
  const int64_t wanted = kBlocksPerMultiprocessor * multiprocessors(q) / std::max<int64_t>(1, blocks);
  return std::max<int64_t>(1, std::min({wanted, tiles, kMaxSplits}));
}

template <class T, int n, int heads, class A = arithmetic<T>>
void decode(const Tensor& q, const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_table,
            const Tensor& lengths, const Tensor& out, const Decode& shape, double scale) {
  const int64_t groups = shape.cache.kv_heads * ((shape.group + heads - 1) / heads), sequences = shape.q.tokens;
  const int64_t splits = splits_of(q, shape, groups * sequences), all = sequences * shape.q.heads;
  check(groups <= 65535 && sequences <= 65535, sequences, " sequences of ", groups, " groups are too many");
  const Tensor partials = empty(q, {all, splits, shape.cache.head_dim + 2}, arithmetic_type(q.scalar_type()));
  launch(split_kernel<T, n, heads>, dim3(splits, groups, sequences), kThreads, q, data<T>(q), data<T>(key_cache),
         data<T>(value_cache), data<int32_t>(block_table), data<int32_t>(lengths), data<A>(partials), shape, scale);
  launch(combine_kernel<T>, grid_of(all, 1), kThreads, q, data<A>(partials), data<int32_t>(lengths), data<T>(out),
         shape.q.heads, shape.cache.head_dim, splits);
}

Tensor paged_decode_attention(const Tensor& q, const Tensor& key_cache, const Tensor& value_cache,
                              const Tensor& block_table, const Tensor& lengths, double scale) {
  const Decode shape = decode_of(q, key_cache, value_cache, block_table, lengths);
  const int64_t head_dim = shape.cache.head_dim;
  check(head_dim > 0 && head_dim <= kMaxHeadDim, "head_dim ", head_dim, " is not from 1 to ", kMaxHeadDim);
  check(shape.max_blocks * shape.cache.block_size < (int64_t{1} << 31), "block_table is for too many tokens");
  Tensor out = empty(q, {shape.q.tokens, shape.q.heads, head_dim}, q.scalar_type());
  for_floating_type(q.scalar_type(), "paged_decode_attention", [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int n = Pack<T>::size;
    const bool packs = in_packs(data<T>(key_cache), head_dim, head_dim) &&
                       in_packs(data<T>(value_cache), head_dim, head_dim);
    const auto run = !packs             ? decode<T, 1, 4>
                     : shape.group == 1 ? decode<T, n, 1>
                     : shape.group <= 4 ? decode<T, n, 4>
                                        : decode<T, n, 8>;
    run(q, key_cache, value_cache, block_table, lengths, out, shape, scale);
  });
  return out;
}

}  // namespace

LLM3D_CUDA(m) {
  m.impl("kv_cache_append_", LLM3D_OP(kv_cache_append_));
  m.impl("paged_decode_attention", LLM3D_OP(paged_decode_attention));
}

}  // namespace llm3d
