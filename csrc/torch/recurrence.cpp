// sightline::additive_recurrence and its backward on the CPU: arguments in, kernels called, tensors out.
//
// Python has checked everything (python/sightline/_recurrence_checks.py); the checks here are the backstop that keeps a
// wrong call of the raw operator within its memory.
#include <torch/headeronly/core/ScalarType.h>

#include "cpu/kernel_table.h"
#include "torch/tensors.h"

namespace sightline::binding {
namespace {

Tensor nothing() { return empty_contiguous({0}, ScalarType::Float); }

// What forward and backward share, in the order of the schema, and the memory that the problem points to.
struct Arguments {
  Tensor query, key, value;
  std::optional<Tensor> key_gain, key_mask, cu_seqlens, initial_log_normalizer, initial_memory;
  std::vector<int64_t> cuts;

  explicit Arguments(ArgumentReader& arguments)
      : query(arguments.tensor()), key(arguments.tensor()), value(arguments.tensor()) {
    for (auto* tensor : {&key_gain, &key_mask, &cu_seqlens, &initial_log_normalizer, &initial_memory})
      *tensor = arguments.optional_tensor();
    query = with_contiguous_rows(query, "query");
    key = with_contiguous_rows(key, "key");
    value = with_contiguous_rows(value, "value");
    for (auto* tensor : {&key_mask, &cu_seqlens, &initial_log_normalizer, &initial_memory})
      STD_TORCH_CHECK(!*tensor || (*tensor)->is_cpu(), "options: expected CPU tensors, as query is one");
    if (key_gain) key_gain = with_contiguous_rows(*key_gain, "key_gain");
    if (initial_log_normalizer) initial_log_normalizer = torch::stable::contiguous(*initial_log_normalizer);
    if (initial_memory) initial_memory = torch::stable::contiguous(*initial_memory);
  }
};

const float* state_pointer(const Tensor& tensor, int64_t count, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_cpu() && tensor.numel() == count, name,
                  ": expected float32 with one entry per sequence, key head, channel (and value column)");
  return static_cast<const float*>(tensor.const_data_ptr());
}

int64_t channels(const RecurrenceProblem& problem) {
  return problem.sequences() * problem.key_heads * problem.key_width;
}

void set_up_sizes(const Arguments& given, RecurrenceProblem& problem) {
  const Tensor &query = given.query, &key = given.key, &value = given.value;
  STD_TORCH_CHECK(key.scalar_type() == query.scalar_type() && value.scalar_type() == query.scalar_type(),
                  "key and value: expected the dtype of query");
  problem.dtype = dtype_of(query, "query");
  problem.batch = query.size(0);
  problem.heads = query.size(1);
  problem.length = query.size(2);
  problem.key_width = query.size(3);
  problem.key_heads = key.size(1);
  problem.value_width = value.size(3);
  STD_TORCH_CHECK(key.size(0) == problem.batch && value.size(0) == problem.batch,
                  "key and value: expected the batch of query");
  STD_TORCH_CHECK(key.size(2) == problem.length && value.size(2) == problem.length,
                  "key and value: expected the rows of query");
  STD_TORCH_CHECK(value.size(1) == problem.key_heads, "value: expected the heads of key");
  STD_TORCH_CHECK(key.size(3) == problem.key_width, "key: expected the width of query");
  STD_TORCH_CHECK(problem.key_width > 0 && problem.value_width > 0, "query and value: expected a width of at least 1");
  STD_TORCH_CHECK(problem.key_heads > 0 && problem.heads % problem.key_heads == 0,
                  "query: expected a multiple of the key heads");
  problem.query = heads_view(query);
  problem.key = heads_view(key);
  problem.value = heads_view(value);
}

void set_up_options(Arguments& given, RecurrenceProblem& problem) {
  if (given.key_gain) {
    const Tensor& gain = *given.key_gain;
    STD_TORCH_CHECK(gain.size(0) == problem.batch && gain.size(1) == problem.key_heads &&
                        gain.size(2) == problem.length && gain.size(3) == problem.key_width,
                    "key_gain: expected the shape of key");
    problem.gain_dtype = dtype_of(gain, "key_gain");
    problem.key_gain = heads_view(gain);
  }
  if (given.key_mask) {
    const Tensor& mask = *given.key_mask;
    STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.dim() == 2 && mask.size(0) == problem.batch &&
                        mask.size(1) == problem.length,
                    "key_mask: expected bool (B, N)");
    problem.key_mask = static_cast<const uint8_t*>(mask.const_data_ptr());
    problem.key_mask_strides[0] = mask.stride(0);
    problem.key_mask_strides[1] = mask.stride(1);
  }
  if (given.cu_seqlens) {
    STD_TORCH_CHECK(given.cu_seqlens->dim() == 1 && given.cu_seqlens->size(0) >= 1 && problem.batch == 1,
                    "cu_seqlens: expected shape (documents + 1,) and a batch of 1");
    given.cuts = read_integers<int64_t>(*given.cu_seqlens, "cu_seqlens");
    int64_t last = 0;  // offsets that fall or leave the tensor are cut off, so that no kernel leaves its memory
    for (int64_t& cut : given.cuts) {
      cut = cut < last ? last : cut > problem.length ? problem.length : cut;
      last = cut;
    }
    problem.cuts = given.cuts.data();
    problem.documents = static_cast<int64_t>(given.cuts.size()) - 1;
  }
  STD_TORCH_CHECK(given.initial_log_normalizer.has_value() == given.initial_memory.has_value(),
                  "initial_log_normalizer and initial_memory: expected both or none");
  if (given.initial_memory) {
    problem.initial_log_normalizer =
        state_pointer(*given.initial_log_normalizer, channels(problem), "initial_log_normalizer");
    problem.initial_memory =
        state_pointer(*given.initial_memory, channels(problem) * problem.value_width, "initial_memory");
  }
}

