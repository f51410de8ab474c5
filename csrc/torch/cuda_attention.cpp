// sightline::attention_decode (its schema stands in library.cpp) on CUDA. A library of its own, libsightline_cuda.so,
// that is loaded only where torch has a CUDA device.
//
// Python decides when this operator is used and has checked the arguments (python/sightline/ops/decode.py); what stays
// here is the backstop. Nothing is read from the device: lengths, masks and scales stay there.
#include <torch/csrc/stable/accelerator.h>

#include <string>

#include "cuda/attention_decode.h"
#include "cuda/decode_plan.h"
#include "torch/attention_sizes.h"
#include "torch/tensors.h"

namespace sightline::binding {
namespace {

constexpr int64_t kLargestGridSide = 65535;

// Uninitialised memory on a CUDA device.
Tensor empty_on(int32_t device, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                               aoti_torch_device_type_cuda(), device, &handle));
  return Tensor(handle);
}

// Everything that a call borrows from torch until the kernels are launched; freed memory is reused by this stream only
// after they have ended.
struct Call {
  Tensor query, key, value;
  std::optional<Tensor> key_lengths, key_mask, alibi_slopes, sinks, scale_per_head;
  cuda::DecodeProblem problem;
};

void check_on_device(const Tensor& tensor, int32_t device, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device, name,
                  ": expected a tensor on the device of query");
}

void set_up_inputs(Call& call) {
  AttentionProblem& problem = call.problem.attention;
  call.query = with_contiguous_rows_anywhere(call.query, "query");
  call.key = with_contiguous_rows_anywhere(call.key, "key");
  call.value = with_contiguous_rows_anywhere(call.value, "value");
  const Tensor &query = call.query, &key = call.key, &value = call.value;
  STD_TORCH_CHECK(query.is_cuda(), "query: expected a CUDA tensor");
  check_on_device(key, query.get_device_index(), "key");
  check_on_device(value, query.get_device_index(), "value");
  set_up_sizes(query, key, value, problem);
  STD_TORCH_CHECK(problem.head_width >= 1 && problem.head_width <= cuda::kWidestHead && problem.value_width >= 1 &&
                      problem.value_width <= cuda::kWidestHead,
                  "query and value: expected a width from 1 to 256");
  STD_TORCH_CHECK(
      problem.batch <= kLargestGridSide && problem.key_heads * cuda::row_blocks(problem) <= kLargestGridSide,
      "query: expected at most 65535 batch entries, and as many key heads times blocks of 16 rows");
}

const float* per_head(std::optional<Tensor>& tensor, const AttentionProblem& problem, int32_t device,
                      const char* name) {
  if (!tensor) return nullptr;
  check_on_device(*tensor, device, name);
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == problem.heads && tensor->scalar_type() == ScalarType::Float,
                  name, ": expected float32 of shape (H,)");
  tensor = torch::stable::contiguous(*tensor);
  return static_cast<const float*>(tensor->const_data_ptr());
}

void set_up_tensors(Call& call, int32_t device) {
  cuda::DecodeProblem& problem = call.problem;
  AttentionProblem& attention = problem.attention;
  if (call.key_lengths) {
    Tensor& lengths = *call.key_lengths;
    check_on_device(lengths, device, "key_lengths");
    problem.lengths_are_64_bit = lengths.scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(lengths.dim() == 1 && lengths.size(0) == attention.batch &&
                        (problem.lengths_are_64_bit || lengths.scalar_type() == ScalarType::Int),
                    "key_lengths: expected int32 or int64 of shape (B,)");
    lengths = torch::stable::contiguous(lengths);
    problem.lengths = lengths.const_data_ptr();
  }
  if (call.key_mask) {
    const Tensor& mask = *call.key_mask;
    check_on_device(mask, device, "key_mask");
    STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.dim() == 2 && mask.size(0) == attention.batch &&
                        mask.size(1) == attention.keys,
                    "key_mask: expected bool (B, N)");
    attention.key_mask = static_cast<const uint8_t*>(mask.const_data_ptr());
    attention.key_mask_strides[0] = mask.stride(0);
    attention.key_mask_strides[1] = mask.stride(1);
  }
  attention.alibi_slopes = per_head(call.alibi_slopes, attention, device, "alibi_slopes");
  attention.sinks = per_head(call.sinks, attention, device, "sinks");
  attention.scales = per_head(call.scale_per_head, attention, device, "scale");
}

