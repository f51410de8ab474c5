#include "cuda/kernel_launcher.h"

namespace sightline::cuda {

cudaError_t decode_float16(const DecodeProblem& problem, cudaStream_t stream) {
  return decode<Float16>(problem, stream);
}

}  // namespace sightline::cuda
