// The choice of instruction set, made once at load.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/kernel_table.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
namespace amx_bf16 {
extern const KernelTable kTable;
}

namespace {

// The tile unit: the processor has it, with bfloat16, and the kernel lets this process use its registers.
bool has_tile_unit() {
#if defined(__linux__)
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  constexpr unsigned int kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if ((edx & kAmxBf16) == 0 || (edx & kAmxTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace
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
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  // AMD's dot products of bfloat16 pairs do twice the work of an FMA in the same time, Intel's take several times as
  // long: there they are only for those who ask.
  const bool fast_pairs = __builtin_cpu_is("amd");
  if (!fast_pairs) add(avx512_bf16::kTable, bf16);
  add(avx512::kTable, avx512);
  if (fast_pairs) add(avx512_bf16::kTable, bf16);
  add(amx_bf16::kTable, bf16 && has_tile_unit());
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
