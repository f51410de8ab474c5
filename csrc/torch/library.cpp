// The operators of namespace `sightline`: their schemas, and the CPU implementations.
//
// A schema is forever: exported models carry it. So `attention` has had every argument of the public function and an
// output for every row statistic since its first version; outputs that were not asked for have no elements.
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cpu/kernel_table.h"
#include "torch/tensors.h"

namespace sightline::binding {

void register_attention_cpu(torch::stable::detail::StableLibrary& library);
void register_recurrence_cpu(torch::stable::detail::StableLibrary& library);

// Options that forward and backward share: first the tensors, then the scalars. A window side of -1 is unlimited, a
// softcap or a reweight_power of 0 is none; weight_function: 0 softmax, 1 softplus.
#define SIGHTLINE_OPTION_TENSORS                                                                    \
  "Tensor? key_lengths, Tensor? key_mask, Tensor? attn_mask, Tensor? alibi_slopes, Tensor? sinks, " \
  "Tensor? scale_per_head, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? dropout_seed"
#define SIGHTLINE_OPTION_SCALARS                                                                              \
  "bool causal, SymInt window_left, SymInt window_right, float scale, float dropout_p, int weight_function, " \
  "bool length_scale, bool normalize_qk, float softcap, float reweight_power, float reweight_offset, "        \
  "int reweight_exempt_rows"

// The same for the additive recurrence, with query, key and value. A state or a gradient of no elements was not asked
// for.
#define SIGHTLINE_RECURRENCE_ARGUMENTS                                                               \
  "Tensor query, Tensor key, Tensor value, Tensor? key_gain, Tensor? key_mask, Tensor? cu_seqlens, " \
  "Tensor? initial_log_normalizer, Tensor? initial_memory, bool causal, float scale"

STABLE_TORCH_LIBRARY(sightline, library) {
  library.def("attention(Tensor query, Tensor key, Tensor value, " SIGHTLINE_OPTION_TENSORS
              ", Tensor? value_weights, Tensor? key_segments, " SIGHTLINE_OPTION_SCALARS
              ", bool save_for_backward, int row_statistics, int sink_tokens, int top_k, int segments, "
              "int distance_window) -> (Tensor output, Tensor log_normalizer, Tensor saved_rows, "
              "Tensor saved_values, Tensor row_statistics, Tensor max_key, Tensor top_weights, Tensor top_keys, "
              "Tensor segment_mass)");
  // The same for few query rows per key head, without derivatives. Per-head tensors are float32.
  library.def(
      "attention_decode(Tensor query, Tensor key, Tensor value, Tensor? key_lengths, Tensor? key_mask, "
      "Tensor? alibi_slopes, Tensor? sinks, Tensor? scale_per_head, bool causal, SymInt window_left, "
      "SymInt window_right, float scale, int weight_function, bool length_scale, bool normalize_qk, float softcap, "
      "float reweight_power, float reweight_offset, int reweight_exempt_rows) -> (Tensor output, "
      "Tensor log_normalizer)");
  library.def(
      "attention_backward(Tensor grad_output, Tensor? grad_log_normalizer, Tensor query, Tensor key, "
      "Tensor value, Tensor output, Tensor saved_rows, Tensor saved_values, " SIGHTLINE_OPTION_TENSORS
      ", " SIGHTLINE_OPTION_SCALARS
      ", bool needs_mask_gradient, bool needs_sink_gradient, bool needs_scale_gradient) -> (Tensor grad_query, "
      "Tensor grad_key, Tensor grad_value, Tensor grad_attn_mask, Tensor grad_sinks, Tensor grad_scale)");
  library.def("additive_recurrence(" SIGHTLINE_RECURRENCE_ARGUMENTS
              ", bool output_final_state) -> (Tensor output, Tensor log_normalizer, Tensor memory)");
  library.def(
      "additive_recurrence_backward(Tensor grad_output, Tensor? grad_log_normalizer, Tensor? "
      "grad_memory, " SIGHTLINE_RECURRENCE_ARGUMENTS
      ", bool needs_gain_gradient, bool needs_state_gradient) -> (Tensor grad_query, Tensor grad_key, Tensor "
      "grad_value, Tensor grad_key_gain, "
      "Tensor grad_initial_log_normalizer, Tensor grad_initial_memory)");
}

STABLE_TORCH_LIBRARY_IMPL(sightline, CPU, library) {
  register_attention_cpu(library);
  register_recurrence_cpu(library);
}

}  // namespace sightline::binding

#define SIGHTLINE_EXPORT extern "C" __attribute__((visibility("default")))

// The instruction set in use, or null where SIGHTLINE_ISA names one that cannot run; then sightline_isa_error says why.
SIGHTLINE_EXPORT const char* sightline_isa_name() {
  try {
    return sightline::kernels().name;
  } catch (const std::runtime_error&) {
    return nullptr;
  }
}

SIGHTLINE_EXPORT const char* sightline_isa_error() {
  static std::string message;
  try {
    sightline::kernels();
    message.clear();
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  return message.c_str();
}

// Instruction sets of this machine, slowest first, separated by commas.
SIGHTLINE_EXPORT const char* sightline_available_isas() {
  static const std::string names = [] {
    const sightline::KernelTable* tables[8];
    const int count = sightline::available_kernels(tables, 8);
    std::string joined;
    for (int index = 0; index < count; ++index) joined += std::string(index == 0 ? "" : ",") + tables[index]->name;
    return joined;
  }();
  return names.c_str();
}
