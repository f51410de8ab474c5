// sightline::attention, attention_decode and attention_backward on the CPU: arguments in, kernels called, tensors out.
//
// Python has checked everything (python/sightline/_checks.py); what stays here is the backstop that keeps a wrong
// call of the raw operator from touching memory it should not.
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>

#include "cpu/kernel_table.h"
#include "torch/attention_sizes.h"
#include "torch/tensors.h"

namespace sightline::binding {
namespace {

// The options that forward and backward share, in the order of the schema, and the memory that the problem points to.
struct Options {
  std::optional<Tensor> key_lengths, key_mask, attn_mask, alibi_slopes, sinks, scale_per_head, cu_seqlens_q,
      cu_seqlens_k, dropout_seed;
  bool causal = false;
  int64_t window_left = -1, window_right = -1;
  double scale = 1.0, dropout_p = 0.0;
  int64_t weight_function = 0;
  bool length_scale = false, normalize_qk = false;
  double softcap = 0.0, reweight_power = 0.0, reweight_offset = 1.0;
  int64_t reweight_exempt_rows = 3;

  std::vector<int64_t> lengths;
  std::vector<int32_t> prefix, documents_q, documents_k;
  std::vector<float> slopes, sink_logits, scales;

  void take_tensors(ArgumentReader& arguments) {
    for (auto* tensor : {&key_lengths, &key_mask, &attn_mask, &alibi_slopes, &sinks, &scale_per_head, &cu_seqlens_q,
                         &cu_seqlens_k, &dropout_seed})
      *tensor = arguments.optional_tensor();
  }

  void check_device() const {
    for (const auto* tensor : {&key_lengths, &key_mask, &attn_mask, &alibi_slopes, &sinks, &scale_per_head,
                               &cu_seqlens_q, &cu_seqlens_k, &dropout_seed})
      STD_TORCH_CHECK(!*tensor || (*tensor)->is_cpu(), "options: expected CPU tensors, as query is one");
  }

  void take_scalars(ArgumentReader& arguments, bool with_dropout = true) {
    causal = arguments.take<bool>();
    window_left = arguments.take<int64_t>();
    window_right = arguments.take<int64_t>();
    scale = arguments.take<double>();
    if (with_dropout) dropout_p = arguments.take<double>();
    weight_function = arguments.take<int64_t>();
    length_scale = arguments.take<bool>();
    normalize_qk = arguments.take<bool>();
    softcap = arguments.take<double>();
    reweight_power = arguments.take<double>();
    reweight_offset = arguments.take<double>();
    reweight_exempt_rows = arguments.take<int64_t>();
  }
};

void set_up_masks(Options& options, AttentionProblem& problem) {
  if (options.key_mask) {
    const Tensor& mask = *options.key_mask;
    STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.dim() == 2 && mask.size(0) == problem.batch &&
                        mask.size(1) == problem.keys,
                    "key_mask: expected bool (B, N)");
    problem.key_mask = static_cast<const uint8_t*>(mask.const_data_ptr());
    problem.key_mask_strides[0] = mask.stride(0);
    problem.key_mask_strides[1] = mask.stride(1);
    const bool counts = options.length_scale || options.reweight_power > 0.0;
    if (counts && !options.attn_mask) {
      options.prefix.resize(static_cast<size_t>(problem.batch * (problem.keys + 1)));
      int32_t* prefix = options.prefix.data();
      for (int64_t batch = 0; batch < problem.batch; ++batch, prefix += problem.keys + 1) {
        prefix[0] = 0;
        for (int64_t key = 0; key < problem.keys; ++key)
          prefix[key + 1] = prefix[key] + (problem.key_mask[batch * mask.stride(0) + key * mask.stride(1)] != 0);
      }
      problem.visible_prefix = options.prefix.data();
    }
  }
  if (options.attn_mask) {
    const Tensor& mask = *options.attn_mask;
    STD_TORCH_CHECK(mask.dim() == 4, "attn_mask: expected 4 axes");
    const int64_t full[4] = {problem.batch, problem.heads, problem.queries, problem.keys};
    for (int axis = 0; axis < 4; ++axis) {
      STD_TORCH_CHECK(mask.size(axis) == full[axis] || mask.size(axis) == 1,
                      "attn_mask: expected a shape that broadcasts to (B, H, M, N)");
      problem.attn_mask.strides[axis] = mask.size(axis) == 1 ? 0 : mask.stride(axis);
    }
    problem.attn_mask.data = mask.const_data_ptr();
    switch (mask.scalar_type()) {
      case ScalarType::Bool:
        problem.attn_mask.kind = MaskKind::kBool;
        break;
      case ScalarType::Float:
        problem.attn_mask.kind = MaskKind::kFloat32;
        break;
      case ScalarType::Half:
        problem.attn_mask.kind = MaskKind::kFloat16;
        break;
      case ScalarType::BFloat16:
        problem.attn_mask.kind = MaskKind::kBFloat16;
        break;
      default:
        STD_TORCH_CHECK(false, "attn_mask: expected bool, float32, float16 or bfloat16");
    }
  }
}

std::vector<float> read_per_head(const Tensor& tensor, int64_t heads, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == heads, name, ": expected shape (H,)");
  return read_floats(tensor, name);
}

