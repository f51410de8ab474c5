// The parts of attention's forward pass timed apart, and the machine's own rates (csrc/cpu/microbenchmarks.cpp).
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "cpu/kernel_table.h"

namespace sightline::bench {

// Throws std::invalid_argument where this machine cannot run it.
const KernelTable& table_of(const std::string& isa);

void bind_microbenchmarks(pybind11::module_& module);

}  // namespace sightline::bench
