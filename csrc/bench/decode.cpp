#include "bench/decode.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/scalar.h"
#include "cuda/decode_launch.h"
#include "cuda/decode_plan.h"

namespace py = pybind11;

namespace sightline::bench {
namespace {

// What no kernel may read, and every byte that no kernel may leave unwritten: NaN in every dtype.
constexpr int kPoison = 0xff;

// Runs every block of a launch, one after the other, each in shared memory that holds nothing of the one before.
struct EmulatedLauncher {
  template <class Kernel>
  void launch(int64_t x, int64_t y, int64_t z, const cuda::DecodeProblem& problem) {
    using Shared = typename Kernel::Shared;
    void* memory = std::aligned_alloc(64, static_cast<size_t>(core::round_up(sizeof(Shared), 64)));
    auto* shared = static_cast<Shared*>(memory);
    for (int64_t index = 0; index < x * y * z; ++index) {
      std::memset(memory, kPoison, sizeof(Shared));
      cuda::machine().run({index % x, index / x % y, index / (x * y)}, Kernel::kBlockThreads,
                          [&] { Kernel::run(problem, *shared); });
    }
    std::free(memory);
  }
};

DType dtype_named(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "float16") return DType::kFloat16;
  if (name == "bfloat16") return DType::kBFloat16;
  throw std::invalid_argument("dtype: expected float32, float16 or bfloat16, got " + name);
}

HeadsView view_of(const py::array& array, int64_t element_bytes) {
  if (array.ndim() != 4 || array.itemsize() != element_bytes)
    throw std::invalid_argument("query, key, value: expected 4 axes and the element size of dtype");
  return {const_cast<void*>(array.data()), array.strides(0) / element_bytes, array.strides(1) / element_bytes,
          array.strides(2) / element_bytes};
}

const float* floats_of(const std::optional<py::array>& array) {
  return array ? static_cast<const float*>(array->data()) : nullptr;
}

// Attention by the GPU's decoding kernels. Arrays hold the bits of `dtype`; `options` are AttentionProblem's, by name.
py::tuple attention_decode(const py::array& query, const py::array& key, const py::array& value,
                           const std::string& dtype, std::map<std::string, double> options, int64_t splits,
                           const std::optional<py::array>& key_lengths, const std::optional<py::array>& key_mask,
                           const std::optional<py::array>& alibi_slopes, const std::optional<py::array>& sinks,
                           const std::optional<py::array>& scales) {
  cuda::DecodeProblem problem;
  AttentionProblem& attention = problem.attention;
  attention.dtype = dtype_named(dtype);
  const int64_t bytes = attention.dtype == DType::kFloat32 ? 4 : 2;
  attention.query = view_of(query, bytes);
  attention.key = view_of(key, bytes);
  attention.value = view_of(value, bytes);
  attention.batch = query.shape(0);
  attention.heads = query.shape(1);
  attention.queries = query.shape(2);
  attention.head_width = query.shape(3);
  attention.key_heads = key.shape(1);
  attention.keys = key.shape(2);
  attention.value_width = value.shape(3);
  if (key_lengths) {
    problem.lengths = key_lengths->data();
    problem.lengths_are_64_bit = key_lengths->itemsize() == 8;
  }
  if (key_mask) {
    attention.key_mask = static_cast<const uint8_t*>(key_mask->data());
    attention.key_mask_strides[0] = key_mask->strides(0);
    attention.key_mask_strides[1] = key_mask->strides(1);
  }
  attention.alibi_slopes = floats_of(alibi_slopes);
  attention.sinks = floats_of(sinks);
  attention.scales = floats_of(scales);
  const auto option = [&](const char* name, double fallback) {
    const auto found = options.find(name);
    return found == options.end() ? fallback : found->second;
  };
  problem.scale = static_cast<float>(option("scale", 1.0));
  attention.causal = option("causal", 0) != 0;
  attention.window_left = static_cast<int64_t>(option("window_left", -1));
  attention.window_right = static_cast<int64_t>(option("window_right", -1));
  attention.weight_function = static_cast<WeightFunction>(static_cast<int32_t>(option("weight_function", 0)));
  attention.length_scale = option("length_scale", 0) != 0;
  attention.normalize_qk = option("normalize_qk", 0) != 0;
  attention.softcap = static_cast<float>(option("softcap", 0));
  attention.reweight = {static_cast<float>(option("reweight_power", 0)),
                        static_cast<float>(option("reweight_offset", 1)),
                        static_cast<int64_t>(option("reweight_exempt_rows", 3))};

  const auto sizes =
      std::vector<py::ssize_t>{attention.batch, attention.heads, attention.queries, attention.value_width};
  py::array output(query.dtype(), sizes);
  py::array_t<float> log_normalizer(std::vector<py::ssize_t>(sizes.begin(), sizes.end() - 1));
  std::memset(output.mutable_data(), kPoison, static_cast<size_t>(output.nbytes()));
  std::memset(log_normalizer.mutable_data(), kPoison, static_cast<size_t>(log_normalizer.nbytes()));
  attention.output = view_of(output, bytes);
  attention.log_normalizer = log_normalizer.mutable_data();

  constexpr int64_t kProcessors = 132;
  cuda::plan_decode(problem, kProcessors, splits);
  const auto workspace_bytes = static_cast<size_t>(cuda::lay_out_workspace(problem, nullptr));
  std::vector<char> workspace(workspace_bytes + 256, static_cast<char>(kPoison));
  const auto start = reinterpret_cast<uintptr_t>(workspace.data());
  cuda::lay_out_workspace(problem, reinterpret_cast<char*>(core::round_up(static_cast<int64_t>(start), 256)));

  EmulatedLauncher launcher;
  switch (attention.dtype) {
    case DType::kFloat32:
      cuda::launch_decode<cuda::Float32>(problem, launcher);
      break;
    case DType::kFloat16:
      cuda::launch_decode<cuda::Float16>(problem, launcher);
      break;
    case DType::kBFloat16:
      cuda::launch_decode<cuda::BFloat16>(problem, launcher);
      break;
  }
  return py::make_tuple(output, log_normalizer, problem.splits, problem.vectorized);
}

// Every split's [begin, end) of the keys [first, last].
std::vector<std::pair<int64_t, int64_t>> key_splits(int64_t first, int64_t last, int64_t splits) {
  std::vector<std::pair<int64_t, int64_t>> ranges;
  for (int64_t split = 0; split < splits; ++split) {
    const cuda::KeyRange range = cuda::keys_of_split(first, last, split, splits);
    ranges.emplace_back(range.begin, range.end);
  }
  return ranges;
}

using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;

template <class Function>
FloatArray apply_scalar(const FloatArray& x, Function function) {
  FloatArray result(std::vector<py::ssize_t>(x.shape(), x.shape() + x.ndim()));
  for (py::ssize_t index = 0; index < x.size(); ++index)
    result.mutable_data()[index] = function(core::Scalar{x.data()[index]}).value;
  return result;
}

}  // namespace

