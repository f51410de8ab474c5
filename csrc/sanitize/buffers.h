// Tensors of exactly the memory that they need: what lies behind the last element cannot be read or written by any
// instruction, and what lies between rows shows when it was.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/problem.h"

namespace sightline::sanitize {

// The memory ends where a page ends that must not be touched. Of no bytes: null, as torch has it.
class GuardedMemory {
 public:
  explicit GuardedMemory(int64_t bytes);
  ~GuardedMemory();
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;
  char* get() const { return start_; }

 private:
  char* mapping_ = nullptr;
  char* start_ = nullptr;
  int64_t mapped_ = 0;
};

// Values of one list in random order, every one of them once before any comes again: so that a run of a few cases
// tries all of them.
template <class T>
class Deck {
 public:
  explicit Deck(std::vector<T> values) : values_(std::move(values)), next_(values_.size()) {}
  T draw(std::mt19937& random) {
    if (next_ == values_.size()) {
      std::shuffle(values_.begin(), values_.end(), random);
      next_ = 0;
    }
    return values_[next_++];
  }

 private:
  std::vector<T> values_;
  size_t next_;
};

enum class Layout { kContiguous, kRowsBeforeHeads, kGaps };
enum class Contents { kNumbers, kUnwritten };

int64_t size_of(DType dtype);
const char* name_of(DType dtype);

// A (B, H, N, D) tensor in one of three layouts. `kNumbers` are normal with this deviation; `kUnwritten` is NaN, so
// that whatever a kernel leaves out is found, as is what it reads between rows.
class HeadsTensor {
 public:
  HeadsTensor(int64_t batch, int64_t heads, int64_t rows, int64_t width, DType dtype, Layout layout, Contents contents,
              std::mt19937& random, float deviation = 1.0f);
  const HeadsView& view() const { return view_; }
  void set(int64_t batch, int64_t head, int64_t row, int64_t column, float value);
  // Throws where something was written between the rows, and where a number is not finite but should be.
  void check(const char* name, bool finite) const;

 private:
  int64_t size_[4];
  int64_t elements_;
  DType dtype_;
  std::unique_ptr<GuardedMemory> memory_;
  HeadsView view_;

  int64_t offset(int64_t batch, int64_t head, int64_t row) const;
  float at(int64_t offset) const;
  void put(int64_t offset, float value);
};

// A flat array, filled with NaN (numbers) or all bits set.
template <class T>
class Array {
 public:
  explicit Array(int64_t count) : count_(count), memory_(count * static_cast<int64_t>(sizeof(T))) {
    for (int64_t index = 0; index < count * static_cast<int64_t>(sizeof(T)); ++index) memory_.get()[index] = '\xff';
  }
  T* get() const { return reinterpret_cast<T*>(memory_.get()); }
  int64_t count() const { return count_; }
  T& operator[](int64_t index) { return get()[index]; }
  const T& operator[](int64_t index) const { return get()[index]; }
  void fill(T value) {
    for (int64_t index = 0; index < count_; ++index) get()[index] = value;
  }
  void randomize(std::mt19937& random, float deviation = 1.0f) {
    std::normal_distribution<float> normal(0.0f, deviation);
    for (int64_t index = 0; index < count_; ++index) get()[index] = static_cast<T>(normal(random));
  }
  // Minus infinity is the logarithm of nothing.
  void check(const char* name, bool logarithms = false) const {
    for (int64_t index = 0; index < count_; ++index) {
      const auto value = get()[index];
      if (value - value == 0 || (logarithms && value < 0 && value == value)) continue;
      throw std::runtime_error(std::string(name) + ": not finite at " + std::to_string(index));
    }
  }

 private:
  int64_t count_;
  GuardedMemory memory_;
};

}  // namespace sightline::sanitize
