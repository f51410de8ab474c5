# sightline_add_kernels(SOURCE...) compiles each file of csrc/cpu once per instruction set, into one object library
# per set, and lists those libraries in SIGHTLINE_KERNELS. csrc/cpu/dispatch.cpp names the same sets.
#
# -ffast-math is not an option: it lets the compiler assume that NaN and inf do not occur, and their way through
# a kernel is specified. -fno-math-errno changes no value.

set(SIGHTLINE_ISAS generic)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|amd64|AMD64)$")
  list(APPEND SIGHTLINE_ISAS avx2 avx512 avx512_bf16 amx_bf16)
endif()
set(SIGHTLINE_FLAGS_generic)
set(SIGHTLINE_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(SIGHTLINE_FLAGS_avx512 ${SIGHTLINE_FLAGS_avx2} -mavx512f -mavx512bw -mavx512cd -mavx512dq -mavx512vl)
set(SIGHTLINE_FLAGS_avx512_bf16 ${SIGHTLINE_FLAGS_avx512} -mavx512bf16)
set(SIGHTLINE_FLAGS_amx_bf16 ${SIGHTLINE_FLAGS_avx512_bf16} -mamx-tile -mamx-bf16)

# GCC before 13 calls the deliberately undefined operand of its own AVX-512 intrinsics uninitialised (GCC bug 105593).
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  foreach(isa avx512 avx512_bf16 amx_bf16)
    list(APPEND SIGHTLINE_FLAGS_${isa} -Wno-uninitialized -Wno-maybe-uninitialized)
  endforeach()
endif()

function(sightline_add_kernels)
  list(TRANSFORM ARGN PREPEND ${PROJECT_SOURCE_DIR}/csrc/cpu/ OUTPUT_VARIABLE sources)
  foreach(isa IN LISTS SIGHTLINE_ISAS)
    set(target sightline_${isa})
    add_library(${target} OBJECT ${sources})
    target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR}/csrc)
    target_compile_definitions(${target} PRIVATE SIGHTLINE_ISA_NS=${isa})
    target_compile_options(${target} PRIVATE -fno-math-errno -ffp-contract=fast ${SIGHTLINE_FLAGS_${isa}})
    list(APPEND kernels ${target})
  endforeach()
  set(SIGHTLINE_KERNELS ${kernels} PARENT_SCOPE)
endfunction()
