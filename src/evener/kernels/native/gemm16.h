// Matrix product of bf16 with bf16 by vdpbf16ps, two products per lane: out[M, N] = x[M, K] * weight[N, K]^T + bias, summed
// in fp32. Inputs are rounded to bf16 before, row by row. The weight is packed into panels of NR columns, [ceil(K / 2)][NR][2],
// an odd K padded with 0. As in gemm.h each sum runs over K in order, whatever the tile.
#pragma once

namespace {

using namespace evener;

constexpr int64_t KC16 = 640;     // pairs per pass
constexpr int64_t AHEAD16 = 1024;  // pairs from what is read to what is fetched: 4 KiB

void narrow_rows(const NarrowArgs& a, int64_t row, int64_t end) {
  const int64_t stride = pairs_stride(a.k);
  for (; row < end; ++row) {
    const float* x = a.x + row * a.x_stride;
    uint16_t* to = reinterpret_cast<uint16_t*>(a.out + row * stride);
    int64_t k = 0;
    for (; k + W <= a.k; k += W)
      _mm256_storeu_si256((__m256i*)(to + k), (__m256i)_mm512_cvtneps_pbh((__m512)load(x + k)));
    if (k < a.k) {
      _mm256_storeu_si256((__m256i*)(to + k), (__m256i)_mm512_cvtneps_pbh((__m512)load_part(x + k, a.k - k, 0.0f)));
      k += W;
    }
    if (k < 2 * stride) _mm256_storeu_si256((__m256i*)(to + k), __m256i{});
  }
}

template <int ROWS>
EVENER_OUTLINE void gemm16_tile(const uint32_t* x, int64_t x_stride, const uint32_t* panel, int64_t pairs, float* out,
                               int64_t out_stride, const float* bias, bool first, int64_t columns, bool cold) {
  vf sum[ROWS][NV];
  begin_sums<ROWS>(sum, first ? bias : nullptr, first ? nullptr : out, out_stride, columns);
  for (int64_t p = 0; p < pairs; ++p) {
    __m512bh line[NV];
    EVENER_UNROLL for (int v = 0; v < NV; ++v) {
      __builtin_memcpy(&line[v], panel + p * NR + v * W, sizeof line[v]);
      // On into the next panel; beyond the end is harmless.
      if (cold) __builtin_prefetch(panel + p * NR + v * W + AHEAD16, 0, 3);
    }
    EVENER_UNROLL for (int r = 0; r < ROWS; ++r) {
      __m512bh a = (__m512bh)set1i(int32_t(x[r * x_stride + p]));
      EVENER_UNROLL for (int v = 0; v < NV; ++v) sum[r][v] = (vf)_mm512_dpbf16_ps((__m512)sum[r][v], a, line[v]);
    }
  }
  store_sums<ROWS>(sum, out, out_stride, columns);
}

void gemm16_panels(const Gemm16Args& a, int64_t panel, int64_t end) {
  const Tiles tiles(a.m);
  const int64_t pairs = (a.k + 1) / 2, stride = pairs_stride(a.k), blocks = (pairs + KC16 - 1) / KC16;
  for (int64_t p = panel; p < end; ++p) {
    const float* bias = a.bias ? a.bias + p * NR : nullptr;
    int64_t columns = a.n - p * NR < NR ? a.n - p * NR : NR;
    for (int64_t b = 0; b < blocks; ++b) {
      int64_t first = pairs * b / blocks, count = pairs * (b + 1) / blocks - first;
      const uint32_t* weight = static_cast<const uint32_t*>(a.packed) + (p * pairs + first) * NR;
      for (int64_t t = 0; t < tiles.count; ++t) {
        int64_t row = tiles.row_of(t);
        by_rows<MR>(tiles.row_of(t + 1) - row, row, [&](auto rows, int64_t at) EVENER_INLINED {
          gemm16_tile<decltype(rows)::value>(a.x + at * stride + first, stride, weight, count, a.out + at * a.out_stride + p * NR,
                                             a.out_stride, bias, b == 0, columns, at == 0);
        });
      }
    }
  }
}

}  // namespace