// Rows outside of all documents are nobody's work.
void clear_uncovered(const RecurrenceProblem& problem, Tensor& tensor) {
  if (problem.cuts == nullptr) return;
  if (problem.cuts[0] > 0 || problem.cuts[problem.documents] < problem.length) torch::stable::zero_(tensor);
}

int64_t multiply_adds(const RecurrenceProblem& problem) {
  return problem.batch * problem.heads * problem.length * problem.key_width * problem.value_width * 2;
}

template <class... Tensors>
void put_results(StableIValue* stack, Tensors&&... tensors) {
  size_t index = 0;
  ((stack[index++] = torch::stable::detail::from(std::forward<Tensors>(tensors))), ...);
}

Tensor empty_log_normalizer(const RecurrenceProblem& problem) {
  return empty_contiguous({problem.sequences(), problem.key_heads, problem.key_width}, ScalarType::Float);
}

Tensor empty_memory(const RecurrenceProblem& problem) {
  return empty_contiguous({problem.sequences(), problem.key_heads, problem.key_width, problem.value_width},
                          ScalarType::Float);
}

void additive_recurrence(StableIValue* stack, uint64_t, uint64_t) {
  ArgumentReader reader(stack);
  Arguments given(reader);
  RecurrenceProblem problem;
  problem.causal = reader.take<bool>();
  problem.scale = static_cast<float>(reader.take<double>());
  const bool output_final_state = reader.take<bool>();
  set_up_sizes(given, problem);
  set_up_options(given, problem);
  Tensor output =
      empty_heads(problem.batch, problem.heads, problem.length, problem.value_width, given.query.scalar_type());
  clear_uncovered(problem, output);
  problem.output = writable_heads_view(output);
  Tensor log_normalizer = output_final_state ? empty_log_normalizer(problem) : nothing();
  Tensor memory = output_final_state ? empty_memory(problem) : nothing();
  if (output_final_state) {
    problem.final_log_normalizer = static_cast<float*>(log_normalizer.mutable_data_ptr());
    problem.final_memory = static_cast<float*>(memory.mutable_data_ptr());
  }
  kernels().recurrence_forward(problem, torch_threads(multiply_adds(problem)));
  put_results(stack, output, log_normalizer, memory);
}

void additive_recurrence_backward(StableIValue* stack, uint64_t, uint64_t) {
  ArgumentReader reader(stack);
  const Tensor given_grad_output = reader.tensor();
  auto grad_log_normalizer = reader.optional_tensor();
  auto grad_memory = reader.optional_tensor();
  Arguments given(reader);
  RecurrenceProblem problem;
  problem.causal = reader.take<bool>();
  problem.scale = static_cast<float>(reader.take<double>());
  const bool needs_gain_gradient = reader.take<bool>(), needs_state_gradient = reader.take<bool>();
  set_up_sizes(given, problem);
  set_up_options(given, problem);
  const bool gives_gain = given.key_gain && needs_gain_gradient;
  const bool gives_state = given.initial_memory && needs_state_gradient;
  const Tensor grad_output = with_contiguous_rows(given_grad_output, "grad_output");
  STD_TORCH_CHECK(grad_output.size(0) == problem.batch && grad_output.size(1) == problem.heads &&
                      grad_output.size(2) == problem.length && grad_output.size(3) == problem.value_width &&
                      grad_output.scalar_type() == given.query.scalar_type(),
                  "grad_output: expected (B, H, N, Dv) in the dtype of query");
  RecurrenceGradients gradients;
  gradients.grad_output = heads_view(grad_output);
  if (grad_log_normalizer) {
    grad_log_normalizer = torch::stable::contiguous(*grad_log_normalizer);
    gradients.grad_log_normalizer = state_pointer(*grad_log_normalizer, channels(problem), "grad_log_normalizer");
  }
  if (grad_memory) {
    grad_memory = torch::stable::contiguous(*grad_memory);
    gradients.grad_memory = state_pointer(*grad_memory, channels(problem) * problem.value_width, "grad_memory");
  }
  const auto empty_like = [&](const Tensor& tensor) {
    Tensor result = empty_heads(tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3), tensor.scalar_type());
    clear_uncovered(problem, result);
    return result;
  };
  Tensor grad_query = empty_like(given.query), grad_key = empty_like(given.key), grad_value = empty_like(given.value);
  Tensor grad_gain = gives_gain ? empty_like(*given.key_gain) : nothing();
  gradients.grad_query = writable_heads_view(grad_query);
  gradients.grad_key = writable_heads_view(grad_key);
  gradients.grad_value = writable_heads_view(grad_value);
  if (gives_gain) gradients.grad_gain = writable_heads_view(grad_gain);
  Tensor grad_initial_log_normalizer = gives_state ? empty_log_normalizer(problem) : nothing();
  Tensor grad_initial_memory = gives_state ? empty_memory(problem) : nothing();
  if (gives_state) {
    gradients.grad_initial_log_normalizer = static_cast<float*>(grad_initial_log_normalizer.mutable_data_ptr());
    gradients.grad_initial_memory = static_cast<float*>(grad_initial_memory.mutable_data_ptr());
  }
  kernels().recurrence_backward(problem, gradients, torch_threads(multiply_adds(problem)));
  put_results(stack, grad_query, grad_key, grad_value, grad_gain, grad_initial_log_normalizer, grad_initial_memory);
}

}  // namespace

void register_recurrence_cpu(torch::stable::detail::StableLibrary& library) {
  library.impl("additive_recurrence", additive_recurrence);
  library.impl("additive_recurrence_backward", additive_recurrence_backward);
}

}  // namespace sightline::binding
