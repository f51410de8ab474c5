// What the kernels ask of a GPU, in a dozen functions: who a thread is, exchange within a warp, barriers, wide copies,
// the matrix instruction of 16-bit numbers.
//
// Compiled by nvcc they are the instructions of sm_80 and newer. Compiled by anything else they are the functions of
// emulation.h, which runs the threads of a block one after the other: so the same kernel source is tested on a machine
// without a GPU.
#pragma once

#include <cstdint>

#include "core/half.h"
#include "core/macros.h"

namespace sightline::cuda {

constexpr int kWarpThreads = 32;

struct alignas(16) Words4 {  // 16 bytes, one load
  uint32_t x, y, z, w;
};

}  // namespace sightline::cuda

#if defined(__CUDACC__)

#define SIGHTLINE_DEVICE [[maybe_unused]] static __device__ __forceinline__

namespace sightline::cuda {

SIGHTLINE_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
SIGHTLINE_DEVICE int64_t block_x() { return blockIdx.x; }
SIGHTLINE_DEVICE int64_t block_y() { return blockIdx.y; }
SIGHTLINE_DEVICE int64_t block_z() { return blockIdx.z; }
SIGHTLINE_DEVICE void sync_block() { __syncthreads(); }
SIGHTLINE_DEVICE void sync_warp() { __syncwarp(); }
SIGHTLINE_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
SIGHTLINE_DEVICE int32_t shuffle_xor(int32_t x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
SIGHTLINE_DEVICE float shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
SIGHTLINE_DEVICE bool any_in_warp(bool condition) { return __any_sync(0xffffffffu, condition); }

// From global to shared memory behind the thread's back, past the first-level cache; zeros where not `live`. What a
// thread asked for is there for that thread alone, once it has waited for the group.
SIGHTLINE_DEVICE void copy_16_bytes(void* to, const void* from, bool live) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               :
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from), "r"(live ? 16 : 0)
               : "memory");
}
SIGHTLINE_DEVICE void copy_8_bytes(void* to, const void* from, bool live) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;"
               :
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from), "r"(live ? 8 : 0)
               : "memory");
}
SIGHTLINE_DEVICE void end_copy_group() { asm volatile("cp.async.commit_group;" : : : "memory"); }
SIGHTLINE_DEVICE void wait_for_all_but_newest_group() { asm volatile("cp.async.wait_group 1;" : : : "memory"); }

SIGHTLINE_DEVICE Words4 load_16_bytes(const void* from) {
  const uint4 words = __ldg(static_cast<const uint4*>(from));
  return {words.x, words.y, words.z, words.w};
}

// Bytes 0 and 1 of both, and bytes 2 and 3 of both: two columns of two rows become two rows of two columns.
SIGHTLINE_DEVICE uint32_t low_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
SIGHTLINE_DEVICE uint32_t high_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

// Two floats rounded to 16 bits each, the first in the low half; and back.
SIGHTLINE_DEVICE uint32_t pack_float16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
SIGHTLINE_DEVICE uint32_t pack_bfloat16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
SIGHTLINE_DEVICE float widen_float16(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// sums (16 x 8) += a (16 x 16) b (16 x 8), spread over the warp as PTX ISA says for mma.m16n8k16.
SIGHTLINE_DEVICE void multiply_add_float16(float (&sums)[4], const Words4& a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}
SIGHTLINE_DEVICE void multiply_add_bfloat16(float (&sums)[4], const Words4& a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

}  // namespace sightline::cuda

#else
#include "cuda/emulation.h"
#endif
