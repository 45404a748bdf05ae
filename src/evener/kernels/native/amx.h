// Matrix products by the processor's tile registers (AMX): as gemm8.h and gemm16.h, on the same packed weights, whose
// panels are tiles of NV times 16 columns already. A tile has up to 16 rows of 64 bytes.
//
// int8: tile products sum exactly one group, GROUP inputs each, and what follows in fp32 is what gemm8_tile does, in its order: the same
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

// Rows times a panel of int8. Tile products take whole tiles: where rows are not there, whatever lies behind is multiplied
// as well, and left (QuantizeArgs::SLACK).
struct Amx8 {
  const uint8_t* x;       // of the first row, as are the next two
  const float* x_scale;
  const int32_t* x_zero;
  int64_t m;
  const int8_t* panel;
  int64_t group, groups, rows;
  float* out;
  int64_t out_stride;
  const float* bias;
  int64_t columns;
  int64_t fetch, fetch_end;  // lines of every cell of the next panel to fetch meanwhile

  EVENER_INLINED const int8_t* cell(int64_t g) const { return panel + g * cell_bytes_of(group); }
  EVENER_INLINED const uint8_t* inputs(int64_t g) const { return x + g * group; }
  EVENER_INLINED void fetch_after(int64_t g) const {  // beyond the end is harmless
    for (int64_t i = fetch; i < fetch_end; ++i) __builtin_prefetch(cell(g + groups) + i * LINE, 0, 2);
  }
};

// What the sums of a group's products add to the outputs of vector v, by rows.
struct Amx8Scales {
  vi sums;
  vf scale;
  const float* of_x;
  const int32_t* zero;

  EVENER_INLINED Amx8Scales(const Amx8& a, int64_t g, int v) {
    const vi word = load_ints(a.cell(g) + cell_weights(a.group) + v * W * 4);
    sums = word & 0xffff, scale = scales_in(word);
    of_x = a.x_scale + g * a.m, zero = a.x_zero + g * a.m;
  }
  EVENER_INLINED vf of(const int32_t* dots, int r) const {
    vi d = load_ints(reinterpret_cast<const int8_t*>(dots + r * W));
    d = (vi)_mm512_dpwssd_epi32((__m512i)d, (__m512i)sums, (__m512i)set1i(zero[r]));  // as less_zero
    return __builtin_convertvector(d, vf) * scale * of_x[r];
  }
};

// `sum` and the bias to vector v of the rows that are there.
EVENER_INLINE void amx8_store(const Amx8& a, int v, const vf (&sum)[TILE]) {
  const int64_t columns = a.columns - v * W;
  const float* bias = a.bias ? a.bias + v * W : nullptr;
  const vf add = bias ? (columns >= W ? load(bias) : load_part(bias, columns, 0.0f)) : vf{};
  EVENER_UNROLL for (int r = 0; r < TILE; ++r) {
    if (r >= a.rows) return;
    const vf total = bias ? sum[r] + add : sum[r];
    float* to = a.out + r * a.out_stride + v * W;
    if (columns >= W)
      store(to, total);
    else
      store_part(to, columns, total);
  }
}

// Up to TILE rows and vector v of the panel's columns: sums in tiles 0 and 1, x in 2, the weight in 3. The products of a
// group run while the sums of the group before it are scaled.
EVENER_OUTLINE void amx8_tile(const Amx8& a, int v) {
  alignas(64) int32_t dots[2][TILE * W];
  vf sum[TILE] = {};
  const int64_t stride = a.groups * a.group;
  auto multiply = [&](int64_t g, auto parity) EVENER_INLINED {
    constexpr int SUM = decltype(parity)::value;
    const uint8_t* x = a.inputs(g);
    const int8_t* weight = a.cell(g) + v * W * STEP;
    tile_zero<SUM>();
    for (int64_t i = 0; i < a.group; i += GROUP) {
      tile_load<2>(x + i, stride);
      tile_load<3>(weight + i * NR, NR * STEP);
      tile_dot8<SUM, 2, 3>();
    }
    tile_store<SUM>(dots[SUM], W * 4);
    a.fetch_after(g);
  };
  auto scale = [&](int64_t g, const int32_t* of) EVENER_INLINED {
    const Amx8Scales scales(a, g, v);
    EVENER_UNROLL for (int r = 0; r < TILE; ++r) sum[r] += scales.of(of, r);
  };
  multiply(0, Rows<0>());
  for (int64_t g = 0; g < a.groups; g += 2) {
    if (g + 1 < a.groups) multiply(g + 1, Rows<1>());
    scale(g, dots[0]);
    if (g + 1 == a.groups) break;
    if (g + 2 < a.groups) multiply(g + 2, Rows<0>());
    scale(g + 1, dots[1]);
  }
  amx8_store(a, v, sum);
}

constexpr int64_t FEW_ROWS = 7;  // fewer are done sooner by gemm8_tile

void amx8_panels(const Gemm8Args& a, int64_t panel, int64_t end) {
  if (a.m < FEW_ROWS) return gemm8_panels(a, panel, end);
  TileConfig config;
  for (int t = 0; t < 4; ++t) config.set(t, TILE);
  config.load();
  const int64_t groups = (a.k + a.group - 1) / a.group, bytes = cell_bytes_of(a.group), stride = groups * a.group;
  const int64_t passes = (a.m - (a.m % TILE < FEW_ROWS ? a.m % TILE : 0) + TILE - 1) / TILE * NV, lines = bytes / LINE;
  for (int64_t p = panel; p < end; ++p) {
    Amx8 b{static_cast<const uint8_t*>(a.x), a.x_scale, a.x_zero, a.m, a.packed + p * groups * bytes, a.group, groups, 0,
           a.out + p * NR, a.out_stride, a.bias ? a.bias + p * NR : nullptr, a.n - p * NR < NR ? a.n - p * NR : NR, 0, 0};
    for (int64_t row = 0; row < a.m; row += TILE) {
      b.rows = a.m - row < TILE ? a.m - row : TILE;
      if (b.rows < FEW_ROWS)
        by_rows<MR>(b.rows, 0, [&](auto few, int64_t at) EVENER_INLINED {
          gemm8_tile<decltype(few)::value>(b.x + at * stride, b.x_scale + at, b.x_zero + at, a.m, b.panel, a.group, groups,
                                           b.out + at * a.out_stride, a.out_stride, b.bias, b.columns, false);
        });
      else
        for (int v = 0; v < NV && v * W < b.columns; ++v) {
          const int64_t pass = row / TILE * NV + v;
          b.fetch = lines * pass / passes, b.fetch_end = lines * (pass + 1) / passes;
          amx8_tile(b, v);
        }
      b.x += TILE * stride, b.x_scale += TILE, b.x_zero += TILE, b.out += TILE * a.out_stride;
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
