// The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, without torch: `sanitize_kernels CASES SEED`
// runs that many random cases of each operation, for every instruction set that was built and that this machine has.
//
// `sanitize_kernels HOW` does instead what must not go unnoticed (break_attention).
//
// Nothing is compared but finiteness: accuracy has its own tests. Memory that a kernel forgot to write is NaN.
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>

#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <thread>
#include <vector>

#include "sanitize/buffers.h"
#include "sanitize/run.h"

// Read by the libraries of the sanitizers. Fresh memory is NaN in every format. Leaks are left alone: looking for them
// needs rights that containers do not give.
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
  return "max_malloc_fill_size=2147483647:malloc_fill_byte=255:detect_leaks=0:detect_stack_use_after_return=0";
}
extern "C" __attribute__((visibility("default"))) const char* __ubsan_default_options() {
  return "print_stacktrace=1:abort_on_error=1";
}

namespace sightline::sanitize {
namespace {

std::string current_case;

void report_case() { std::fprintf(stderr, "\nwhile computing: %s\n", current_case.c_str()); }

struct ThreadCount {
  int count;
};

}  // namespace

void describe_case(const std::string& description) { current_case = description; }

Parallel own_threads(int count) {
  static thread_local ThreadCount threads;  // outlives the call that Parallel points into
  threads.count = count;
  Parallel parallel;
  parallel.threads = count;
  parallel.state = &threads;
  parallel.run = [](void (*body)(void*, int64_t), void* context, void* state) {
    std::vector<std::thread> pool;
    for (int index = 1; index < static_cast<ThreadCount*>(state)->count; ++index)
      pool.emplace_back(body, context, index);
    body(context, 0);
    for (std::thread& thread : pool) thread.join();
  };
  return parallel;
}

void run_elementwise(const Run& run) {
  const float special[] = {NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 1e-42f, 3e38f, -3e38f, -126.5f, 128.0f};
  for (const int64_t count : {0, 1, 3, 4, 15, 16, 17, 33}) {
    describe_case("elementwise functions, " + std::to_string(count) + " numbers");
    Array<float> x(count), result(count), derivative(count);
    for (int64_t index = 0; index < count; ++index) x[index] = special[index % 10];
    const KernelTable& kernels = run.kernels;
    for (const auto function :
         {kernels.exp2, kernels.log2_one_plus, kernels.exp2_short, kernels.log2_one_plus_short, kernels.tanh})
      function(x.get(), result.get(), count);
    kernels.softplus(x.get(), result.get(), derivative.get(), count);
    for (const float power : {0.0f, 1.0f, 15.0f, 2.5f, 100.0f}) kernels.power(x.get(), power, result.get(), count);
  }
}

}  // namespace sightline::sanitize

int main(int count, char** arguments) {
  using namespace sightline;
  if (count < 2 || count > 3) {
    std::fprintf(stderr, "usage: sanitize_kernels CASES SEED, or sanitize_kernels keys|queries|widths|overflow\n");
    return 2;
  }
  __sanitizer_set_death_callback(sanitize::report_case);
  // Undefined behaviour ends the program through a library of its own, which knows nothing of that callback.
  std::signal(SIGABRT, [](int) {
    sanitize::report_case();
    std::_Exit(1);
  });
  const KernelTable* tables[8];
  const int available = available_kernels(tables, 8);
  int checked = 0;
  for (int index = 0; index < available; ++index) {
    if (tables[index]->attention_forward == nullptr) continue;  // not built
    ++checked;
    std::mt19937 random(count == 3 ? static_cast<uint32_t>(std::atoi(arguments[2])) : 0u);
    const sanitize::Run run{*tables[index], std::atoi(arguments[1]), random};
    try {
      if (count == 2) {
        sanitize::break_attention(run, arguments[1]);
        continue;
      }
      sanitize::run_elementwise(run);
      sanitize::run_attention(run);
      sanitize::run_recurrence(run);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s\n", error.what());
      sanitize::report_case();
      return 1;
    }
    std::printf("%s: %d cases of each operation\n", tables[index]->name, run.cases);
  }
  if (checked == 0) std::fprintf(stderr, "this machine has none of the instruction sets that were built\n");
  return checked == 0 ? 1 : 0;
}
