// Matrix products by the processor's tile registers (AMX): as gemm8.h and gemm16.h, on the same packed weights, whose
// panels are tiles of NV times 16 columns already. A tile has up to 16 rows of 64 bytes.
//
// int8: a tile product sums exactly one group, and what follows in fp32 is what gemm8_tile does, in its order: the same
// bits, so that few rows are left to it. bf16: a tile product adds the even and the odd inputs of 32 before it adds them to
// the sum, which is not the order of gemm16_tile; all rows go through tiles here, and a row's result depends on the row alone.
#pragma once

namespace {

using namespace evener;

static_assert(W == 16 && NV == 2 && GROUP == 64, "tiles are 16 rows of 64 bytes, a panel two of them wide");

constexpr int TILE = 16;  // rows, and columns of 32 bits

// The layout that ldtilecfg reads (Intel SDM, volume 1, chapter 18).
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t height) { bytes[tile] = 64, rows[tile] = uint8_t(height); }
  void load() const { asm volatile("ldtilecfg %0" ::"m"(*this)); }
};

// GCC's own intrinsics do not tell the compiler that a tile load reads memory.
template <int T>
EVENER_INLINE void tile_load(const void* at, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(at), "r"(stride), "i"(T) : "memory");
}
template <int T>
EVENER_INLINE void tile_store(void* at, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(at), "r"(stride), "i"(T) : "memory");
}
template <int T>
EVENER_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int SUM, int X, int WEIGHT>
EVENER_INLINE void tile_dot8() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(X), "i"(WEIGHT));
}
template <int SUM, int X, int WEIGHT>
EVENER_INLINE void tile_dot16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(X), "i"(WEIGHT));
}
// Tiles in use are saved with the thread's state: given back after every product.
EVENER_INLINE void tile_release() { asm volatile("tilerelease"); }

// What up to TILE rows get from 16 columns of a panel.
struct Amx8 {
  const uint8_t* x;       // of the first row, as are the next two
  const float* x_scale;
  const int32_t* x_zero;
  int64_t m;
  const int8_t* panel;
  int64_t groups, rows;
  float* out;
  int64_t out_stride;
  const float* bias;
  int64_t columns;
  int fetch, fetch_end;  // lines of every cell of the next panel to fetch meanwhile
};

// Vector v of the panel's columns. The first of four tiles is FIRST: two of sums, then x and the weight. A tile product
// runs while the sums of the group before it are scaled.
template <int FIRST, bool WHOLE>
EVENER_OUTLINE void amx8_tile(const Amx8& a, int v) {
  alignas(64) int32_t dots[2][TILE * W];
  vf sum[TILE] = {};
  auto multiply = [&](int64_t g, auto parity) EVENER_INLINED {
    constexpr int SUM = FIRST + decltype(parity)::value;
    const int8_t* cell = a.panel + g * CELL;
    tile_zero<SUM>();
    tile_load<FIRST + 2>(a.x + g * GROUP, a.groups * GROUP);
    tile_load<FIRST + 3>(cell + v * W * STEP, NR * STEP);
    tile_dot8<SUM, FIRST + 2, FIRST + 3>();
    tile_store<SUM>(dots[decltype(parity)::value], W * 4);
    // Beyond the end is harmless.
    for (int64_t i = a.fetch; i < a.fetch_end; ++i) __builtin_prefetch(cell + a.groups * CELL + i * LINE, 0, 2);
  };
  auto scale = [&](int64_t g, const int32_t* dot) EVENER_INLINED {
    vi word = load_ints(a.panel + g * CELL + CELL_WEIGHTS + v * W * 4);
    vi sums = word & 0xffff;
    vf scale = scales_in(word);
    const float* of_x = a.x_scale + g * a.m;
    const int32_t* zero = a.x_zero + g * a.m;
    EVENER_UNROLL for (int r = 0; r < TILE; ++r) {  // rows that are not there cost nothing but time
      vi d = load_ints(reinterpret_cast<const int8_t*>(dot + r * W));
      d = (vi)_mm512_dpwssd_epi32((__m512i)d, (__m512i)sums, (__m512i)set1i(zero[r]));  // as less_zero
      sum[r] += __builtin_convertvector(d, vf) * scale * of_x[r];
    }
  };
  multiply(0, Rows<0>());
  for (int64_t g = 0; g < a.groups; g += 2) {
    if (g + 1 < a.groups) multiply(g + 1, Rows<1>());
    scale(g, dots[0]);
    if (g + 1 == a.groups) break;
    if (g + 2 < a.groups) multiply(g + 2, Rows<0>());
    scale(g + 1, dots[1]);
  }
  const int64_t columns = a.columns - v * W;
  const float* bias = a.bias ? a.bias + v * W : nullptr;
  vf add = bias ? (columns >= W ? load(bias) : load_part(bias, columns, 0.0f)) : vf{};
  EVENER_UNROLL for (int r = 0; r < TILE; ++r) {
    if (!WHOLE && r >= a.rows) continue;
    vf total = bias ? sum[r] + add : sum[r];
    float* to = a.out + r * a.out_stride + v * W;
    if (columns >= W)
      store(to, total);
    else
      store_part(to, columns, total);
  }
}

