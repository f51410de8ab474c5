// The way into the decoding kernels. CUDA's runtime is linked statically: the library then loads into a process
// whatever runtime its torch brought, and both meet in the driver's primary context.
#include "cuda/attention_decode.h"

#include "cuda/kernel_launcher.h"

namespace sightline::cuda {
namespace {

cudaError_t launch(const DecodeProblem& problem, int device, cudaStream_t stream) {
  // This runtime keeps a current device of its own.
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  switch (problem.attention.dtype) {
    case DType::kFloat16:
      return decode_float16(problem, stream);
    case DType::kBFloat16:
      return decode_bfloat16(problem, stream);
    default:
      return decode_float32(problem, stream);
  }
}

}  // namespace

int64_t processors_of(int device) {
  int count = 0;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess ? count : 0;
}

const char* attention_decode(const DecodeProblem& problem, int device, void* stream) {
  const cudaError_t error = launch(problem, device, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int runtime_version() { return CUDART_VERSION; }

}  // namespace sightline::cuda
