// Matrix product with int8 weights: out[M, N] = x[M, K] * weight[N, K]^T + bias, with a scale per group of GROUP inputs
// on both sides. Exact integer sums inside a group, fp32 across groups in order, whatever the tile: a row's result does
// not depend on the rows beside it.
//
// The weight is packed into panels of NR columns, a panel into cells of one group each: [GROUP / STEP][NR][STEP] int8,
// then NR scales, so that it is read once and in order. Inputs are quantised row by row before: to 16 bits where two
// products are added per lane (pmaddwd), which costs nothing there and leaves only the weights' error; to 8 bits where
// four are (vpdpbusd: unsigned times signed, so inputs are stored with 128 added, and a cell ends with what that adds).
#pragma once

namespace {

using namespace evener;

#if defined(EVENER_DOT4)
typedef uint8_t Input;
constexpr int STEP = 4;  // inputs per lane
constexpr int LEVELS = 127, ZERO = 128;
#else
typedef int16_t Input;
constexpr int STEP = 2;
constexpr int LEVELS = 32767, ZERO = 0;  // 64 products of 32767 * 127 stay below 2^31
#endif
static_assert(sizeof(Input) * STEP == 4, "a step of inputs is one lane");

constexpr int64_t CELL_WEIGHTS = NR * GROUP;
constexpr int64_t CELL = CELL_WEIGHTS + NR * 4 + (ZERO ? NR * 4 : 0);  // bytes

#if defined(EVENER_DOT4)
typedef vi Weights;

EVENER_INLINE Weights load_weights(const int8_t* p) {
  Weights v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

EVENER_INLINE vi dot(vi sum, vi x, Weights w) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
#else
  uint8_t a[W * 4];
  int8_t b[W * 4];
  __builtin_memcpy(a, &x, sizeof a);
  __builtin_memcpy(b, &w, sizeof b);
  for (int i = 0; i < W * 4; ++i) sum[i / 4] += int32_t(a[i]) * int32_t(b[i]);
  return sum;
#endif
}
#else
typedef int16_t Weights __attribute__((vector_size(W * 4)));

EVENER_INLINE Weights load_weights(const int8_t* p) {
#if defined(__AVX512BW__)
  return (Weights)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (Weights)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
#else
  typedef int8_t Half __attribute__((vector_size(W * 2)));
  Half v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Weights);
#endif
}

EVENER_INLINE vi dot(vi sum, vi x, Weights w) {
#if defined(__AVX512BW__)
  return sum + (vi)_mm512_madd_epi16((__m512i)x, (__m512i)w);
#elif defined(__AVX2__)
  return sum + (vi)_mm256_madd_epi16((__m256i)x, (__m256i)w);
#elif defined(__SSE2__)
  return sum + (vi)_mm_madd_epi16((__m128i)x, (__m128i)w);
#else
  Weights a = (Weights)x;
  for (int i = 0; i < W * 2; ++i) sum[i / 2] += int32_t(a[i]) * int32_t(w[i]);
  return sum;
#endif
}
#endif

// A step of inputs in every lane.
EVENER_INLINE vi spread(const Input* x) {
  int32_t bits;
  __builtin_memcpy(&bits, x, sizeof bits);
  return set1i(bits);
}

