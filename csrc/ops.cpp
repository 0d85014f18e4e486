// Every operation, as PyTorch sees it: torch.ops.llm3d.NAME. What each computes stands in its folder, and in
// llm3d/kernels beside a reference in plain PyTorch.
#include "common/tensor.h"

STABLE_TORCH_LIBRARY_FRAGMENT(LLM3D_NAMESPACE, m) {
  // csrc/rms_norm
  m.def("rms_norm_forward(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("add_rms_norm_forward(Tensor(a!) x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def(
      "rms_norm_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor inverse_rms, Tensor? grad_sum)"
      " -> (Tensor, Tensor)");
  // csrc/rope
  m.def("rope_(Tensor(a!) x, Tensor cos, Tensor sin, Tensor positions, bool inverse) -> ()");
  // csrc/swiglu
  m.def("swiglu_forward(Tensor gate_up) -> Tensor");
  m.def("swiglu_backward_(Tensor grad_out, Tensor(a!) gate_up) -> ()");
  // csrc/cross_entropy
  m.def("softmax_stats(Tensor logits, Tensor targets) -> Tensor");
  m.def(
      "cross_entropy_backward_(Tensor(a!) logits, Tensor targets, Tensor maximum, Tensor scale,"
      " Tensor at_target, Tensor shift) -> ()");
  // csrc/adamw
  m.def(
      "adamw_(Tensor(a!) master, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor gradient, Tensor(d!)? parameter,"
      " Tensor step, Tensor lr, Tensor gradient_scale, float beta1, float beta2, float eps, float weight_decay,"
      " int seed, int offset) -> ()");
  // csrc/accumulate (CPU alone: PyTorch's own is one pass on a GPU)
  m.def("accumulate_(Tensor(a!) total, Tensor x) -> ()");
  // csrc/gradient_norm
  m.def("squared_norm(Tensor x) -> Tensor");
  // csrc/paged_attention
  m.def(
      "kv_cache_append_(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor k, Tensor v, Tensor slots) -> ()");
  m.def(
      "paged_decode_attention(Tensor q, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor lengths,"
      " float scale) -> Tensor");
}