constexpr int64_t FEW_ROWS = 11;  // fewer are done sooner by gemm8_tile

void amx8_panels(const Gemm8Args& a, int64_t panel, int64_t end) {
  const int64_t rest = a.m % TILE;
  if (a.m < FEW_ROWS) return gemm8_panels(a, panel, end);
  TileConfig config;
  for (int t = 0; t < 4; ++t) {
    config.set(t, TILE);
    config.set(4 + t, t == 3 || !rest ? TILE : rest);
  }
  config.load();
  const int64_t groups = (a.k + GROUP - 1) / GROUP;
  const int passes = int((a.m - (rest < FEW_ROWS ? rest : 0) + TILE - 1) / TILE) * NV;
  constexpr int LINES = CELL / LINE;
  for (int64_t p = panel; p < end; ++p) {
    Amx8 b{static_cast<const uint8_t*>(a.x), a.x_scale, a.x_zero, a.m, a.packed + p * groups * CELL, groups, TILE,
           a.out + p * NR, a.out_stride, a.bias ? a.bias + p * NR : nullptr, a.n - p * NR < NR ? a.n - p * NR : NR, 0, 0};
    int pass = 0;
    for (int64_t row = 0; row < a.m; row += TILE) {
      b.rows = a.m - row < TILE ? a.m - row : TILE;
      if (b.rows < FEW_ROWS)
        by_rows<MR>(b.rows, 0, [&](auto few, int64_t at) EVENER_INLINED {
          gemm8_tile<decltype(few)::value>(b.x + at * groups * GROUP, b.x_scale + at, b.x_zero + at, a.m, b.panel, groups,
                                           b.out + at * a.out_stride, a.out_stride, b.bias, b.columns, false);
        });
      else
        for (int v = 0; v < NV && v * W < b.columns; ++v, ++pass) {
          b.fetch = LINES * pass / passes, b.fetch_end = LINES * (pass + 1) / passes;
          (b.rows == TILE ? amx8_tile<0, true> : amx8_tile<4, false>)(b, v);
        }
      b.x += TILE * groups * GROUP, b.x_scale += TILE, b.x_zero += TILE, b.out += TILE * a.out_stride;
    }
  }
  tile_release();
}

// Up to two tiles of rows times a panel: sums in tiles 0 to 3, x in 4 and 5, the weight in 6 and 7.
template <bool TWO>
EVENER_INLINE void amx16_step(const uint32_t* x, int64_t second, int64_t x_stride, const uint32_t* weight) {
  tile_load<4>(x, x_stride * 4);
  tile_load<6>(weight, NR * 4);
  tile_load<7>(weight + W, NR * 4);
  if (TWO) tile_load<5>(x + second, x_stride * 4);
  tile_dot16<0, 4, 6>();
  tile_dot16<1, 4, 7>();
  if (TWO) {
    tile_dot16<2, 5, 6>();
    tile_dot16<3, 5, 7>();
  }
}

