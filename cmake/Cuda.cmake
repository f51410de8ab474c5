# libsightline_cuda.so, where nvcc is found: the kernels of csrc/cuda, and their operators. Neither a GPU nor a torch with
# CUDA is needed to build it.
#
# SIGHTLINE_CUDA: auto (build it if nvcc is there), on (fail if it is not), off. setup.py takes it from the environment
# variable of that name.
#
# CUDA's runtime is linked statically: the library then fits the torch of any CUDA version, and asks nothing of the
# process but a driver. The one function of libtorch_cuda.so that it calls comes from an empty library of that name while
# linking, so that a CPU-only torch suffices here and the real one is found at run time.

set(SIGHTLINE_CUDA auto CACHE STRING "Build the CUDA kernels: auto, on or off")
if(NOT SIGHTLINE_CUDA MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "sightline: SIGHTLINE_CUDA: expected auto, on or off, got '${SIGHTLINE_CUDA}'")
endif()

function(sightline_no_cuda reason)
  file(REMOVE ${CMAKE_BINARY_DIR}/libsightline_cuda.so)  # of an earlier build with other settings
  if(SIGHTLINE_CUDA STREQUAL "on")
    message(FATAL_ERROR "sightline: no CUDA kernels: ${reason}")
  endif()
  message(STATUS "sightline: no CUDA kernels: ${reason}")
endfunction()

if(SIGHTLINE_CUDA STREQUAL "off")
  sightline_no_cuda("SIGHTLINE_CUDA is off")
  return()
endif()
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  sightline_no_cuda("nvcc was not found, or does not work")
  return()
endif()
# Asked before CUDA is enabled, which would fail on a GPU family that nvcc does not know.
execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --version OUTPUT_VARIABLE nvcc_version ERROR_QUIET)
string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" nvcc_version "${nvcc_version}")
if(NOT CMAKE_MATCH_1 OR CMAKE_MATCH_1 VERSION_LESS 12.8)
  sightline_no_cuda("nvcc ${CMAKE_MATCH_1} is too old: 12.8 is the first that knows every GPU family here")
  return()
endif()
# Set before CUDA is enabled, which would choose one of its own: machine code for every family since Ampere, and portable
# code of the newest for those to come.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 100-real 100-virtual)
endif()
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -DNDEBUG")
enable_language(CUDA)

# 80-real -> 80, 100-virtual -> 100+: what the library says of itself.
set(architectures)
foreach(architecture IN LISTS CMAKE_CUDA_ARCHITECTURES)
  string(REGEX REPLACE "-real$" "" architecture ${architecture})
  string(REGEX REPLACE "-virtual$" "+" architecture ${architecture})
  list(APPEND architectures ${architecture})
endforeach()
list(JOIN architectures "," architectures)

file(CONFIGURE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/torch_cuda_stub.cpp CONTENT
  "extern \"C\" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n")
add_library(torch_cuda_stub SHARED ${CMAKE_CURRENT_BINARY_DIR}/torch_cuda_stub.cpp)
set_target_properties(torch_cuda_stub PROPERTIES
  OUTPUT_NAME torch_cuda LIBRARY_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/stub CXX_VISIBILITY_PRESET default)

add_library(sightline_cuda SHARED
  csrc/cuda/attention_decode.cu
  csrc/cuda/decode_bfloat16.cu
  csrc/cuda/decode_float16.cu
  csrc/cuda/decode_float32.cu
  csrc/torch/cuda_attention.cpp)
target_include_directories(sightline_cuda PRIVATE csrc)
target_compile_definitions(sightline_cuda PRIVATE USE_CUDA SIGHTLINE_CUDA_ARCHITECTURES="${architectures}")
target_compile_options(sightline_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--compress-mode=size>)
target_link_libraries(sightline_cuda PRIVATE stable_torch torch_cuda_stub)
target_link_options(sightline_cuda PRIVATE -Wl,--no-undefined -Wl,--as-needed -Wl,--exclude-libs,ALL)
add_dependencies(sightline_libraries sightline_cuda)
message(STATUS "sightline: CUDA kernels for ${architectures} with nvcc ${CMAKE_CUDA_COMPILER_VERSION}")
