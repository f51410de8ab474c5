#include "cuda/kernel_launcher.h"

namespace sightline::cuda {

cudaError_t decode_float32(const DecodeProblem& problem, cudaStream_t stream) {
  return decode<Float32>(problem, stream);
}

}  // namespace sightline::cuda
