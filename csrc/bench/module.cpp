// NumPy access to the torch-free kernels, for accuracy sweeps and microbenchmarks. Development only: not in the wheel.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "bench/decode.h"
#include "bench/microbenchmarks.h"

namespace py = pybind11;

namespace sightline::bench {

const KernelTable& table_of(const std::string& isa) {
  const KernelTable* tables[8];
  const int count = available_kernels(tables, 8);
  for (int index = 0; index < count; ++index)
    if (tables[index]->name == isa) return *tables[index];
  throw std::invalid_argument("isa: this machine cannot run '" + isa + "'");
}

namespace {

using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;

std::vector<std::string> isas() {
  const KernelTable* tables[8];
  const int count = available_kernels(tables, 8);
  std::vector<std::string> names;
  for (int index = 0; index < count; ++index) names.emplace_back(tables[index]->name);
  return names;
}

template <class Kernel>
FloatArray apply(const FloatArray& x, Kernel kernel) {
  FloatArray result(std::vector<py::ssize_t>(x.shape(), x.shape() + x.ndim()));
  kernel(x.data(), result.mutable_data(), x.size());
  return result;
}

py::tuple softplus(const std::string& isa, const FloatArray& x) {
  FloatArray derivative(std::vector<py::ssize_t>(x.shape(), x.shape() + x.ndim()));
  FloatArray value = apply(x, [&](const float* from, float* to, int64_t count) {
    table_of(isa).softplus(from, to, derivative.mutable_data(), count);
  });
  return py::make_tuple(value, derivative);
}

Parallel own_threads(int threads) {
  static thread_local int count = 1;  // outlives the call that Parallel points into
  count = threads;
  Parallel parallel;
  parallel.threads = threads;
  parallel.state = &count;
  parallel.run = [](void (*body)(void*, int64_t), void* context, void* state) {
    std::vector<std::thread> pool;
    for (int index = 1; index < *static_cast<int*>(state); ++index) pool.emplace_back(body, context, index);
    body(context, 0);
    for (std::thread& thread : pool) thread.join();
  };
  return parallel;
}

HeadsView view_of(const FloatArray& array, const char* name) {
  if (array.ndim() != 4) throw std::invalid_argument(std::string(name) + ": expected 4 axes (B, H, N, D)");
  const int64_t rows = array.shape(2), width = array.shape(3);
  return {const_cast<float*>(array.data()), array.shape(1) * rows * width, rows * width, width};
}

// Forward attention in fp32 on contiguous arrays, with the weightings' own default scale.
py::tuple attention(const std::string& isa, const FloatArray& query, const FloatArray& key, const FloatArray& value,
                    const std::string& weighting, bool causal, int threads) {
  AttentionProblem problem;
  problem.query = view_of(query, "query");
  problem.key = view_of(key, "key");
  problem.value = view_of(value, "value");
  problem.batch = query.shape(0);
  problem.heads = query.shape(1);
  problem.queries = query.shape(2);
  problem.head_width = query.shape(3);
  problem.key_heads = key.shape(1);
  problem.keys = key.shape(2);
  problem.value_width = value.shape(3);
  if (key.shape(0) != problem.batch || value.shape(0) != problem.batch || value.shape(1) != problem.key_heads ||
      value.shape(2) != problem.keys || key.shape(3) != problem.head_width || problem.key_heads == 0 ||
      problem.heads % problem.key_heads != 0)
    throw std::invalid_argument("key and value: expected shapes that fit query (B, H, M, D)");
  if (weighting != "softmax" && weighting != "lssa" && weighting != "lssar")
    throw std::invalid_argument("weighting: expected 'softmax', 'lssa' or 'lssar', got '" + weighting + "'");
  const bool softplus = weighting != "softmax";
  const float width = static_cast<float>(problem.head_width);
  const std::vector<float> scales(static_cast<size_t>(problem.heads),
                                  softplus ? std::log(width) : 1.0f / std::sqrt(width));
  problem.scales = scales.data();
  problem.causal = causal;
  problem.weight_function = softplus ? WeightFunction::kSoftplus : WeightFunction::kSoftmax;
  problem.length_scale = problem.normalize_qk = softplus;
  if (weighting == "lssar") problem.reweight.power = 15.0f;
  FloatArray output({problem.batch, problem.heads, problem.queries, problem.value_width});
  FloatArray log_normalizer({problem.batch, problem.heads, problem.queries});
  problem.output = view_of(output, "output");
  problem.log_normalizer = log_normalizer.mutable_data();
  {
    const py::gil_scoped_release release;
    table_of(isa).attention_forward(problem, own_threads(threads));
  }
  return py::make_tuple(output, log_normalizer);
}

}  // namespace

PYBIND11_MODULE(_bench, module) {
  module.doc() = "NumPy access to sightline's torch-free kernels; `isa` is one of isas().";
  module.def("isas", isas, "Instruction sets of this machine, slowest first.");
  module.def("exp2", [](const std::string& isa, const FloatArray& x) { return apply(x, table_of(isa).exp2); });
  module.def("log2_one_plus",
             [](const std::string& isa, const FloatArray& x) { return apply(x, table_of(isa).log2_one_plus); });
  module.def("exp2_short",
             [](const std::string& isa, const FloatArray& x) { return apply(x, table_of(isa).exp2_short); });
  module.def("log2_one_plus_short",
             [](const std::string& isa, const FloatArray& x) { return apply(x, table_of(isa).log2_one_plus_short); });
  module.def("tanh", [](const std::string& isa, const FloatArray& x) { return apply(x, table_of(isa).tanh); });
  module.def("power", [](const std::string& isa, const FloatArray& x, float exponent) {
    return apply(x,
                 [&](const float* from, float* to, int64_t count) { table_of(isa).power(from, exponent, to, count); });
  });
  module.def("softplus", softplus, "softplus(x) and its derivative.");
  module.def("attention", attention, py::arg("isa"), py::arg("query"), py::arg("key"), py::arg("value"),
             py::arg("weighting") = "softmax", py::arg("causal") = false, py::arg("threads") = 1,
             "Output (B,H,M,Dv) and log normalizer (B,H,M) of float32 arrays.");
  bind_decode(module);
  bind_microbenchmarks(module);
}

}  // namespace sightline::bench
