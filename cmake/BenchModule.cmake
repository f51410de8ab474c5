# The module _bench: core and cpu seen from NumPy, without torch. It is written to <root>/build/bench, whatever the
# build folder, because the tests look for it there; it needs Python's headers, which not every machine has.

find_program(Python_EXECUTABLE ${SIGHTLINE_PYTHON} REQUIRED NO_CACHE)
find_package(Python COMPONENTS Interpreter Development.Module QUIET)
if(NOT Python_Development.Module_FOUND)
  message(STATUS "sightline: no _bench module: the headers of ${SIGHTLINE_PYTHON} are missing (python3-dev)")
  return()
endif()
execute_process(
  COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir
  OUTPUT_VARIABLE pybind11_dir OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE status)
if(NOT status EQUAL 0)
  message(STATUS "sightline: no _bench module: ${SIGHTLINE_PYTHON} has no pybind11")
  return()
endif()
find_package(pybind11 CONFIG REQUIRED PATHS ${pybind11_dir} NO_DEFAULT_PATH)

pybind11_add_module(_bench MODULE NO_EXTRAS csrc/bench/decode.cpp csrc/bench/microbenchmarks.cpp csrc/bench/module.cpp)
target_include_directories(_bench PRIVATE csrc)
# Every decoding kernel is emulated: there is much of it, and it is slow anyway. The emulation jumps between stacks, which
# a fortified longjmp takes for an error.
set_source_files_properties(csrc/bench/decode.cpp PROPERTIES COMPILE_OPTIONS "-O1;-U_FORTIFY_SOURCE")
target_link_libraries(_bench PRIVATE sightline_dispatch ${SIGHTLINE_KERNELS})
set_target_properties(_bench PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${PROJECT_SOURCE_DIR}/build/bench)
