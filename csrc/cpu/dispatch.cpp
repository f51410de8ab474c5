// The choice of instruction set, made once at load.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/kernel_table.h"

namespace sightline {

namespace generic {
extern const KernelTable kTable;
}

#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable kTable;
}
namespace avx512 {
extern const KernelTable kTable;
}
namespace avx512_bf16 {
extern const KernelTable kTable;
}
#endif

int available_kernels(const KernelTable** tables, int capacity) {
  int count = 0;
  const auto add = [&](const KernelTable& table, bool supported) {
    if (supported && count < capacity) tables[count++] = &table;
  };
  add(generic::kTable, true);
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
  add(avx2::kTable, avx2);
  add(avx512::kTable, avx512);
  add(avx512_bf16::kTable, avx512 && __builtin_cpu_supports("avx512bf16"));
#endif
  return count;
}

namespace {

const KernelTable& choose() {
  const KernelTable* tables[8];
  const int count = available_kernels(tables, 8);
  const char* wanted = std::getenv("SIGHTLINE_ISA");
  if (wanted == nullptr || *wanted == '\0') return *tables[count - 1];
  std::string names;
  for (int index = 0; index < count; ++index) {
    if (std::strcmp(tables[index]->name, wanted) == 0) return *tables[index];
    names += std::string(index == 0 ? "" : ", ") + tables[index]->name;
  }
  throw std::runtime_error(std::string("SIGHTLINE_ISA: expected one of ") + names +
                           " (what this machine can run), got " + wanted);
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& chosen = choose();
  return chosen;
}

}  // namespace sightline