void take_scalars(ArgumentReader& arguments, cuda::DecodeProblem& problem) {
  AttentionProblem& attention = problem.attention;
  const auto window = [](int64_t side) { return side > kLargestIndex ? int64_t{-1} : side; };
  attention.causal = arguments.take<bool>();
  attention.window_left = window(arguments.take<int64_t>());
  attention.window_right = window(arguments.take<int64_t>());
  problem.scale = static_cast<float>(arguments.take<double>());
  attention.weight_function = weight_function_of(arguments.take<int64_t>());
  attention.length_scale = arguments.take<bool>();
  attention.normalize_qk = arguments.take<bool>();
  attention.softcap = static_cast<float>(arguments.take<double>());
  attention.reweight.power = static_cast<float>(arguments.take<double>());
  attention.reweight.offset = static_cast<float>(arguments.take<double>());
  attention.reweight.exempt_rows = arguments.take<int64_t>();
}

void attention_decode(StableIValue* stack, uint64_t, uint64_t) {
  ArgumentReader arguments(stack);
  Call call{arguments.tensor(), arguments.tensor(), arguments.tensor(), {}, {}, {}, {}, {}, {}};
  for (auto* tensor : {&call.key_lengths, &call.key_mask, &call.alibi_slopes, &call.sinks, &call.scale_per_head})
    *tensor = arguments.optional_tensor();
  take_scalars(arguments, call.problem);
  set_up_inputs(call);
  const int32_t device = call.query.get_device_index();
  set_up_tensors(call, device);

  AttentionProblem& attention = call.problem.attention;
  STD_TORCH_CHECK(
      attention.sinks == nullptr || (core::is_shifted(attention.weight_function) && attention.reweight.power == 0.0f),
      "sinks: expected softmax without re-weighting");
  const int64_t batch = attention.batch, heads = attention.heads, rows = attention.queries,
                width = attention.value_width;
  Tensor output = empty_on(device, {batch, heads, rows, width}, {rows * heads * width, width, heads * width, 1},
                           call.query.scalar_type());
  Tensor log_normalizer = empty_on(device, {batch, heads, rows}, {heads * rows, rows, 1}, ScalarType::Float);
  if (batch * heads * rows > 0) {
    const torch::stable::accelerator::DeviceGuard guard(device);
    attention.output = writable_heads_view(output);
    attention.log_normalizer = static_cast<float*>(log_normalizer.mutable_data_ptr());
    cuda::plan_decode(call.problem, cuda::processors_of(device), 0);
    const int64_t bytes = cuda::lay_out_workspace(call.problem, nullptr);
    Tensor workspace = empty_on(device, {bytes}, {1}, ScalarType::Byte);
    cuda::lay_out_workspace(call.problem, static_cast<char*>(workspace.mutable_data_ptr()));
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    const char* complaint = cuda::attention_decode(call.problem, device, stream);
    STD_TORCH_CHECK(complaint == nullptr, "sightline::attention_decode: ", complaint);
  }
  stack[0] = torch::stable::detail::from(output);
  stack[1] = torch::stable::detail::from(log_normalizer);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sightline, CUDA, library) { library.impl("attention_decode", attention_decode); }

}  // namespace sightline::binding

#define SIGHTLINE_EXPORT extern "C" __attribute__((visibility("default")))

// The GPUs that the kernels were compiled for, separated by commas: compute capabilities times ten, "+" after one
// whose portable code the driver can compile for every newer GPU.
SIGHTLINE_EXPORT const char* sightline_cuda_architectures() { return SIGHTLINE_CUDA_ARCHITECTURES; }

// Null where the driver can run what this library was compiled with.
SIGHTLINE_EXPORT const char* sightline_cuda_driver_problem() {
  const int driver = sightline::cuda::driver_version(), runtime = sightline::cuda::runtime_version();
  if (driver / 1000 >= runtime / 1000) return nullptr;
  static std::string message;
  message = "it was built with CUDA " + std::to_string(runtime / 1000) + ", the driver supports CUDA " +
            std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10);
  return message.c_str();
}
