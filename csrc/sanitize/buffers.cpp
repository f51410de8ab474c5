#include "sanitize/buffers.h"

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <new>

#include "core/half.h"

namespace sightline::sanitize {

GuardedMemory::GuardedMemory(int64_t bytes) {
  if (bytes == 0) return;
  const int64_t page = sysconf(_SC_PAGESIZE);
  const int64_t used = (bytes + page - 1) / page * page;
  mapped_ = used + 2 * page;
  void* mapping = mmap(nullptr, static_cast<size_t>(mapped_), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<char*>(mapping);
  if (mprotect(mapping_ + page, static_cast<size_t>(used), PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  start_ = mapping_ + page + used - bytes;
  // The rest of the first page cannot be protected. Memory is poisoned in steps of 8 bytes, up to the start.
  __asan_poison_memory_region(mapping_ + page, static_cast<size_t>((start_ - mapping_ - page) / 8 * 8));
}

GuardedMemory::~GuardedMemory() {
  if (mapping_ == nullptr) return;
  __asan_unpoison_memory_region(mapping_, static_cast<size_t>(mapped_));
  munmap(mapping_, static_cast<size_t>(mapped_));
}

int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

const char* name_of(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : dtype == DType::kFloat16 ? "float16" : "bfloat16";
}

HeadsTensor::HeadsTensor(int64_t batch, int64_t heads, int64_t rows, int64_t width, DType dtype, Layout layout,
                         Contents contents, std::mt19937& random, float deviation)
    : size_{batch, heads, rows, width}, dtype_(dtype) {
  const int64_t gap = layout == Layout::kGaps ? 5 : 0;
  if (layout == Layout::kRowsBeforeHeads) {
    view_.head_stride = width;
    view_.row_stride = heads * width;
    view_.batch_stride = rows * heads * width;
  } else {
    view_.row_stride = width + gap;
    view_.head_stride = rows * view_.row_stride + gap;
    view_.batch_stride = heads * view_.head_stride;
  }
  const bool empty = batch == 0 || heads == 0 || rows == 0 || width == 0;
  elements_ = empty ? 0 : offset(batch - 1, heads - 1, rows - 1) + width;
  memory_ = std::make_unique<GuardedMemory>(elements_ * size_of(dtype));
  view_.data = memory_->get();
  for (int64_t index = 0; index < elements_; ++index) put(index, std::numeric_limits<float>::quiet_NaN());
  if (contents == Contents::kUnwritten) return;
  std::normal_distribution<float> normal(0.0f, deviation);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t column = 0; column < width; ++column) put(offset(b, h, row) + column, normal(random));
}

int64_t HeadsTensor::offset(int64_t batch, int64_t head, int64_t row) const {
  return batch * view_.batch_stride + head * view_.head_stride + row * view_.row_stride;
}

float HeadsTensor::at(int64_t offset) const {
  if (dtype_ == DType::kFloat32) return reinterpret_cast<const float*>(memory_->get())[offset];
  const uint16_t bits = reinterpret_cast<const uint16_t*>(memory_->get())[offset];
  return dtype_ == DType::kFloat16 ? core::float16_to_float(bits) : core::bfloat16_to_float(bits);
}

void HeadsTensor::put(int64_t offset, float value) {
  if (dtype_ == DType::kFloat32)
    reinterpret_cast<float*>(memory_->get())[offset] = value;
  else
    reinterpret_cast<uint16_t*>(memory_->get())[offset] =
        dtype_ == DType::kFloat16 ? core::float_to_float16(value) : core::float_to_bfloat16(value);
}

void HeadsTensor::set(int64_t batch, int64_t head, int64_t row, int64_t column, float value) {
  put(offset(batch, head, row) + column, value);
}

void HeadsTensor::check(const char* name, bool finite) const {
  std::vector<bool> inside(static_cast<size_t>(elements_), false);
  for (int64_t b = 0; b < size_[0]; ++b)
    for (int64_t h = 0; h < size_[1]; ++h)
      for (int64_t row = 0; row < size_[2]; ++row)
        for (int64_t column = 0; column < size_[3]; ++column) {
          const int64_t place = offset(b, h, row) + column;
          inside[static_cast<size_t>(place)] = true;
          if (finite && !std::isfinite(at(place)))
            throw std::runtime_error(std::string(name) + ": not finite at (" + std::to_string(b) + ", " +
                                     std::to_string(h) + ", " + std::to_string(row) + ", " + std::to_string(column) +
                                     ")");
        }
  for (int64_t place = 0; place < elements_; ++place)
    if (!inside[static_cast<size_t>(place)] && !std::isnan(at(place)))
      throw std::runtime_error(std::string(name) + ": written between its rows, at element " + std::to_string(place));
}

}  // namespace sightline::sanitize
