// The functions of device.h on the host, for tests: the threads of a block are fibers that take turns.
//
// A fiber runs until it meets the rest of its warp (an exchange, a matrix product) or of its block (a barrier), so one
// turn through a warp's fibers brings all of them to the same point. Whether it is the same point is checked: a warp
// instruction that only some lanes reach, undefined on a GPU, stops the emulation with an error. What it cannot show:
// races between threads of a block that a missing barrier leaves, since fibers never run at the same time in between.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstring>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define SIGHTLINE_DEVICE [[maybe_unused]] static inline

namespace sightline::cuda::emulation {

struct Block {
  int64_t x, y, z;
};

enum class Meeting : int32_t { kNone, kExchange, kAny, kProduct, kWarpBarrier, kBlockBarrier, kEnd };

constexpr size_t kExchangeBytes = 32;
constexpr size_t kStackBytes = 256 * 1024;

struct Copy {
  void* to;
  const void* from;  // null: zeros
  size_t bytes;
};

// The copies of a thread that are under way, oldest group first; the last group is still open.
class Copies {
 public:
  std::vector<Copy>& newest() { return groups_.back(); }
  void end_group() { groups_.emplace_back(); }
  void finish_all_but(size_t groups) {
    for (; groups_.size() > groups + 1; groups_.pop_front())
      for (const Copy& copy : groups_.front()) {
        if (copy.from == nullptr)
          std::memset(copy.to, 0, copy.bytes);
        else
          std::memcpy(copy.to, copy.from, copy.bytes);
      }
  }
  void clear() { groups_.assign(1, {}); }

 private:
  std::deque<std::vector<Copy>> groups_{1};
};

class Machine {
 public:
  static Machine& instance() {
    static thread_local Machine machine;
    return machine;
  }

  // Runs body() on `threads` fibers as one block.
  template <class Body>
  void run(Block block, int threads, const Body& body) {
    block_ = block;
    const auto call = [](const void* context) { (*static_cast<const Body*>(context))(); };
    prepare(threads, call, &body);
    for (bool running = true; running;) {
      for (int warp = 0; warp < threads / kWarpThreads; ++warp)
        while (turn(warp)) continue;
      running = next_phase();
    }
    if (!complaint_.empty()) throw std::logic_error(std::exchange(complaint_, {}));
  }

  // An exception cannot leave a fiber: what went wrong is thrown when the block has ended.
  void complain(const char* what) { complaint_ = what; }

  int thread() const { return current_; }
  const Block& block() const { return block_; }
  Copies& copies() { return fibers_[static_cast<size_t>(current_)]->copies; }

  // Leaves `payload` for the warp, waits until every lane has left its own, and returns all of them.
  template <class Payload>
  const Payload* exchange(Meeting meeting, const Payload& payload) {
    static_assert(sizeof(Payload) <= kExchangeBytes);
    Fiber& fiber = *fibers_[static_cast<size_t>(current_)];
    // Two rooms in turn: a lane may enter the next exchange while others still read this one.
    char* room = rooms_.data() + static_cast<size_t>(current_ / kWarpThreads * 2 + fiber.parity) * kRoomBytes;
    fiber.parity ^= 1;
    auto* payloads = reinterpret_cast<Payload*>(room);
    std::memcpy(&payloads[current_ % kWarpThreads], &payload, sizeof payload);
    meet(meeting);
    return payloads;
  }

  void meet(Meeting meeting) {
    Fiber& fiber = *fibers_[static_cast<size_t>(current_)];
    fiber.meeting = meeting;
    if (_setjmp(fiber.pause) == 0) _longjmp(scheduler_, 1);
  }

 private:
  static constexpr size_t kRoomBytes = kExchangeBytes * kWarpThreads;

  struct Fiber {
    ucontext_t context;  // to start it
    jmp_buf pause;       // to go on with it: swapcontext() would ask the kernel for the signal mask every time
    bool started = false;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    Meeting meeting = Meeting::kNone;
    int parity = 0;
    Copies copies;
  };

