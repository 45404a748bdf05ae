// Scratch memory on cache lines that grows and is kept.
#pragma once
#include <cstdint>
#include <new>

namespace evener {

class Aligned {
 public:
  Aligned() = default;
  Aligned(const Aligned&) = delete;
  ~Aligned() { release(); }

  // Room for n floats, contents undefined; valid until the next call.
  float* at_least(int64_t n) {
    if (n > size_) {
      release();
      data_ = static_cast<float*>(::operator new(n * sizeof(float), LINE));
      size_ = n;
    }
    return data_;
  }

 private:
  static constexpr std::align_val_t LINE{64};

  void release() {
    ::operator delete(data_, LINE);
    data_ = nullptr, size_ = 0;
  }

  float* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace evener
