// A vector of EVENER_WIDTH floats, on GCC/Clang vector extensions, and the elementary functions on it.
// Every operation is lane-wise and the same in every lane, so a value does not depend on where it stands.
#pragma once
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define EVENER_INLINE static inline __attribute__((always_inline))
// For large bodies: inlined into one function, register allocation takes minutes.
#define EVENER_OUTLINE static __attribute__((noinline))
#define EVENER_INLINED __attribute__((always_inline))
#define EVENER_UNROLL _Pragma("GCC unroll 32")

namespace {

constexpr int W = EVENER_WIDTH;
typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));

EVENER_INLINE vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

EVENER_INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }

// The first n lanes from p, the others `fill`; reads nothing past p + n.
EVENER_INLINE vf load_part(const float* p, int64_t n, float fill) {
  float lanes[W];
  for (int i = 0; i < W; ++i) lanes[i] = i < n ? p[i] : fill;
  return load(lanes);
}

EVENER_INLINE void store_part(float* p, int64_t n, vf v) {
  float lanes[W];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

// x - 0 is x for every x, -0 included; compilers turn it into a broadcast.
EVENER_INLINE vf set1(float x) { return x - vf{}; }
EVENER_INLINE vi set1i(int32_t x) { return x - vi{}; }
EVENER_INLINE vu set1u(uint32_t x) { return x - vu{}; }

EVENER_INLINE vi lane_index() {
  vi v;
  for (int i = 0; i < W; ++i) v[i] = i;
  return v;
}

// Where one operand is NaN, the second is returned (the rule of maxps).
EVENER_INLINE vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

EVENER_INLINE bool any(vi mask) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)mask) != 0;
#else
  int32_t m = 0;
  for (int i = 0; i < W; ++i) m |= mask[i];
  return m != 0;
#endif
}

typedef float quad __attribute__((vector_size(16)));

// Sums and maxima over the lanes in one fixed order.
EVENER_INLINE float hsum(vf v) {
#if defined(__AVX512F__)
  quad a = (quad)_mm512_castps512_ps128((__m512)v), b = (quad)_mm512_extractf32x4_ps((__m512)v, 1),
       c = (quad)_mm512_extractf32x4_ps((__m512)v, 2), d = (quad)_mm512_extractf32x4_ps((__m512)v, 3);
  quad t = (a + b) + (c + d);
  return (t[0] + t[2]) + (t[1] + t[3]);
#else
  quad q[W / 4];
  __builtin_memcpy(q, &v, sizeof v);
  quad s = q[0];
  for (int i = 1; i < W / 4; ++i) s += q[i];
  return (s[0] + s[2]) + (s[1] + s[3]);
#endif
}

EVENER_INLINE float hmax(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  quad q[W / 4];
  __builtin_memcpy(q, &v, sizeof v);
  quad s = q[0];
  for (int i = 1; i < W / 4; ++i) s = s > q[i] ? s : q[i];
  float a = s[0] > s[2] ? s[0] : s[2], b = s[1] > s[3] ? s[1] : s[3];
  return a > b ? a : b;
#endif
}

// 2^x for x <= 127, 0 below -126, NaN for NaN. Relative error under 2e-7: x = n + f with |f| <= 1/2, 2^f by a
// near-minimax polynomial (Lawson's algorithm) with constant term 1, n added to the exponent.
EVENER_INLINE vf exp2_vec(vf x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  vf shifted = x + magic;
  vf f = x - (shifted - magic);
  vf p = set1(0.0001535336f);
  p = p * f + 0.0013398875f;
  p = p * f + 0.009618437f;
  p = p * f + 0.055503324f;
  p = p * f + 0.24022648f;
  p = p * f + 0.6931472f;
  p = p * f + 1.0f;
  vf r = (vf)((vi)p + ((vi)shifted << 23));
  return x < -126.0f ? vf{} : r;
}

// e^x for x <= 88, 0 below -87.3. The multiple of ln 2 is taken off in two parts, so that large |x| stay accurate.
EVENER_INLINE vf exp_vec(vf x) {
  const float magic = 12582912.0f, log2e = 1.44269504f;
  const float ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;  // their sum is ln 2; n * ln2_hi is exact
  vf shifted = x * log2e + magic;
  vf n = shifted - magic;
  vf f = (x - n * ln2_hi - n * ln2_lo) * log2e;
  vf p = set1(0.0001535336f);
  p = p * f + 0.0013398875f;
  p = p * f + 0.009618437f;
  p = p * f + 0.055503324f;
  p = p * f + 0.24022648f;
  p = p * f + 0.6931472f;
  p = p * f + 1.0f;
  vf r = (vf)((vi)p + ((vi)shifted << 23));
  return x < -87.3f ? vf{} : r;
}

// Natural logarithm of normal positive x. Relative error under 3e-7 (absolute near 1): x = 2^e (1 + f) with
// 1 + f in [sqrt(1/2), sqrt(2)), log(1 + f) = f - f^2/2 + f^3 P(f), P near-minimax.
EVENER_INLINE vf log_vec(vf x) {
  vi bits = (vi)x - 0x3f3504f3;  // bits of sqrt(1/2)
  vi e = bits >> 23;
  vf f = (vf)((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
  vf n = __builtin_convertvector(e, vf);
  vf p = set1(-0.0763443f);
  p = p * f + 0.1276155f;
  p = p * f - 0.13160194f;
  p = p * f + 0.14201762f;
  p = p * f - 0.16623357f;
  p = p * f + 0.20001227f;
  p = p * f - 0.25000823f;
  p = p * f + 0.3333333f;
  vf f2 = f * f;
  vf small = n * -2.12194440e-4f + (p * f * f2 - 0.5f * f2);
  return n * 0.693359375f + (f + small);
}

}  // namespace
