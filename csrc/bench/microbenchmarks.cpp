// The parts of attention's forward pass timed apart, and the machine's own rates.
#include "bench/microbenchmarks.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "core/half.h"
#include "cpu/kernel_table.h"

namespace py = pybind11;

namespace sightline::bench {
namespace {

DType dtype_named(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "float16") return DType::kFloat16;
  if (name == "bfloat16") return DType::kBFloat16;
  throw std::invalid_argument("dtype: expected 'float32', 'float16' or 'bfloat16', got '" + name + "'");
}

// (rows, width) of normal numbers.
class RandomRows {
 public:
  RandomRows(int64_t rows, int64_t width, DType dtype, std::mt19937& random)
      : width_(width), dtype_(dtype), numbers_(static_cast<size_t>(rows * width)) {
    std::normal_distribution<float> normal;
    for (float& number : numbers_) number = normal(random);
    if (dtype == DType::kFloat32) return;
    for (const float number : numbers_)
      bits_.push_back(dtype == DType::kFloat16 ? core::float_to_float16(number) : core::float_to_bfloat16(number));
  }
  HeadsView view() {
    void* data = dtype_ == DType::kFloat32 ? static_cast<void*>(numbers_.data()) : bits_.data();
    return {data, 0, 0, width_};
  }

 private:
  int64_t width_;
  DType dtype_;
  std::vector<float> numbers_;
  std::vector<uint16_t> bits_;
};

py::dict time_attention_parts(const std::string& isa, const std::string& dtype, const std::string& weighting,
                              int64_t rows, int64_t keys, int64_t width, int repetitions) {
  if (weighting != "softmax" && weighting != "lssa")
    throw std::invalid_argument("weighting: expected 'softmax' or 'lssa', got '" + weighting + "'");
  if (rows < 1 || keys < 1 || width < 1 || width > 512 || repetitions < 1)
    throw std::invalid_argument("rows, keys, width and repetitions: expected at least 1, and a width of at most 512");
  const bool softplus = weighting == "lssa";
  AttentionProblem problem;
  problem.dtype = dtype_named(dtype);
  std::mt19937 random(1);
  RandomRows query(rows, width, problem.dtype, random), key(keys, width, problem.dtype, random);
  RandomRows value(keys, width, problem.dtype, random);
  problem.query = query.view();
  problem.key = key.view();
  problem.value = value.view();
  problem.batch = problem.heads = problem.key_heads = 1;
  problem.queries = rows;
  problem.keys = keys;
  problem.head_width = problem.value_width = width;
  const float scale = softplus ? std::log(static_cast<float>(width)) : 1.0f / std::sqrt(static_cast<float>(width));
  problem.scales = &scale;
  problem.weight_function = softplus ? WeightFunction::kSoftplus : WeightFunction::kSoftmax;
  problem.length_scale = problem.normalize_qk = softplus;
  AttentionParts warm_up, parts;
  {
    const py::gil_scoped_release release;
    table_of(isa).attention_parts(problem, 1, warm_up);
    table_of(isa).attention_parts(problem, repetitions, parts);
  }
  py::dict result;
  result["packing"] = parts.packing;
  result["scores"] = parts.scores;
  result["weights"] = parts.weights;
  result["values"] = parts.values;
  result["entries"] = parts.entries;
  return result;
}

double multiply_rate(const std::string& isa, const std::string& operands, double seconds) {
  if (operands != "float32" && operands != "bfloat16")
    throw std::invalid_argument("operands: expected 'float32' or 'bfloat16', got '" + operands + "'");
  const KernelTable& table = table_of(isa);
  const py::gil_scoped_release release;
  return table.multiply_rate(operands == "bfloat16", seconds);
}

double vector_seconds(const std::string& isa, int64_t turns, bool after_products, double seconds) {
  if (turns < 0) throw std::invalid_argument("turns: expected at least 0");
  const KernelTable& table = table_of(isa);
  const py::gil_scoped_release release;
  return table.vector_seconds(turns, after_products, seconds);
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Bytes per second of the fastest of several passes over the array, a part of it for each thread. The threads wait for
// each other before and after every pass, so that a pass takes as long as its slowest thread.
double read_rate(const std::string& isa, const py::array_t<float, py::array::c_style>& array, int threads, int passes) {
  if (array.size() < 1 || threads < 1 || passes < 1)
    throw std::invalid_argument("array, threads and passes: expected at least 1 number, 1 thread and 1 pass");
  const KernelTable& table = table_of(isa);
  const float* data = array.data();
  const int64_t count = array.size();
  const py::gil_scoped_release release;
  double fastest = std::numeric_limits<double>::infinity();
  std::barrier together(threads);
  const auto read = [&](int thread) {
    const int64_t begin = count * thread / threads, end = count * (thread + 1) / threads;
    for (int pass = 0; pass < passes; ++pass) {
      together.arrive_and_wait();
      const double start = now();
      table.read_floats(data + begin, end - begin);
      together.arrive_and_wait();
      if (thread == 0) fastest = std::min(fastest, now() - start);
    }
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(read, thread);
  read(0);
  for (std::thread& other : others) other.join();
  return static_cast<double>(count) * sizeof(float) / fastest;
}

}  // namespace

void bind_microbenchmarks(py::module_& module) {
  module.def(
      "attention_parts", time_attention_parts, py::arg("isa"), py::arg("dtype"), py::arg("weighting"), py::arg("rows"),
      py::arg("keys"), py::arg("width"), py::arg("repetitions") = 10,
      "Seconds on one thread of packing, scores, weights and values (weights times V) of one head's first rows, as "
      "many as a unit of work takes, against all keys; `entries` is the number of (row, key) pairs.");
  module.def("multiply_rate", multiply_rate, py::arg("isa"), py::arg("operands"), py::arg("seconds") = 0.2,
             "The most floating-point operations per second of one thread: fused multiply-adds in float32, or products "
             "of bfloat16 in pairs (0 where the instruction set has none).");
  module.def("vector_seconds", vector_seconds, py::arg("isa"), py::arg("turns"), py::arg("after_products"),
             py::arg("seconds") = 0.02,
             "Seconds of so many turns of 12 fused multiply-adds, alone or each time after four products of the tile "
             "unit (0 where there is none).");
  module.def("read_rate", read_rate, py::arg("isa"), py::arg("array").noconvert(), py::arg("threads") = 1,
             py::arg("passes") = 5,
             "Bytes per second at which the threads together read a contiguous float32 array: the best of the passes.");
}

}  // namespace sightline::bench