// `tail`: the panel's last pairs as whole 16, filled up with zeros, or nullptr. Of every step lines [fetch, fetch_end) of
// what lies `ahead` are fetched meanwhile; beyond the end is harmless.
template <bool TWO>
EVENER_OUTLINE void amx16_block(const uint32_t* x, int64_t x_stride, const uint32_t* panel, int64_t pairs, const uint32_t* tail,
                               int64_t half, int64_t rows, float* out, int64_t out_stride, const float* bias, int64_t columns,
                               int64_t ahead, int fetch, int fetch_end) {
  tile_zero<0>(), tile_zero<1>();
  if (TWO) tile_zero<2>(), tile_zero<3>();
  const int64_t second = half * x_stride;
  int64_t p = 0;
  for (; p + TILE <= pairs; p += TILE) {
    for (int i = fetch; i < fetch_end; ++i) __builtin_prefetch(panel + p * NR + ahead + i * (LINE / 4), 0, 2);
    amx16_step<TWO>(x + p, second, x_stride, panel + p * NR);
  }
  if (tail) amx16_step<TWO>(x + p, second, x_stride, tail);
  alignas(64) float sums[2 * TILE * NR];
  const bool direct = !bias && columns == NR;
  float* to = direct ? out : sums;
  const int64_t stride = direct ? out_stride : NR;
  tile_store<0>(to, stride * 4), tile_store<1>(to + W, stride * 4);
  if (TWO) tile_store<2>(to + half * stride, stride * 4), tile_store<3>(to + half * stride + W, stride * 4);
  if (direct) return;
  for (int64_t r = 0; r < rows; ++r)
    for (int v = 0; v < NV; ++v) {
      int64_t left = columns - v * W;
      if (left <= 0) continue;
      vf total = load(sums + r * NR + v * W);
      if (bias) total += left >= W ? load(bias + v * W) : load_part(bias + v * W, left, 0.0f);
      if (left >= W)
        store(out + r * out_stride + v * W, total);
      else
        store_part(out + r * out_stride + v * W, left, total);
    }
}

void amx16_panels(const Gemm16Args& a, int64_t panel, int64_t end) {
  const int64_t pairs = (a.k + 1) / 2, stride = pairs_stride(a.k), rest = pairs % TILE;
  // Blocks of at most two tiles of rows: `most` of them in all but the last.
  const int64_t blocks = (a.m + 2 * TILE - 1) / (2 * TILE), most = a.m < 2 * TILE ? a.m : 2 * TILE;
  alignas(64) uint32_t tail[TILE * NR] = {};
  constexpr int64_t LINES = TILE * NR * 4 / LINE;  // of a step
  int64_t configured = 0;
  for (int64_t p = panel; p < end; ++p) {
    const uint32_t* weight = static_cast<const uint32_t*>(a.packed) + p * pairs * NR;
    if (rest) __builtin_memcpy(tail, weight + (pairs - rest) * NR, rest * NR * 4);
    const float* bias = a.bias ? a.bias + p * NR : nullptr;
    const int64_t columns = a.n - p * NR < NR ? a.n - p * NR : NR;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t row = b * most, rows = a.m - row < most ? a.m - row : most;
      const bool two = rows > TILE;
      const int64_t half = two ? (rows + 1) / 2 : rows;
      if (rows != configured) {
        TileConfig config;
        for (int t = 0; t < 8; ++t) config.set(t, TILE);
        config.set(0, half), config.set(1, half), config.set(4, half);
        if (two) config.set(2, rows - half), config.set(3, rows - half), config.set(5, rows - half);
        config.load();
        configured = rows;
      }
      (two ? amx16_block<true> : amx16_block<false>)(a.x + row * stride, stride, weight, pairs, rest ? tail : nullptr, half,
                                                     rows, a.out + row * a.out_stride + p * NR, a.out_stride, bias, columns,
                                                     blocks == 1 ? AHEAD16 : pairs * NR, int(LINES * b / blocks), int(LINES * (b + 1) / blocks));
    }
  }
  tile_release();
}

}  // namespace