  static void enter() {
    Machine& machine = instance();
    machine.call_(machine.context_);
    machine.meet(Meeting::kEnd);
  }

  void prepare(int threads, void (*call)(const void*), const void* context) {
    call_ = call;
    context_ = context;
    while (fibers_.size() < static_cast<size_t>(threads)) fibers_.push_back(std::make_unique<Fiber>());
    threads_ = threads;
    rooms_.assign(static_cast<size_t>(threads / kWarpThreads * 2) * kRoomBytes, 0);
    for (int thread = 0; thread < threads; ++thread) {
      Fiber& fiber = *fibers_[static_cast<size_t>(thread)];
      fiber.meeting = Meeting::kNone;
      fiber.parity = 0;
      fiber.started = false;
      fiber.copies.clear();
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Machine::enter, 0);
    }
  }

  // Runs a fiber to its next meeting.
  void resume(Fiber& fiber) {
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.pause, 1);
    fiber.started = true;
    setcontext(&fiber.context);
  }

  // Lets every lane of a warp run to its next meeting. False once they wait for the block or have ended.
  bool turn(int warp) {
    const int first = warp * kWarpThreads;
    const Meeting before = fibers_[static_cast<size_t>(first)]->meeting;
    if (before == Meeting::kBlockBarrier || before == Meeting::kEnd) return false;
    for (int lane = 0; lane < kWarpThreads; ++lane) {
      current_ = first + lane;
      resume(*fibers_[static_cast<size_t>(current_)]);
    }
    const Meeting after = fibers_[static_cast<size_t>(first)]->meeting;
    for (int lane = 1; lane < kWarpThreads; ++lane)
      if (fibers_[static_cast<size_t>(first + lane)]->meeting != after)
        throw std::logic_error("the lanes of a warp meet at different instructions");
    return true;
  }

  // After a barrier of the block; false at the end of the kernel.
  bool next_phase() {
    const Meeting meeting = fibers_[0]->meeting;
    for (int thread = 0; thread < threads_; ++thread) {
      Fiber& fiber = *fibers_[static_cast<size_t>(thread)];
      if (fiber.meeting != meeting) throw std::logic_error("a barrier that only some warps of the block reach");
      fiber.meeting = Meeting::kNone;
    }
    return meeting != Meeting::kEnd;
  }

  Block block_{};
  int current_ = 0, threads_ = 0;
  void (*call_)(const void*) = nullptr;
  const void* context_ = nullptr;
  jmp_buf scheduler_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<char> rooms_;
  std::string complaint_;
};

}  // namespace sightline::cuda::emulation

namespace sightline::cuda {

SIGHTLINE_DEVICE emulation::Machine& machine() { return emulation::Machine::instance(); }
SIGHTLINE_DEVICE int thread_index() { return machine().thread(); }
SIGHTLINE_DEVICE int64_t block_x() { return machine().block().x; }
SIGHTLINE_DEVICE int64_t block_y() { return machine().block().y; }
SIGHTLINE_DEVICE int64_t block_z() { return machine().block().z; }
SIGHTLINE_DEVICE void sync_block() { machine().meet(emulation::Meeting::kBlockBarrier); }
SIGHTLINE_DEVICE void sync_warp() { machine().meet(emulation::Meeting::kWarpBarrier); }

SIGHTLINE_DEVICE float shuffle(float x, int lane) { return machine().exchange(emulation::Meeting::kExchange, x)[lane]; }
SIGHTLINE_DEVICE float shuffle_xor(float x, int mask) { return shuffle(x, (thread_index() % kWarpThreads) ^ mask); }
SIGHTLINE_DEVICE int32_t shuffle_xor(int32_t x, int mask) {
  return machine().exchange(emulation::Meeting::kExchange, x)[(thread_index() % kWarpThreads) ^ mask];
}
SIGHTLINE_DEVICE bool any_in_warp(bool condition) {
  const bool* conditions = machine().exchange(emulation::Meeting::kAny, condition);
  bool result = false;
  for (int lane = 0; lane < kWarpThreads; ++lane) result |= conditions[lane];
  return result;
}

// A copy is made when its group is waited for, so that reading too early finds what lay there before.
template <size_t kBytes>
SIGHTLINE_DEVICE void copy_bytes(void* to, const void* from, bool live) {
  if (live && reinterpret_cast<uintptr_t>(from) % kBytes != 0) machine().complain("a wide load that is not aligned");
  if (reinterpret_cast<uintptr_t>(to) % kBytes != 0) machine().complain("a wide store that is not aligned");
  machine().copies().newest().push_back({to, live ? from : nullptr, kBytes});
}
SIGHTLINE_DEVICE void copy_16_bytes(void* to, const void* from, bool live) { copy_bytes<16>(to, from, live); }
SIGHTLINE_DEVICE void copy_8_bytes(void* to, const void* from, bool live) { copy_bytes<8>(to, from, live); }
SIGHTLINE_DEVICE void end_copy_group() { machine().copies().end_group(); }
SIGHTLINE_DEVICE void wait_for_all_but_newest_group() { machine().copies().finish_all_but(1); }

SIGHTLINE_DEVICE Words4 load_16_bytes(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) machine().complain("a wide load that is not aligned");
  Words4 words;
  std::memcpy(&words, from, sizeof words);
  return words;
}