void set_up_options(Options& options, AttentionProblem& problem) {
  options.check_device();
  set_up_masks(options, problem);
  if (options.key_lengths) {
    STD_TORCH_CHECK(options.key_lengths->dim() == 1 && options.key_lengths->size(0) == problem.batch,
                    "key_lengths: expected shape (B,)");
    options.lengths = read_integers<int64_t>(*options.key_lengths, "key_lengths");
    for (int64_t& length : options.lengths) length = length < 0 ? 0 : length > problem.keys ? problem.keys : length;
    problem.key_lengths = options.lengths.data();
  }
  STD_TORCH_CHECK(options.cu_seqlens_q.has_value() == options.cu_seqlens_k.has_value(),
                  "cu_seqlens_q and cu_seqlens_k: expected both or none");
  STD_TORCH_CHECK(!options.sinks || (options.weight_function == 0 && options.reweight_power == 0.0),
                  "sinks: expected softmax without re-weighting");
  if (options.cu_seqlens_q) {
    STD_TORCH_CHECK(options.cu_seqlens_k && problem.batch == 1 && options.cu_seqlens_q->dim() == 1 &&
                        options.cu_seqlens_k->dim() == 1 &&
                        options.cu_seqlens_q->size(0) == options.cu_seqlens_k->size(0) &&
                        options.cu_seqlens_q->size(0) >= 1,
                    "cu_seqlens_q and cu_seqlens_k: expected equal lengths and a batch of 1");
    options.documents_q = read_integers<int32_t>(*options.cu_seqlens_q, "cu_seqlens_q");
    options.documents_k = read_integers<int32_t>(*options.cu_seqlens_k, "cu_seqlens_k");
    problem.cu_seqlens_q = options.documents_q.data();
    problem.cu_seqlens_k = options.documents_k.data();
    problem.documents = static_cast<int64_t>(options.documents_q.size()) - 1;
  }
  if (options.alibi_slopes) {
    options.slopes = read_per_head(*options.alibi_slopes, problem.heads, "alibi_slopes");
    problem.alibi_slopes = options.slopes.data();
  }
  if (options.sinks) {
    options.sink_logits = read_per_head(*options.sinks, problem.heads, "sinks");
    problem.sinks = options.sink_logits.data();
  }
  if (options.scale_per_head)
    options.scales = read_per_head(*options.scale_per_head, problem.heads, "scale");
  else
    options.scales.assign(static_cast<size_t>(problem.heads), static_cast<float>(options.scale));
  problem.scales = options.scales.data();

  const auto window = [](int64_t side) { return side > kLargestIndex ? int64_t{-1} : side; };
  problem.causal = options.causal;
  problem.window_left = window(options.window_left);
  problem.window_right = window(options.window_right);
  problem.weight_function = weight_function_of(options.weight_function);
  problem.length_scale = options.length_scale;
  problem.normalize_qk = options.normalize_qk;
  problem.softcap = static_cast<float>(options.softcap);
  problem.reweight = {static_cast<float>(options.reweight_power), static_cast<float>(options.reweight_offset),
                      options.reweight_exempt_rows};
  if (options.dropout_p > 0.0) {
    STD_TORCH_CHECK(options.dropout_p < 1.0 && options.dropout_seed && options.dropout_seed->numel() == 1 &&
                        options.dropout_seed->scalar_type() == ScalarType::Long,
                    "dropout_p: expected a number in [0, 1) and an int64 dropout_seed of one element");
    problem.dropout = true;
    problem.dropout_threshold = static_cast<uint32_t>(options.dropout_p * 4294967296.0);
    problem.dropout_scale = static_cast<float>(1.0 / (1.0 - options.dropout_p));
    problem.dropout_seed = static_cast<uint64_t>(*static_cast<const int64_t*>(options.dropout_seed->const_data_ptr()));
  }
}