void bind_decode(py::module_& module) {
  module.def("attention_decode", attention_decode, py::arg("query"), py::arg("key"), py::arg("value"), py::arg("dtype"),
             py::arg("options"), py::arg("splits") = 0, py::arg("key_lengths") = py::none(),
             py::arg("key_mask") = py::none(), py::arg("alibi_slopes") = py::none(), py::arg("sinks") = py::none(),
             py::arg("scales") = py::none(),
             "The GPU's decoding kernels, emulated: output, log normalizer, how many splits, whether loads are wide.");
  module.def("key_splits", key_splits, "The [begin, end) that each split of the keys [first, last] takes.");
  module.def("scalar_exp2",
             [](const FloatArray& x) { return apply_scalar(x, [](core::Scalar value) { return core::exp2(value); }); });
  module.def("scalar_tanh",
             [](const FloatArray& x) { return apply_scalar(x, [](core::Scalar value) { return core::tanh(value); }); });
  module.def("scalar_power", [](const FloatArray& x, float exponent) {
    return apply_scalar(x, [exponent](core::Scalar value) { return core::power(value, exponent); });
  });
  module.def("scalar_softplus", [](const FloatArray& x) {
    return apply_scalar(x,
                        [](core::Scalar value) { return core::SoftPlus::forward(value) * core::Scalar{core::kLn2}; });
  });
}

}  // namespace sightline::bench
