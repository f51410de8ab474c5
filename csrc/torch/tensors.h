// Reading stable-ABI tensors and argument stacks into the plain structs of csrc/core. Nothing here computes.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "core/half.h"
#include "core/huge_pages.h"
#include "core/problem.h"

namespace sightline::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Takes the arguments of a boxed call one after the other. Every argument must be taken: taking frees it.
class ArgumentReader {
 public:
  explicit ArgumentReader(StableIValue* stack) : stack_(stack) {}

  template <class T>
  T take() {
    return torch::stable::detail::to<T>(stack_[next_++]);
  }
  Tensor tensor() { return take<Tensor>(); }
  std::optional<Tensor> optional_tensor() { return take<std::optional<Tensor>>(); }

 private:
  StableIValue* stack_;
  size_t next_ = 0;
};

// Uninitialised memory with these sizes and strides on the CPU.
inline Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                               aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  core::ask_for_huge_pages(tensor.data_ptr(), tensor.numel() * static_cast<int64_t>(tensor.element_size()));
  return tensor;
}

inline Tensor empty_contiguous(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t axis = sizes.size(); axis-- > 0; stride *= sizes[axis] > 0 ? sizes[axis] : 1) strides[axis] = stride;
  return empty_strided(sizes, strides, dtype);
}

// (B,H,M,W) as a view of (B,M,H,W) memory, so that merging the heads is free.
inline Tensor empty_heads(int64_t batch, int64_t heads, int64_t rows, int64_t width, ScalarType dtype) {
  const int64_t w = width > 0 ? width : 1, h = heads > 0 ? heads : 1, m = rows > 0 ? rows : 1;
  return empty_strided({batch, heads, rows, width}, {m * h * w, w, h * w, 1}, dtype);
}

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float16 or bfloat16");
  }
}

// The tensor itself when its last axis is contiguous, else a contiguous copy. (B, H, rows, width) in CPU memory.
inline Tensor with_contiguous_rows_anywhere(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 4, name, ": expected 4 axes");
  if (tensor.size(3) <= 1 || tensor.stride(3) == 1) return tensor;
  return torch::stable::contiguous(tensor);
}

inline Tensor with_contiguous_rows(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": expected a CPU tensor");
  return with_contiguous_rows_anywhere(tensor, name);
}

inline HeadsView heads_view(const Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

inline HeadsView writable_heads_view(Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// A one-dimensional floating tensor as fp32.
inline std::vector<float> read_floats(const Tensor& tensor, const char* name) {
  const int64_t count = tensor.size(0), stride = tensor.stride(0);
  std::vector<float> values(static_cast<size_t>(count));
  const void* data = tensor.const_data_ptr();
  for (int64_t index = 0; index < count; ++index) {
    float& value = values[static_cast<size_t>(index)];
    switch (tensor.scalar_type()) {
      case ScalarType::Float:
        value = static_cast<const float*>(data)[index * stride];
        break;
      case ScalarType::Double:
        value = static_cast<float>(static_cast<const double*>(data)[index * stride]);
        break;
      case ScalarType::Half:
        value = core::float16_to_float(static_cast<const uint16_t*>(data)[index * stride]);
        break;
      case ScalarType::BFloat16:
        value = core::bfloat16_to_float(static_cast<const uint16_t*>(data)[index * stride]);
        break;
      default:
        STD_TORCH_CHECK(false, name, ": expected a floating dtype");
    }
  }
  return values;
}

// A one-dimensional int32 or int64 tensor as T.
template <class T>
std::vector<T> read_integers(const Tensor& tensor, const char* name) {
  const int64_t count = tensor.size(0), stride = tensor.stride(0);
  std::vector<T> values(static_cast<size_t>(count));
  const void* data = tensor.const_data_ptr();
  for (int64_t index = 0; index < count; ++index) {
    switch (tensor.scalar_type()) {
      case ScalarType::Int:
        values[static_cast<size_t>(index)] = static_cast<T>(static_cast<const int32_t*>(data)[index * stride]);
        break;
      case ScalarType::Long:
        values[static_cast<size_t>(index)] = static_cast<T>(static_cast<const int64_t*>(data)[index * stride]);
        break;
      default:
        STD_TORCH_CHECK(false, name, ": expected int32 or int64");
    }
  }
  return values;
}

// Threads of torch's own pool. One thread when the work (multiply-adds) is not worth waking others.
inline Parallel torch_threads(int64_t work) {
  constexpr int64_t kWorthSharing = 1 << 18;
  Parallel parallel;
  parallel.run = [](void (*body)(void*, int64_t), void* context, void*) {
    struct Call {
      void (*body)(void*, int64_t);
      void* context;
    } call{body, context};
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(
        0, torch::stable::get_num_threads(), 1,
        [](int64_t thread, int64_t, void* pointer) {
          auto* one = static_cast<Call*>(pointer);
          one->body(one->context, thread);
        },
        &call));
  };
  parallel.threads = work < kWorthSharing ? 1 : static_cast<int>(torch::stable::get_num_threads());
  return parallel;
}

}  // namespace sightline::binding