int64_t multiply_adds(const AttentionProblem& problem) {
  return problem.batch * problem.heads * problem.queries * problem.keys * (problem.head_width + problem.value_width);
}

// The tensors of a call, and the problem that points to them and to the options.
struct Inputs {
  Tensor query, key, value;
  AttentionProblem problem;

  Inputs(const Tensor& given_query, const Tensor& given_key, const Tensor& given_value, Options& options)
      : query(with_contiguous_rows(given_query, "query")),
        key(with_contiguous_rows(given_key, "key")),
        value(with_contiguous_rows(given_value, "value")) {
    set_up_sizes(query, key, value, problem);
    set_up_options(options, problem);
  }

  Tensor empty_output() {
    Tensor output =
        empty_heads(problem.batch, problem.heads, problem.queries, problem.value_width, query.scalar_type());
    problem.output = writable_heads_view(output);
    return output;
  }

  Tensor empty_log_normalizer() {
    Tensor log_normalizer = empty_contiguous({problem.batch, problem.heads, problem.queries}, ScalarType::Float);
    problem.log_normalizer = static_cast<float*>(log_normalizer.mutable_data_ptr());
    return log_normalizer;
  }
};

template <class... Tensors>
void put_results(StableIValue* stack, Tensors&&... tensors) {
  size_t index = 0;
  ((stack[index++] = torch::stable::detail::from(std::forward<Tensors>(tensors))), ...);
}

void attention(StableIValue* stack, uint64_t, uint64_t) {
  ArgumentReader arguments(stack);
  const Tensor given_query = arguments.tensor(), given_key = arguments.tensor(), given_value = arguments.tensor();
  Options options;
  options.take_tensors(arguments);
  const auto value_weights = arguments.optional_tensor();
  const auto key_segments = arguments.optional_tensor();
  options.take_scalars(arguments);
  const bool save_for_backward = arguments.take<bool>();
  const int64_t row_statistics = arguments.take<int64_t>();
  for (int statistic = 0; statistic < 4; ++statistic)  // sink_tokens, top_k, segments, distance_window
    arguments.take<int64_t>();
  STD_TORCH_CHECK(row_statistics == 0, "row_statistics: the CPU kernels compute none yet");

  Inputs inputs(given_query, given_key, given_value, options);
  AttentionProblem& problem = inputs.problem;
  const int64_t batch = problem.batch, heads = problem.heads, rows = problem.queries;
  const bool reweighted = problem.reweight.power > 0.0f;
  Tensor output = inputs.empty_output(), log_normalizer = inputs.empty_log_normalizer();
  const Tensor nothing = empty_contiguous({0}, ScalarType::Float);
  Tensor saved_rows = nothing, saved_values = nothing;
  if (save_for_backward) {
    saved_rows =
        empty_contiguous({batch, heads, rows, reweighted ? kSavedWidthReweight : kSavedWidthPlain}, ScalarType::Float);
    problem.saved_rows = static_cast<float*>(saved_rows.mutable_data_ptr());
    if (reweighted) {
      saved_values = empty_contiguous({batch, heads, rows, problem.value_width}, ScalarType::Float);
      problem.saved_values = static_cast<float*>(saved_values.mutable_data_ptr());
    }
  }
  kernels().attention_forward(problem, torch_threads(multiply_adds(problem)));
  const auto unused = [](ScalarType dtype) { return empty_contiguous({0}, dtype); };
  put_results(stack, output, log_normalizer, save_for_backward ? saved_rows : unused(ScalarType::Float),
              save_for_backward && reweighted ? saved_values : unused(ScalarType::Float), unused(ScalarType::Float),
              unused(ScalarType::Long), unused(ScalarType::Float), unused(ScalarType::Long), unused(ScalarType::Float));
}

