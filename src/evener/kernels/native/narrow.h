// Loads and stores of narrow types as vectors of fp32: bf16, and int8 beside a scale of its own.
#pragma once

namespace {

struct bf16 {
  uint16_t bits;
};

EVENER_INLINE vf load(const bf16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  typedef uint16_t Half __attribute__((vector_size(W * 2)));
  Half v;
  __builtin_memcpy(&v, p, sizeof v);
  return (vf)(__builtin_convertvector(v, vu) << 16);
#endif
}

EVENER_INLINE vf load(const int8_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  typedef int8_t Quarter __attribute__((vector_size(W)));
  Quarter v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, vf);
#endif
}

// The nearest bf16, the even one of two; NaN stays NaN.
EVENER_INLINE bf16 to_bf16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if (x != x) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

EVENER_INLINE vi rounded(vf x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  return (vi)(x + magic) - (vi)set1(magic);
}

// What n values become integers of [-levels, levels] with: the largest magnitude over `levels`; NaN where a value is
// not finite.
EVENER_INLINE float scale_of(const float* x, int64_t n, int levels) {
  vf most{}, finite{};
  for (int64_t i = 0; i < n; i += W) {
    vf v = n - i >= W ? load(x + i) : load_part(x + i, n - i, 0.0f);
    most = vmax(most, v < 0.0f ? -v : v);
    finite += v * 0.0f;
  }
  return hmax(most) / float(levels) + hsum(finite);
}

// 1 / scale, or 0 where that is not finite: values so small are 0.
EVENER_INLINE float inverse_of(float scale) {
  float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  return inverse <= 3e38f ? inverse : 0.0f;
}

}  // namespace