SIGHTLINE_DEVICE uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xffffu) | (b << 16); }
SIGHTLINE_DEVICE uint32_t high_halves(uint32_t a, uint32_t b) { return (a >> 16) | (b & 0xffff0000u); }
SIGHTLINE_DEVICE uint32_t pack_float16(float low, float high) {
  return core::float_to_float16(low) | static_cast<uint32_t>(core::float_to_float16(high)) << 16;
}
SIGHTLINE_DEVICE uint32_t pack_bfloat16(float low, float high) {
  return core::float_to_bfloat16(low) | static_cast<uint32_t>(core::float_to_bfloat16(high)) << 16;
}
SIGHTLINE_DEVICE float widen_float16(uint16_t bits) { return core::float16_to_float(bits); }

// Lane 4 g + t holds of a: rows g and g + 8, columns 2t, 2t + 1 (x, y) and 2t + 8, 2t + 9 (z, w); of b: rows 2t, 2t + 1
// (b0) and 2t + 8, 2t + 9 (b1) of column g; of the sums: rows g and g + 8, columns 2t, 2t + 1.
template <class Widen>
SIGHTLINE_DEVICE void multiply_add(float (&sums)[4], const Words4& a, uint32_t b0, uint32_t b1, Widen widen) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const Operands* lanes = machine().exchange(emulation::Meeting::kProduct, Operands{{a.x, a.y, a.z, a.w}, {b0, b1}});
  const int lane = thread_index() % kWarpThreads;
  for (int entry = 0; entry < 4; ++entry) {
    const int row = lane / 4 + entry / 2 * 8, column = lane % 4 * 2 + entry % 2;
    float sum = 0.0f;
    for (int k = 0; k < 16; ++k) {
      const int pair = k % 8 / 2, odd = k % 2;
      const uint32_t left = lanes[row % 8 * 4 + pair].a[k / 8 * 2 + row / 8];
      const uint32_t right = lanes[column * 4 + pair].b[k / 8];
      sum += widen(static_cast<uint16_t>(left >> (16 * odd))) * widen(static_cast<uint16_t>(right >> (16 * odd)));
    }
    sums[entry] += sum;
  }
}
SIGHTLINE_DEVICE void multiply_add_float16(float (&sums)[4], const Words4& a, uint32_t b0, uint32_t b1) {
  multiply_add(sums, a, b0, b1, [](uint16_t bits) { return core::float16_to_float(bits); });
}
SIGHTLINE_DEVICE void multiply_add_bfloat16(float (&sums)[4], const Words4& a, uint32_t b0, uint32_t b1) {
  multiply_add(sums, a, b0, b1, [](uint16_t bits) { return core::bfloat16_to_float(bits); });
}

}  // namespace sightline::cuda