EVENER_INLINE vi load_ints(const int8_t* p) {
  vi v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

EVENER_INLINE vf load_floats(const int8_t* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

void quantize_rows(const QuantizeArgs& a, int64_t row, int64_t end) {
  int64_t groups = (a.k + GROUP - 1) / GROUP;
  typedef Input Inputs __attribute__((vector_size(W * sizeof(Input))));
  for (; row < end; ++row) {
    const float* x = a.x + row * a.x_stride;
    Input* to = static_cast<Input*>(a.out) + row * groups * GROUP;
    float* scales = a.scales + row * groups;
    for (int64_t g = 0; g < groups; ++g, x += GROUP, to += GROUP) {
      int64_t n = a.k - g * GROUP < GROUP ? a.k - g * GROUP : GROUP;
      float scale = scale_of(x, n, LEVELS), inverse = inverse_of(scale);
      scales[g] = scale;
      for (int64_t i = 0; i < GROUP; i += W) {
        vf v = n - i >= W ? load(x + i) : load_part(x + i, n - i, 0.0f);
        Inputs q = __builtin_convertvector(rounded(v * inverse) + ZERO, Inputs);
        __builtin_memcpy(to + i, &q, sizeof q);
      }
    }
  }
}

// Where weight (column c of a panel, input i of a group) is in its cell.
EVENER_INLINE int64_t in_cell(int64_t c, int64_t i) { return (i / STEP * NR + c) * STEP + i % STEP; }

void pack8_panels(const Pack8Args& a, int64_t panel, int64_t end) {
  int64_t groups = (a.k + GROUP - 1) / GROUP;
  for (; panel < end; ++panel)
    for (int64_t g = 0; g < groups; ++g) {
      int8_t* cell = a.packed + (panel * groups + g) * CELL;
      int64_t n = a.k - g * GROUP < GROUP ? a.k - g * GROUP : GROUP;
      for (int64_t c = 0; c < NR; ++c) {
        int64_t column = panel * NR + c;
        const float* w = a.weight + column * a.stride + g * GROUP;
        float scale = column < a.n ? scale_of(w, n, 127) : 0.0f, inverse = inverse_of(scale);
        int32_t sum = 0;
        for (int64_t i = 0; i < GROUP; i += W) {
          vf v{};
          if (inverse > 0.0f && i < n) v = n - i >= W ? load(w + i) : load_part(w + i, n - i, 0.0f);
          vi q = rounded(v * inverse);
          for (int j = 0; j < W; ++j) {
            cell[in_cell(c, i + j)] = int8_t(q[j]);
            sum += q[j];
          }
        }
        __builtin_memcpy(cell + CELL_WEIGHTS + c * 4, &scale, 4);
        if (ZERO) {
          int32_t less = -ZERO * sum;
          __builtin_memcpy(cell + CELL_WEIGHTS + (NR + c) * 4, &less, 4);
        }
      }
    }
}

void unpack8_rows(const int8_t* packed, const int64_t* index, int64_t rows, int64_t k, float* out) {
  int64_t groups = (k + GROUP - 1) / GROUP;
  for (int64_t r = 0; r < rows; ++r, out += k) {
    const int8_t* cell = packed + index[r] / NR * groups * CELL;
    int64_t c = index[r] % NR;
    for (int64_t g = 0; g < groups; ++g, cell += CELL) {
      float scale;
      __builtin_memcpy(&scale, cell + CELL_WEIGHTS + c * 4, 4);
      for (int64_t i = 0; i < GROUP && g * GROUP + i < k; ++i) out[g * GROUP + i] = float(cell[in_cell(c, i)]) * scale;
    }
  }
}

template <int ROWS>
EVENER_OUTLINE void gemm8_tile(const Input* x, const float* x_scale, const int8_t* panel, int64_t groups, float* out,
                              int64_t out_stride, const float* bias, int64_t columns, int64_t lines) {
  vf sum[ROWS][NV] = {};
  const int8_t* ahead = panel + groups * CELL;  // of the next panel; a prefetch beyond the end is harmless
  for (int64_t g = 0; g < groups; ++g) {
    const int8_t *cell = panel + g * CELL, *scales = cell + CELL_WEIGHTS;
    vi dots[ROWS][NV];
    EVENER_UNROLL for (int v = 0; v < NV; ++v) {
      vi first = ZERO ? load_ints(scales + (NR + v * W) * 4) : vi{};
      EVENER_UNROLL for (int r = 0; r < ROWS; ++r) dots[r][v] = first;
    }
    for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(ahead + i * 64, 0, 2);
    ahead += lines * 64;
    _Pragma("GCC unroll 2") for (int64_t i = 0; i < GROUP; i += STEP) {
      Weights w[NV];
      EVENER_UNROLL for (int v = 0; v < NV; ++v) w[v] = load_weights(cell + i * NR + v * W * STEP);
      EVENER_UNROLL for (int r = 0; r < ROWS; ++r) {
        vi a = spread(x + (r * groups + g) * GROUP + i);
        EVENER_UNROLL for (int v = 0; v < NV; ++v) dots[r][v] = dot(dots[r][v], a, w[v]);
      }
    }
    EVENER_UNROLL for (int v = 0; v < NV; ++v) {
      vf scale = load_floats(scales + v * W * 4);
      EVENER_UNROLL for (int r = 0; r < ROWS; ++r)
        sum[r][v] += __builtin_convertvector(dots[r][v], vf) * scale * x_scale[r * groups + g];
    }
  }
  EVENER_UNROLL for (int r = 0; r < ROWS; ++r) EVENER_UNROLL for (int v = 0; v < NV; ++v) {
    int64_t left = columns - v * W;
    if (left <= 0) continue;
    float* to = out + r * out_stride + v * W;
    if (left >= W)
      store(to, bias ? sum[r][v] + load(bias + v * W) : sum[r][v]);
    else
      store_part(to, left, bias ? sum[r][v] + load_part(bias + v * W, left, 0.0f) : sum[r][v]);
  }
}

void gemm8_panels(const Gemm8Args& a, int64_t panel, int64_t end) {
  const Tiles tiles(a.m);
  int64_t groups = (a.k + GROUP - 1) / GROUP;
  int64_t lines = ((CELL + 63) / 64 + tiles.count - 1) / tiles.count;  // of the next panel, divided among the tiles
  const Input* x = static_cast<const Input*>(a.x);
  for (int64_t p = panel; p < end; ++p) {
    const float* bias = a.bias ? a.bias + p * NR : nullptr;
    int64_t columns = a.n - p * NR < NR ? a.n - p * NR : NR;
    for (int64_t t = 0; t < tiles.count; ++t) {
      int64_t row = tiles.row_of(t);
      by_rows<MR>(tiles.row_of(t + 1) - row, row, [&](auto rows, int64_t at) EVENER_INLINED {
        gemm8_tile<decltype(rows)::value>(x + at * groups * GROUP, a.x_scale + at * groups, a.packed + p * groups * CELL,
                                          groups, a.out + at * a.out_stride + p * NR, a.out_stride, bias, columns, lines);
      });
    }
  }
}

const Int8Kernels int8_kernels = {CELL, sizeof(Input), quantize_rows, pack8_panels, unpack8_rows, gemm8_panels};

}  // namespace
