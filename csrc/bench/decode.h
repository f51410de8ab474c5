// The decoding kernels of csrc/cuda, run on the host by the emulation of csrc/cuda/emulation.h.
#pragma once

#include <pybind11/pybind11.h>

namespace sightline::bench {

void bind_decode(pybind11::module_& module);

}  // namespace sightline::bench
