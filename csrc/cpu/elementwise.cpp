// The polynomials of csrc/core over whole arrays, for the accuracy sweeps of the bench module.
#include "core/weights.h"
#include "cpu/kernel_table.h"
#include "cpu/workspace.h"

namespace sightline::SIGHTLINE_ISA_NS {
namespace {

template <class Function>
void apply(const float* x, float* result, int64_t count, Function function) {
  const FlushDenormals mode;
  for (int64_t index = 0; index < count; index += Vec::kWidth) {
    alignas(64) float lanes[Vec::kWidth] = {};
    const int64_t live = count - index < Vec::kWidth ? count - index : Vec::kWidth;
    for (int64_t lane = 0; lane < live; ++lane) lanes[lane] = x[index + lane];
    store(lanes, function(Vec::load(lanes)));
    for (int64_t lane = 0; lane < live; ++lane) result[index + lane] = lanes[lane];
  }
}

}  // namespace

void exp2_array(const float* x, float* result, int64_t count) {
  apply(x, result, count, [](Vec value) { return core::exp2(value); });
}

void log2_one_plus_array(const float* x, float* result, int64_t count) {
  apply(x, result, count, [](Vec value) { return core::log2_one_plus(value); });
}

void exp2_short_array(const float* x, float* result, int64_t count) {
  apply(x, result, count, [](Vec value) { return core::exp2_short(value); });
}

void log2_one_plus_short_array(const float* x, float* result, int64_t count) {
  apply(x, result, count, [](Vec value) { return core::log2_one_plus_short(value); });
}

void tanh_array(const float* x, float* result, int64_t count) {
  apply(x, result, count, [](Vec value) { return core::tanh(value); });
}

void softplus_array(const float* x, float* result, float* derivative, int64_t count) {
  apply(x, result, count, [](Vec value) { return core::SoftPlus::forward(value) * Vec::broadcast(core::kLn2); });
  apply(x, derivative, count, [](Vec value) {
    Vec slope;
    core::SoftPlus::forward_and_derivative(value, slope);
    return slope * Vec::broadcast(core::kLn2);
  });
}

void power_array(const float* x, float exponent, float* result, int64_t count) {
  apply(x, result, count, [exponent](Vec value) { return core::power(value, exponent); });
}

}  // namespace sightline::SIGHTLINE_ISA_NS
