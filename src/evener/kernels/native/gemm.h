// Matrix product with packed weights, fp32 or bf16: out[M, N] = x[M, K] * weight[N, K]^T + bias, summed in fp32.
//
// The weight is packed once into panels of NR columns, [N / NR][K][NR], so that a step of k reads one line of it. A
// micro-kernel keeps MR x NR sums in registers (Goto and van de Geijn, ACM TOMS 34, 2008; x is small enough here to need
// no packing). Each sum runs over k in order, whatever the tile: a row's result does not depend on the rows beside it.
#pragma once

namespace {

using namespace evener;

constexpr int NV = 2;                 // vectors per panel line
constexpr int NR = NV * W;            // columns of a panel
constexpr int MR = W == 16 ? 12 : 6;  // rows of a tile: as many sums as there are registers
constexpr int UNIT = MR > 6 ? 4 : 1;  // rows that tiles are cut on
constexpr int64_t KC = 640;           // inputs per pass: with them a panel's share stays in the L1 cache

constexpr int STEPS = 8;              // of k between prefetches
constexpr int LINE = 64;              // bytes of a cache line

// What to fetch while computing: a panel comes from memory while the one before it is used, so that neither waits.
struct Ahead {
  const char* at;
  int64_t lines;  // per STEPS
};

// The sums of a tile begin with what earlier inputs gave (`out`), with the bias, or (both nullptr) with 0.
template <int ROWS>
EVENER_INLINE void begin_sums(vf (&sum)[ROWS][NV], const float* bias, const float* out, int64_t out_stride,
                              int64_t columns) {
  EVENER_UNROLL for (int r = 0; r < ROWS; ++r) EVENER_UNROLL for (int v = 0; v < NV; ++v) {
    int64_t left = columns - v * W;
    const float* from = out ? out + r * out_stride : bias;
    if (!from || left <= 0)
      sum[r][v] = vf{};
    else
      sum[r][v] = left >= W ? load(from + v * W) : load_part(from + v * W, left, 0.0f);
  }
}

template <int ROWS>
EVENER_INLINE void store_sums(const vf (&sum)[ROWS][NV], float* out, int64_t out_stride, int64_t columns) {
  EVENER_UNROLL for (int r = 0; r < ROWS; ++r) EVENER_UNROLL for (int v = 0; v < NV; ++v) {
    int64_t left = columns - v * W;
    if (left >= W)
      store(out + r * out_stride + v * W, sum[r][v]);
    else if (left > 0)
      store_part(out + r * out_stride + v * W, left, sum[r][v]);
  }
}

template <int ROWS, typename Weight>
EVENER_OUTLINE void gemm_tile(const float* x, int64_t x_stride, const Weight* panel, int64_t depth, float* out,
                             int64_t out_stride, const float* bias, bool first, int64_t columns, Ahead& ahead) {
  vf sum[ROWS][NV];
  begin_sums<ROWS>(sum, first ? bias : nullptr, first ? nullptr : out, out_stride, columns);
  auto step = [&](int64_t k) EVENER_INLINED {
    vf line[NV];
    EVENER_UNROLL for (int v = 0; v < NV; ++v) line[v] = load(panel + k * NR + v * W);
    EVENER_UNROLL for (int r = 0; r < ROWS; ++r) {
      vf a = set1(x[r * x_stride + k]);
      EVENER_UNROLL for (int v = 0; v < NV; ++v) sum[r][v] += a * line[v];
    }
  };
  int64_t k = 0;
  for (; k + STEPS <= depth; k += STEPS) {
    for (int64_t i = 0; i < ahead.lines; ++i) __builtin_prefetch(ahead.at + i * LINE, 0, 2);
    ahead.at += ahead.lines * LINE;
    EVENER_UNROLL for (int i = 0; i < STEPS; ++i) step(k + i);
  }
  for (; k < depth; ++k) step(k);
  store_sums<ROWS>(sum, out, out_stride, columns);
}

// Tiles of m rows: of nearly equal height, as one of a single row waits for its own sums. Tile t begins at row_of(t).
struct Tiles {
  int64_t m, count;
  explicit Tiles(int64_t rows) : m(rows), count((rows + MR - 1) / MR) {}
  int64_t row_of(int64_t t) const {
    int64_t row = (m + UNIT - 1) / UNIT * t / count * UNIT;
    return row < m ? row : m;
  }
};

template <int ROWS>
struct Rows {
  static constexpr int value = ROWS;
};

// Calls body(rows, done) for kernels of a compile-time number of rows, at most MR, that make up `rows` together. Not
// every number has a kernel: compiling them takes time.
template <int ROWS, typename Body>
EVENER_INLINE void by_rows(int64_t rows, int64_t done, Body&& body) {
  if constexpr (ROWS > 0) {
    if constexpr (ROWS <= 6 || ROWS % UNIT == 0) {
      if (rows >= ROWS) {
        body(Rows<ROWS>(), done);
        rows -= ROWS, done += ROWS;
        if (rows == 0) return;
      }
    }
    by_rows<ROWS - 1>(rows, done, body);
  }
}

template <typename Weight>
void gemm_panels(const GemmArgs& a, int64_t panel, int64_t end) {
  const Tiles tiles(a.m);
  int64_t blocks = (a.k + KC - 1) / KC;
  for (int64_t p = panel; p < end; ++p) {
    const float* bias = a.bias ? a.bias + p * NR : nullptr;
    int64_t columns = a.n - p * NR < NR ? a.n - p * NR : NR;
    for (int64_t b = 0; b < blocks; ++b) {
      int64_t k = a.k * b / blocks, depth = a.k * (b + 1) / blocks - k;
      const Weight* weight = static_cast<const Weight*>(a.packed) + (p * a.k + k) * NR;
      // The next share of the weight, divided among the tiles of this one. A prefetch beyond the end is harmless.
      constexpr int64_t LINES = STEPS * NR * sizeof(Weight) / LINE;
      Ahead ahead = {reinterpret_cast<const char*>(weight + depth * NR), (LINES + tiles.count - 1) / tiles.count};
      for (int64_t t = 0; t < tiles.count; ++t) {
        int64_t row = tiles.row_of(t);
        by_rows<MR>(tiles.row_of(t + 1) - row, row, [&](auto rows, int64_t at) EVENER_INLINED {
          gemm_tile<decltype(rows)::value>(a.x + at * a.x_stride + k, a.x_stride, weight, depth,
                                           a.out + at * a.out_stride + p * NR, a.out_stride, bias, b == 0, columns, ahead);
        });
      }
    }
  }
}

}  // namespace
