// Function qualifiers shared by host and device code.
//
// Everything in csrc/core and in the vector headers is force-inlined and static: the same header is compiled once
// per instruction set, and a function with external (weak) linkage would let the linker keep the AVX-512 copy for
// the caller that was chosen because the machine has no AVX-512.
#pragma once

#if defined(__CUDACC__)
#define SIGHTLINE_INLINE static __host__ __device__ __forceinline__
#else
#define SIGHTLINE_INLINE [[maybe_unused]] static inline __attribute__((always_inline))
#endif

// Before a template that calls what it is given: on the host what belongs to the host, on the device what belongs
// there.
#if defined(__CUDACC__)
#define SIGHTLINE_ANY_CALLER _Pragma("nv_exec_check_disable")
#else
#define SIGHTLINE_ANY_CALLER
#endif

// After the parameters of a lambda that is called more than once in the innermost loop.
#define SIGHTLINE_INLINE_LAMBDA __attribute__((always_inline))

// Before a loop whose bounds the compiler knows: a register array is indexed by constants only when it is unrolled.
#if defined(__CUDACC__)
#define SIGHTLINE_PRAGMA(text) _Pragma(#text)
#define SIGHTLINE_UNROLL _Pragma("unroll")
#define SIGHTLINE_UNROLL_BY(count) SIGHTLINE_PRAGMA(unroll(count))
#else
#define SIGHTLINE_UNROLL_BY(count)
#define SIGHTLINE_UNROLL _Pragma("GCC unroll 32")
#endif
