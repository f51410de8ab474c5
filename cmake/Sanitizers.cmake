# The program sanitize_kernels: the kernels of the instruction sets in SIGHTLINE_SANITIZE under AddressSanitizer and
# UndefinedBehaviorSanitizer, without torch. `cmake -DSIGHTLINE_SANITIZE=generic,avx2` builds it and nothing else;
# tests/csrc/test_sanitizers.py does that.

string(REPLACE "," ";" SIGHTLINE_SANITIZED "${SIGHTLINE_SANITIZE}")
foreach(isa IN LISTS SIGHTLINE_SANITIZED)
  if(NOT isa IN_LIST SIGHTLINE_ISAS)
    message(FATAL_ERROR "sightline: SIGHTLINE_SANITIZE: expected some of ${SIGHTLINE_ISAS}, got '${isa}'")
  endif()
endforeach()

# Unoptimised, because compiling takes longer than running, and nothing that a check would find is optimised away.
set(CMAKE_CXX_FLAGS_RELEASE "-O0 -g1 -fno-omit-frame-pointer")
add_compile_options(-fsanitize=address,undefined -fno-sanitize-recover=all)
add_link_options(-fsanitize=address,undefined)

# csrc/cpu/dispatch.cpp names every set; those that are not built have tables without functions.
set(absent "#include \"cpu/kernel_table.h\"\n")
foreach(isa IN LISTS SIGHTLINE_ISAS)
  if(NOT isa IN_LIST SIGHTLINE_SANITIZED)
    string(APPEND absent
      "namespace sightline::${isa} { extern const KernelTable kTable; const KernelTable kTable{}; }\n")
  endif()
endforeach()
file(CONFIGURE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/absent_sets.cpp CONTENT "${absent}" @ONLY)
set(SIGHTLINE_ISAS ${SIGHTLINE_SANITIZED})

function(sightline_add_sanitize_program)
  find_package(Threads REQUIRED)
  add_executable(sanitize_kernels
    ${CMAKE_CURRENT_BINARY_DIR}/absent_sets.cpp
    csrc/sanitize/attention.cpp
    csrc/sanitize/buffers.cpp
    csrc/sanitize/main.cpp
    csrc/sanitize/recurrence.cpp)
  target_include_directories(sanitize_kernels PRIVATE csrc)
  target_link_libraries(sanitize_kernels PRIVATE sightline_dispatch ${SIGHTLINE_KERNELS} Threads::Threads)
endfunction()
