// Launches of kernels on a CUDA stream. One element type is one .cu file, so that two compilers can work at once.
#pragma once

#include <cuda_runtime.h>

#include "cuda/decode_launch.h"

namespace sightline::cuda {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kBlockThreads, Kernel::kBlocksPerProcessor)
    enter(const __grid_constant__ DecodeProblem problem) {
  extern __shared__ Words4 shared_memory[];
  Kernel::run(problem, *reinterpret_cast<typename Kernel::Shared*>(shared_memory));
}

constexpr size_t kSharedBytesWithoutAsking = 48 * 1024;
constexpr size_t kSharedBytesOfEveryDevice = 99 * 1024;  // sm_86 and newer have no less, sm_80 has more

struct StreamLauncher {
  cudaStream_t stream;
  cudaError_t error = cudaSuccess;

  template <class Kernel>
  void launch(int64_t x, int64_t y, int64_t z, const DecodeProblem& problem) {
    constexpr size_t kBytes = sizeof(typename Kernel::Shared);
    static_assert(kBytes <= kSharedBytesOfEveryDevice);
    if (kBytes > kSharedBytesWithoutAsking && error == cudaSuccess)
      error = cudaFuncSetAttribute(enter<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (error != cudaSuccess) return;
    const dim3 grid(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
    enter<Kernel><<<grid, Kernel::kBlockThreads, kBytes, stream>>>(problem);
    error = cudaGetLastError();
  }
};

cudaError_t decode_float32(const DecodeProblem& problem, cudaStream_t stream);
cudaError_t decode_float16(const DecodeProblem& problem, cudaStream_t stream);
cudaError_t decode_bfloat16(const DecodeProblem& problem, cudaStream_t stream);

template <class T>
cudaError_t decode(const DecodeProblem& problem, cudaStream_t stream) {
  StreamLauncher launcher{stream};
  launch_decode<T>(problem, launcher);
  return launcher.error;
}

}  // namespace sightline::cuda
