// Tensors as kernels see them: checked, and as a pointer, sizes and a stride between rows.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>

#include "common/scalar.h"

// Where implementations are registered: LLM3D_CPU(m) { m.impl("op", LLM3D_OP(op)); }
#ifndef LLM3D_NAMESPACE
#define LLM3D_NAMESPACE llm3d
#define LLM3D_CUDA_KEY CUDA
#endif
#define LLM3D_CPU(m) STABLE_TORCH_LIBRARY_IMPL(LLM3D_NAMESPACE, CPU, m)
#define LLM3D_CUDA(m) STABLE_TORCH_LIBRARY_IMPL(LLM3D_NAMESPACE, LLM3D_CUDA_KEY, m)

namespace llm3d {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// STD_TORCH_CHECK without the name of this file: what is wrong, for the one who called.
template <class... Words>
void check(bool condition, const Words&... words) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << words);
  throw std::runtime_error(message.str());
}

// ---- registration ----

inline bool is_beside(const Tensor& x, const Tensor& first) {
  return x.is_cpu() == first.is_cpu() && x.is_cuda() == first.is_cuda() &&
         x.get_device_index() == first.get_device_index();
}
inline bool is_beside(const std::optional<Tensor>& x, const Tensor& first) {
  return !x.has_value() || is_beside(*x, first);
}
template <class Scalar>
bool is_beside(const Scalar&, const Tensor&) {
  return true;
}

// An operation that refuses tensors of several devices: PyTorch asks only that one of them is of the right kind.
template <class Function, Function* op>
struct OnOneDevice;
template <class Result, class First, class... Others, Result (*op)(First, Others...)>
struct OnOneDevice<Result(First, Others...), op> {
  static Result call(First first, Others... others) {
    check((is_beside(others, first) && ...), "the tensors are not all on one device");
    return op(first, others...);
  }
};
#define LLM3D_OP(op) TORCH_BOX((&OnOneDevice<decltype(op), &op>::call))

// ---- shapes and types ----

// A matrix whose rows are contiguous; from one row to the next it is `stride` elements.
struct Rows {
  int64_t count, columns, stride;
};

inline Rows rows_of(const Tensor& x, const char* name) {
  check(x.dim() == 2, name, " has ", x.dim(), " dimensions, not 2");
  const Rows rows{x.size(0), x.size(1), x.stride(0)};
  check(rows.columns <= 1 || x.stride(1) == 1, name, ": the elements of a row are not side by side");
  return rows;
}

inline void check_contiguous(const Tensor& x, const char* name) {
  check(x.is_contiguous(), name, " is not contiguous");
}

inline std::string name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "number " + std::to_string(static_cast<int>(type)) + " of torch";
  }
}

inline void check_type(const Tensor& x, ScalarType type, const char* name) {
  check(x.scalar_type() == type, name, " has dtype ", name_of(x.scalar_type()), ", not ", name_of(type));
}

inline void check_size(const Tensor& x, int64_t size, const char* name) {
  check(x.numel() == size, name, " has ", x.numel(), " elements, not ", size);
  check_contiguous(x, name);
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, type);
}

// Typed data; T must be what scalar_type() says.
template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

template <class T>
struct Type {
  using type = T;
};

// Calls body(Type<T>{}) with the storage type of `type`.
template <class F>
void for_floating_type(ScalarType type, const char* op, const F& body) {
  switch (type) {
    case ScalarType::Float:
      return body(Type<float>{});
    case ScalarType::BFloat16:
      return body(Type<bf16>{});
    case ScalarType::Half:
      return body(Type<fp16>{});
#ifndef __CUDACC__
    case ScalarType::Double:
      return body(Type<double>{});
#endif
    default:
      check(false, op, ": dtype ", name_of(type), " is not supported");
  }
}

// The dtype in which T is computed.
inline ScalarType arithmetic_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace llm3d
