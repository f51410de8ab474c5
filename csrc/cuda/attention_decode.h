// Decoding on a GPU, as the binding sees it. No header of CUDA is needed to include this one.
#pragma once

#include <cstdint>

#include "cuda/decode_problem.h"

namespace sightline::cuda {

// Multiprocessors of a device, 0 where the driver does not say.
int64_t processors_of(int device);

// Launches the kernels on a stream (a cudaStream_t) of a device and returns at once. The problem must have been planned
// (decode_plan.h) and its workspace laid out. Null, or what CUDA complains about.
const char* attention_decode(const DecodeProblem& problem, int device, void* stream);

// The driver's and this library's version of CUDA, as 1000 * major + 10 * minor; the driver's is 0 where there is none.
int driver_version();
int runtime_version();

}  // namespace sightline::cuda