void attention_decode(StableIValue* stack, uint64_t, uint64_t) {
  ArgumentReader arguments(stack);
  const Tensor given_query = arguments.tensor(), given_key = arguments.tensor(), given_value = arguments.tensor();
  Options options;
  for (auto* tensor :
       {&options.key_lengths, &options.key_mask, &options.alibi_slopes, &options.sinks, &options.scale_per_head})
    *tensor = arguments.optional_tensor();
  options.take_scalars(arguments, false);

  Inputs inputs(given_query, given_key, given_value, options);
  Tensor output = inputs.empty_output(), log_normalizer = inputs.empty_log_normalizer();
  kernels().attention_forward(inputs.problem, torch_threads(multiply_adds(inputs.problem)));
  put_results(stack, output, log_normalizer);
}

void attention_backward(StableIValue* stack, uint64_t, uint64_t) {
  ArgumentReader arguments(stack);
  const Tensor given_grad_output = arguments.tensor();
  const auto grad_log_normalizer = arguments.optional_tensor();
  const Tensor given_query = arguments.tensor(), given_key = arguments.tensor(), given_value = arguments.tensor();
  const Tensor given_output = arguments.tensor(), given_rows = arguments.tensor(), given_values = arguments.tensor();
  Options options;
  options.take_tensors(arguments);
  options.take_scalars(arguments);
  const bool needs_mask = arguments.take<bool>();
  const bool needs_sinks = arguments.take<bool>();
  const bool needs_scale = arguments.take<bool>();

  const Tensor grad_output = with_contiguous_rows(given_grad_output, "grad_output");
  const Tensor output = with_contiguous_rows(given_output, "output");
  const Tensor saved_rows = torch::stable::contiguous(given_rows);
  const Tensor saved_values = torch::stable::contiguous(given_values);
  Inputs inputs(given_query, given_key, given_value, options);
  AttentionProblem& problem = inputs.problem;
  const ScalarType dtype = inputs.query.scalar_type();
  const int64_t batch = problem.batch, heads = problem.heads, rows = problem.queries;
  const bool reweighted = problem.reweight.power > 0.0f;
  const int64_t saved_width = reweighted ? kSavedWidthReweight : kSavedWidthPlain;
  for (const Tensor* tensor : {&grad_output, &output})
    STD_TORCH_CHECK(tensor->dim() == 4 && tensor->size(0) == batch && tensor->size(1) == heads &&
                        tensor->size(2) == rows && tensor->size(3) == problem.value_width &&
                        tensor->scalar_type() == dtype,
                    "grad_output and output: expected (B, H, M, Dv) in the dtype of query");
  STD_TORCH_CHECK(saved_rows.numel() == batch * heads * rows * saved_width && saved_rows.is_cpu() &&
                      saved_rows.scalar_type() == ScalarType::Float,
                  "saved_rows: expected what attention(save_for_backward=True) returned");
  STD_TORCH_CHECK(!reweighted || (saved_values.numel() == batch * heads * rows * problem.value_width &&
                                  saved_values.is_cpu() && saved_values.scalar_type() == ScalarType::Float),
                  "saved_values: expected what attention(save_for_backward=True) returned");
  problem.output = heads_view(output);
  problem.saved_rows = const_cast<float*>(static_cast<const float*>(saved_rows.const_data_ptr()));
  problem.saved_values = const_cast<float*>(static_cast<const float*>(saved_values.const_data_ptr()));

  Tensor grad_query = empty_heads(batch, heads, rows, problem.head_width, dtype);
  Tensor grad_key = empty_heads(batch, problem.key_heads, problem.keys, problem.head_width, dtype);
  Tensor grad_value = empty_heads(batch, problem.key_heads, problem.keys, problem.value_width, dtype);
  AttentionGradients gradients;
  gradients.grad_output = heads_view(grad_output);
  gradients.grad_query = writable_heads_view(grad_query);
  gradients.grad_key = writable_heads_view(grad_key);
  gradients.grad_value = writable_heads_view(grad_value);
  Tensor grad_log =
      grad_log_normalizer ? torch::stable::contiguous(*grad_log_normalizer) : empty_contiguous({0}, ScalarType::Float);
  if (grad_log_normalizer) {
    STD_TORCH_CHECK(
        grad_log.numel() == batch * heads * rows && grad_log.scalar_type() == ScalarType::Float && grad_log.is_cpu(),
        "grad_log_normalizer: expected float32 (B, H, M) on the CPU");
    gradients.grad_log_normalizer = static_cast<const float*>(grad_log.const_data_ptr());
  }
  Tensor grad_mask = empty_contiguous({0}, ScalarType::Float);
  std::vector<double> mask_sums;
  Tensor grad_sinks = empty_contiguous({needs_sinks ? heads : 0}, ScalarType::Float);
  Tensor grad_scale = empty_contiguous({needs_scale ? heads : 0}, ScalarType::Float);
  if (needs_mask) {
    STD_TORCH_CHECK(options.attn_mask && problem.attn_mask.kind != MaskKind::kBool,
                    "attn_mask: expected a float mask where its gradient is asked for");
    std::vector<int64_t> sizes;
    for (int axis = 0; axis < 4; ++axis) sizes.push_back(options.attn_mask->size(axis));
    grad_mask = empty_contiguous(sizes, ScalarType::Float);
    if (grad_mask.numel() == batch * heads * rows * problem.keys) {
      torch::stable::zero_(grad_mask);
      gradients.grad_mask = static_cast<float*>(grad_mask.mutable_data_ptr());
    } else {
      mask_sums.assign(static_cast<size_t>(grad_mask.numel()), 0.0);
      gradients.grad_mask_sums = mask_sums.data();
    }
    for (int axis = 0; axis < 4; ++axis)
      gradients.grad_mask_strides[axis] = sizes[static_cast<size_t>(axis)] == 1 ? 0 : grad_mask.stride(axis);
  }
  if (needs_sinks) {
    STD_TORCH_CHECK(problem.sinks != nullptr, "sinks: expected a tensor where its gradient is asked for");
    gradients.grad_sinks = static_cast<float*>(grad_sinks.mutable_data_ptr());
  }
  if (needs_scale) gradients.grad_scales = static_cast<float*>(grad_scale.mutable_data_ptr());
  kernels().attention_backward(problem, gradients, torch_threads(multiply_adds(problem)));
  std::copy(mask_sums.begin(), mask_sums.end(), static_cast<float*>(grad_mask.mutable_data_ptr()));
  put_results(stack, grad_query, grad_key, grad_value, grad_mask, grad_sinks, grad_scale);
}

}  // namespace

void register_attention_cpu(torch::stable::detail::StableLibrary& library) {
  library.impl("attention", attention);
  library.impl("attention_decode", attention_decode);
  library.impl("attention_backward", attention_backward);
}

}  // namespace sightline::binding
