// Matrix product with int8 weights: out[M, N] = x[M, K] * weight[N, K]^T + bias, with a scale per group of inputs on both
// sides, of GROUP or a multiple of it. Exact integer sums inside a group, fp32 across groups in order, whatever the tile: a row's result does
// not depend on the rows beside it.
//
// The weight is packed into panels of NR columns, a panel into cells of one group each: [group / STEP][NR][STEP] int8,
// then a word for each column, so that it is read once and in order. Inputs are quantised row by row before: to 16 bits
// where two products are added per lane (pmaddwd), which costs nothing there and leaves only the weights' error; to 8
// bits where four are (vpdpbusd: unsigned times signed). Those 8 bits cover the group's own range, from its smallest to
// its largest input, with the integer that stands for 0 beside the scale: half the error of a range symmetric about 0
// where one input is much larger than the rest. What the zero adds to a sum is taken off again, exactly: a column's
// word then holds its scale in bf16 and the sum of its integers.
#pragma once

namespace {

using namespace evener;

#if defined(EVENER_DOT4)
typedef uint8_t Input;
constexpr int STEP = 4;  // inputs per lane
constexpr bool ZEROS = true;
#else
typedef int16_t Input;
constexpr int STEP = 2;
constexpr bool ZEROS = false;
#endif
static_assert(sizeof(Input) * STEP == 4, "a step of inputs is one lane");

constexpr int64_t cell_weights(int64_t group) { return NR * group; }
constexpr int64_t cell_bytes_of(int64_t group) { return cell_weights(group) + NR * 4; }
constexpr int64_t AHEAD8 = 8 * cell_bytes_of(GROUP);  // from what is read to what is fetched: what a few rows take for it is longer than memory does

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

// From the words of W columns: their scales, and what a zero of the inputs adds to their sums of products, negated.
EVENER_INLINE vf scales_in(vi word) { return (vf)(ZEROS ? word & -0x10000 : word); }

EVENER_INLINE vi less_zero(vi word, int32_t minus_zero) {
  if (!ZEROS) return vi{};
#if defined(__AVX512VNNI__)
  return (vi)_mm512_madd_epi16((__m512i)(word & 0xffff), (__m512i)set1i(minus_zero));
#else
  return (word << 16 >> 16) * (minus_zero << 16 >> 16);
#endif
}

// A column's word; `scale` becomes what is stored of it: rounded up in bf16, so that no weight exceeds 127 steps.
EVENER_INLINE int32_t word_of(float& scale, int32_t sum) {
  int32_t bits;
  __builtin_memcpy(&bits, &scale, 4);
  if (!ZEROS) return bits;
  if (scale == scale) bits += 0xffff;
  bits &= -0x10000;
  __builtin_memcpy(&scale, &bits, 4);
  return bits | (sum & 0xffff);  // |sum| <= MAX_GROUP * 127 < 2^15
}

// A group of inputs as integers: its scale, and the integer that stands for 0.
struct Range {
  float scale;
  int32_t zero;
};

// Vector i of n inputs; beyond them are zeros.
EVENER_INLINE vf inputs_at(const float* x, int64_t i, int64_t n) {
  return n - i >= W ? load(x + i) : n > i ? load_part(x + i, n - i, 0.0f) : vf{};
}

// Of n inputs.
EVENER_INLINE Range range_of(const float* x, int64_t n) {
  vf most{}, least{}, finite{};  // most of x and of -x: the range always holds 0
  _Pragma("GCC unroll 4") for (int64_t i = 0; i < n; i += W) {
    vf v = inputs_at(x, i, n);
    most = vmax(most, v);
    least = vmax(least, -v);
    finite += v * 0.0f;
  }
  const bool lost = any(finite != 0.0f);
  if (!ZEROS) {  // MAX_GROUP products of 32767 * 127 stay below 2^31
    float scale = hmax(vmax(least, most)) / 32767.0f;
    return {lost ? __builtin_nanf("") : scale, 0};
  }
  float below = hmax(least);
  // 254 steps: both ends may be rounded outwards and still be within 0..255.
  float scale = lost ? __builtin_nanf("") : (hmax(most) + below) / 254.0f;
  return {scale, rounded(set1(below * inverse_of(scale)))[0]};
}

void quantize_rows(const QuantizeArgs& a, int64_t row, int64_t end) {
  const int64_t groups = (a.k + a.group - 1) / a.group;
  typedef Input Inputs __attribute__((vector_size(W * sizeof(Input))));
  for (; row < end; ++row) {
    const float* x = a.x + row * a.x_stride;
    Input* to = static_cast<Input*>(a.out) + row * groups * a.group;
    for (int64_t g = 0; g < groups; ++g, x += a.group, to += a.group) {
      const int64_t n = g + 1 < groups ? a.group : a.k - g * a.group;
      const Range range = range_of(x, n);
      const float inverse = inverse_of(range.scale);
      a.scales[g * a.m + row] = range.scale, a.zeros[g * a.m + row] = -range.zero & 0xffff;
      _Pragma("GCC unroll 4") for (int64_t i = 0; i < a.group; i += W) {
        Inputs q = __builtin_convertvector(rounded(inputs_at(x, i, n) * inverse) + range.zero, Inputs);
        __builtin_memcpy(to + i, &q, sizeof q);
      }
    }
  }
}

// Where weight (column c of a panel, input i of a group) is in its cell.
EVENER_INLINE int64_t in_cell(int64_t c, int64_t i) { return (i / STEP * NR + c) * STEP + i % STEP; }

void pack8_panels(const Pack8Args& a, int64_t panel, int64_t end) {
  const int64_t groups = (a.k + a.group - 1) / a.group;
  for (; panel < end; ++panel)
    for (int64_t g = 0; g < groups; ++g) {
      int8_t* cell = a.packed + (panel * groups + g) * cell_bytes_of(a.group);
      const int64_t n = g + 1 < groups ? a.group : a.k - g * a.group;
      for (int64_t c = 0; c < NR; ++c) {
        int64_t column = panel * NR + c;
        const float* w = a.weight + column * a.stride + g * a.group;
        float scale = column < a.n ? scale_of(w, n, 127) : 0.0f;
        word_of(scale, 0);
        float inverse = inverse_of(scale);
        int32_t sum = 0;
        for (int64_t i = 0; i < a.group; i += W) {
          vf v{};
          if (inverse > 0.0f && i < n) v = n - i >= W ? load(w + i) : load_part(w + i, n - i, 0.0f);
          vi q = rounded(v * inverse);
          for (int j = 0; j < W; ++j) {
            cell[in_cell(c, i + j)] = int8_t(q[j]);
            sum += q[j];
          }
        }
        int32_t word = word_of(scale, sum);
        __builtin_memcpy(cell + cell_weights(a.group) + c * 4, &word, 4);
      }
    }
}

void unpack8_rows(const int8_t* packed, const int64_t* index, int64_t rows, int64_t k, int64_t group, float* out) {
  const int64_t groups = (k + group - 1) / group;
  for (int64_t r = 0; r < rows; ++r, out += k) {
    const int8_t* cell = packed + index[r] / NR * groups * cell_bytes_of(group);
    int64_t c = index[r] % NR;
    for (int64_t g = 0; g < groups; ++g, cell += cell_bytes_of(group)) {
      int32_t word;
      __builtin_memcpy(&word, cell + cell_weights(group) + c * 4, 4);
      float scale = scales_in(set1i(word))[0];
      for (int64_t i = 0; i < group && g * group + i < k; ++i) out[g * group + i] = float(cell[in_cell(c, i)]) * scale;
    }
  }
}

// `x`, `x_scale` and `x_zero` begin at the tile's first row of m. `cold`: the panel is not in a cache yet.
template <int ROWS>
EVENER_OUTLINE void gemm8_tile(const Input* x, const float* x_scale, const int32_t* x_zero, int64_t m, const int8_t* panel,
                              int64_t group, int64_t groups, float* out, int64_t out_stride, const float* bias,
                              int64_t columns, bool cold) {
  vf sum[ROWS][NV] = {};
  const int8_t* cell = panel;
  for (int64_t g = 0; g < groups; ++g, cell += cell_bytes_of(group)) {
    const int8_t* words = cell + cell_weights(group);
    vi dots[ROWS][NV];
    EVENER_UNROLL for (int v = 0; v < NV; ++v) {
      vi word = load_ints(words + v * W * 4);
      EVENER_UNROLL for (int r = 0; r < ROWS; ++r) dots[r][v] = less_zero(word, x_zero[g * m + r]);
    }
    // On into the next panel: the processor's own prefetching stops at pages. Beyond the end is harmless.
    // A few lines at a time, as only so many can be on their way.
    if (cold)
      for (int64_t i = 0; i < NR * 4; i += LINE) __builtin_prefetch(words + AHEAD8 + i, 0, 2);
    _Pragma("GCC unroll 2") for (int64_t i = 0; i < group; i += STEP) {
      if (cold)
        for (int64_t j = 0; j < STEP * NR; j += LINE) __builtin_prefetch(cell + AHEAD8 + i * NR + j, 0, 2);
      Weights w[NV];
      EVENER_UNROLL for (int v = 0; v < NV; ++v) w[v] = load_weights(cell + i * NR + v * W * STEP);
      EVENER_UNROLL for (int r = 0; r < ROWS; ++r) {
        vi a = spread(x + (r * groups + g) * group + i);
        EVENER_UNROLL for (int v = 0; v < NV; ++v) dots[r][v] = dot(dots[r][v], a, w[v]);
      }
    }
    EVENER_UNROLL for (int v = 0; v < NV; ++v) {
      vf scale = scales_in(load_ints(words + v * W * 4));
      EVENER_UNROLL for (int r = 0; r < ROWS; ++r)
        sum[r][v] += __builtin_convertvector(dots[r][v], vf) * scale * x_scale[g * m + r];
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
  const int64_t groups = (a.k + a.group - 1) / a.group;
  const Input* x = static_cast<const Input*>(a.x);
  for (int64_t p = panel; p < end; ++p) {
    const float* bias = a.bias ? a.bias + p * NR : nullptr;
    int64_t columns = a.n - p * NR < NR ? a.n - p * NR : NR;
    for (int64_t t = 0; t < tiles.count; ++t) {
      int64_t row = tiles.row_of(t);
      by_rows<MR>(tiles.row_of(t + 1) - row, row, [&](auto rows, int64_t at) EVENER_INLINED {
        gemm8_tile<decltype(rows)::value>(x + at * groups * a.group, a.x_scale + at, a.x_zero + at, a.m,
                                          a.packed + p * groups * cell_bytes_of(a.group), a.group, groups,
                                          a.out + at * a.out_stride + p * NR, a.out_stride, bias, columns, at == 0);
      });
    }
  }
}

#if defined(EVENER_DOT4)
constexpr auto attention_int8 = attention8_tile;
#else
constexpr auto attention_int8 = attention_tile<int8_t>;
#endif

const Int8Kernels int8_kernels = {sizeof(Input), quantize_rows, pack8_panels, unpack8_rows, gemm8_panels, attention_int8};

}  // namespace
