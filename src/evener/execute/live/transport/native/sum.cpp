#include "sum.hpp"

#include <algorithm>
#include <cstring>

// The widest registers of the machine it runs on, chosen by the loader. Additions alone: same bits everywhere.
#if defined(__x86_64__) && defined(__GLIBC__)
#define EVENER_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EVENER_CLONES
#endif

namespace evener {

namespace {

constexpr size_t kBlock = 1024;  // elements: partial sums stay in the first-level cache

EVENER_CLONES void add_f32(float* out, const float* a, const float* b, size_t n) {
#pragma GCC ivdep
  for (size_t i = 0; i < n; ++i) out[i] = a[i] + b[i];
}

EVENER_CLONES void widen(float* out, const uint16_t* a, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    uint32_t bits = uint32_t(a[i]) << 16;
    std::memcpy(out + i, &bits, 4);
  }
}

EVENER_CLONES void widen_add(float* out, const uint16_t* a, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    uint32_t bits = uint32_t(a[i]) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    out[i] += x;
  }
}

EVENER_CLONES void narrow(uint16_t* out, const float* a, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, a + i, 4);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    uint32_t quiet_nan = (bits >> 16) | 0x40;
    out[i] = uint16_t((bits & 0x7FFFFFFF) > 0x7F800000 ? quiet_nan : rounded);
  }
}

void sum_f32(float* out, const char* const* parts, int ranks, size_t count) {
  auto part = [&](int r) { return reinterpret_cast<const float*>(parts[r]); };
  if (ranks == 2) return add_f32(out, part(0), part(1), count);
  alignas(64) float acc[kBlock];
  for (size_t at = 0; at < count; at += kBlock) {
    size_t n = std::min(kBlock, count - at);
    add_f32(acc, part(0) + at, part(1) + at, n);
    for (int r = 2; r < ranks - 1; ++r) add_f32(acc, acc, part(r) + at, n);
    add_f32(out + at, acc, part(ranks - 1) + at, n);
  }
}

void sum_bf16(uint16_t* out, const char* const* parts, int ranks, size_t count) {
  auto part = [&](int r) { return reinterpret_cast<const uint16_t*>(parts[r]); };
  alignas(64) float acc[kBlock];
  for (size_t at = 0; at < count; at += kBlock) {
    size_t n = std::min(kBlock, count - at);
    widen(acc, part(0) + at, n);
    for (int r = 1; r < ranks; ++r) widen_add(acc, part(r) + at, n);
    narrow(out + at, acc, n);
  }
}

}  // namespace

void sum(Dtype dtype, char* out, const char* const* parts, int ranks, size_t count) {
  if (dtype == Dtype::f32)
    sum_f32(reinterpret_cast<float*>(out), parts, ranks, count);
  else
    sum_bf16(reinterpret_cast<uint16_t*>(out), parts, ranks, count);
}

}  // namespace evener
