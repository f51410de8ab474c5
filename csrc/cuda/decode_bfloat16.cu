#include "cuda/kernel_launcher.h"

namespace sightline::cuda {

cudaError_t decode_bfloat16(const DecodeProblem& problem, cudaStream_t stream) {
  return decode<BFloat16>(problem, stream);
}

}  // namespace sightline::cuda
