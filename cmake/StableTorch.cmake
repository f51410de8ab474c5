# Target stable_torch: the headers of the LibTorch stable ABI and the one library that implements it. find_package(Torch)
# would bring every library and flag of the torch at hand; of those the wheel must not depend on any.

if(NOT SIGHTLINE_TORCH_DIR)
  execute_process(
    COMMAND ${SIGHTLINE_PYTHON} -c
      "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0], end='')"
    OUTPUT_VARIABLE torch_dir ERROR_QUIET RESULT_VARIABLE status)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "sightline: ${SIGHTLINE_PYTHON} has no torch; install torch >= 2.10 or set SIGHTLINE_TORCH_DIR")
  endif()
  set(SIGHTLINE_TORCH_DIR ${torch_dir} CACHE PATH "" FORCE)
endif()
if(NOT EXISTS ${SIGHTLINE_TORCH_DIR}/include/torch/csrc/stable/library.h)
  message(FATAL_ERROR "sightline: ${SIGHTLINE_TORCH_DIR} has no stable-ABI headers; install torch >= 2.10")
endif()

add_library(stable_torch INTERFACE)
target_include_directories(stable_torch SYSTEM INTERFACE ${SIGHTLINE_TORCH_DIR}/include)
# 2.10: the oldest torch that the binary must load into.
target_compile_definitions(stable_torch INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
target_link_libraries(stable_torch INTERFACE ${SIGHTLINE_TORCH_DIR}/lib/libtorch_cpu.so)
