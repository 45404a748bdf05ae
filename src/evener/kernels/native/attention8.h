// Attention over a KV cache in int8 by integer products (vpdpbusd), otherwise as attention.h. Queries and softmax weights
// become 16-bit integers in two bytes, with a step of each row's own (weights: and of each key tile's): what is lost is far
// below what int8 keys and values have lost already. Sums are exact, so a row's result depends on nothing but the row, as in attention.h.
#pragma once

namespace {

using namespace evener;

// An unsigned 16-bit integer as its bytes, for a dot product of each.
struct Halves {
  vi high, low;
};

EVENER_INLINE vi dot8(vi sum, int32_t four, vi bytes) {
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)set1i(four), (__m512i)bytes);
}

EVENER_INLINE vi bytes_at(const int8_t* p) {
  vi v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

EVENER_INLINE int32_t four_at(const uint8_t* p) {
  int32_t v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

EVENER_INLINE void store_halves(vi q, uint8_t* high, uint8_t* low) {
  _mm_storeu_si128((__m128i*)high, _mm512_cvtepi32_epi8((__m512i)(q >> 8)));
  _mm_storeu_si128((__m128i*)low, _mm512_cvtepi32_epi8((__m512i)q));
}

constexpr int32_t HALF = 32768;  // added to a query's integers, to make them unsigned
constexpr int64_t MAX_DIM8 = 512;  // 32767 * 127 * 512 stays below 2^31; partial sums may wrap, their total does not

// Registers hold, for R rows: two sums for each of N vectors, and one more for a query's offset.
constexpr int wide8(int rows) { return rows <= 3 ? 4 : rows <= 6 ? 2 : 1; }

// s[r][16 j + key] = q[r] * k[j][key], scaled, for blocks j in [0, N). q: [R][2][dim] bytes.
template <int R, int N, bool AHEAD>
EVENER_INLINE void scores8_of(const uint8_t* q, const float* q_scale, const int8_t* const* k, const int8_t* const* next,
                              int64_t dim, float* s) {
  vi high[R][N] = {}, low[R][N] = {}, sum[N] = {};
  if (AHEAD) {
    EVENER_UNROLL for (int j = 0; j < N; ++j) prefetch(next[j] + dim * BLOCK);
  }
  int64_t block = 0, at = 0;  // what is fetched, in the order of memory: N lines of a block
  for (int64_t d = 0; d < dim; d += 4) {
    vi keys[N];
    if (AHEAD) {
      EVENER_UNROLL for (int j = 0; j < N; ++j) prefetch(next[block] + at + j * 64);
      at += N * 64;
      if (N > 1 && at >= dim * BLOCK) ++block, at = 0;
    }
    EVENER_UNROLL for (int j = 0; j < N; ++j) {
      keys[j] = bytes_at(k[j] + d * BLOCK);
      sum[j] = dot8(sum[j], 0x01010101, keys[j]);
    }
    EVENER_UNROLL for (int r = 0; r < R; ++r) {
      int32_t h = four_at(q + r * 2 * dim + d), l = four_at(q + r * 2 * dim + dim + d);
      EVENER_UNROLL for (int j = 0; j < N; ++j) {
        high[r][j] = dot8(high[r][j], h, keys[j]);
        low[r][j] = dot8(low[r][j], l, keys[j]);
      }
    }
  }
  EVENER_UNROLL for (int j = 0; j < N; ++j) {
    vf scale = load(scales_of(k[j], dim));
    EVENER_UNROLL for (int r = 0; r < R; ++r) {
      vi total = (vi)(((vu)high[r][j] << 8) + (vu)low[r][j] - (vu)sum[j] * uint32_t(HALF));
      store(s + r * KEY_TILE + j * BLOCK, __builtin_convertvector(total, vf) * scale * q_scale[r]);
    }
  }
}

template <int R, bool AHEAD>
void scores8(const uint8_t* q, const float* q_scale, const int8_t* const* k, const int8_t* const* next, int blocks,
             int64_t dim, float* s) {
  constexpr int N = wide8(R);
  int j = 0;
  for (; j + N <= blocks; j += N) scores8_of<R, N, AHEAD>(q, q_scale, k + j, next + j, dim, s + j * BLOCK);
  if (N > 1)
    for (; j < blocks; ++j) scores8_of<R, 1, AHEAD>(q, q_scale, k + j, next + j, dim, s + j * BLOCK);
}

// out[r][d] += p[r] * v[.][d], scaled, for 16 N columns from d = first. p: rows of KEY_TILE floats, whose first two
// KEY_TILEs of bytes are the halves.
template <int R, int N, bool AHEAD>
EVENER_INLINE void values8_of(const float* p, const float* p_scale, const int8_t* const* v, const int8_t* const* next,
                              int blocks, int64_t dim, int64_t first, float* out) {
  const uint8_t* halves = reinterpret_cast<const uint8_t*>(p);
  vi high[R][N] = {}, low[R][N] = {};
  for (int key = 0; key < blocks * BLOCK; key += 4) {
    const int8_t* from = v[key / BLOCK] + (key % BLOCK / 4 * dim + first) * 4;
    vi values[N];
    EVENER_UNROLL for (int c = 0; c < N; ++c) {
      if (AHEAD) prefetch(next[key / BLOCK] + (key % BLOCK / 4 * dim + first + c * W) * 4);
      values[c] = bytes_at(from + c * W * 4);
    }
    EVENER_UNROLL for (int r = 0; r < R; ++r) {
      const uint8_t* row = halves + r * KEY_TILE * 4 + key;
      int32_t h = four_at(row), l = four_at(row + KEY_TILE);
      EVENER_UNROLL for (int c = 0; c < N; ++c) {
        high[r][c] = dot8(high[r][c], h, values[c]);
        low[r][c] = dot8(low[r][c], l, values[c]);
      }
    }
  }
  EVENER_UNROLL for (int r = 0; r < R; ++r) EVENER_UNROLL for (int c = 0; c < N; ++c) {
    float* to = out + r * dim + first + c * W;
    store(to, load(to) + __builtin_convertvector((high[r][c] << 8) + low[r][c], vf) * p_scale[r]);
  }
}

template <int R, bool AHEAD>
void values8(const float* p, const float* p_scale, const int8_t* const* v, const int8_t* const* next, int blocks,
             int64_t dim, float* out) {
  constexpr int N = wide8(R);
  int64_t d = 0;
  for (; d + 16 * N <= dim; d += 16 * N) values8_of<R, N, AHEAD>(p, p_scale, v, next, blocks, dim, d, out);
  if (N > 1)
    for (; d < dim; d += 16) values8_of<R, 1, AHEAD>(p, p_scale, v, next, blocks, dim, d, out);
}

struct Panel8Kernels {
  void (*scores[PANEL + 1])(const uint8_t*, const float*, const int8_t* const*, const int8_t* const*, int, int64_t, float*);
  void (*values[PANEL + 1])(const float*, const float*, const int8_t* const*, const int8_t* const*, int, int64_t, float*);
};

template <int R, bool AHEAD>
constexpr void fill8(Panel8Kernels& k) {
  if constexpr (R > 0) {
    k.scores[R] = scores8<R, AHEAD && R <= FEW>;
    k.values[R] = values8<R, AHEAD && R <= FEW>;
    fill8<R - 1, AHEAD>(k);
  }
}

template <bool AHEAD>
constexpr Panel8Kernels panels8() {
  Panel8Kernels k{};
  fill8<PANEL, AHEAD>(k);
  return k;
}

constexpr Panel8Kernels COLD8 = panels8<true>(), WARM8 = panels8<false>();

// A query, times `scale`, to integers, each with `offset` added; returns their step.
EVENER_INLINE float query_halves(const float* q, float scale, int64_t dim, int32_t offset, uint8_t* high, uint8_t* low) {
  float step = scale_of(q, dim, 32767), inverse = inverse_of(step);
  for (int64_t d = 0; d < dim; d += W) store_halves(rounded(load(q + d) * inverse) + offset, high + d, low + d);
  return step * scale;
}

// The weights of a row of a key tile, times their values' scales, to integers, in place; returns their step: that of the
// row's own largest, however small the row's weights are in this tile; NaN where the row reads what is not finite.
EVENER_INLINE float weight_halves(float* p, const int8_t* const* v, int blocks, int64_t dim) {
  vf w[KEY_TILE / W] = {}, most{};
  vi lost{};
  EVENER_UNROLL for (int j = 0; j < KEY_TILE / W; ++j) {
    if (j >= blocks) continue;
    vf weight = load(p + j * W);
    // A key that the row does not read has weight 0, whatever its scale is.
    w[j] = weight == 0.0f ? vf{} : weight * load(scales_of(v[j], dim));
    most = vmax(most, w[j]);
    lost |= !(w[j] < 3e38f);
  }
  float step = hmax(most) / 65535.0f, inverse = inverse_of(step);
  uint8_t* halves = reinterpret_cast<uint8_t*>(p);
  EVENER_UNROLL for (int j = 0; j < KEY_TILE / W; ++j)
    store_halves(rounded(w[j] * inverse), halves + j * W, halves + KEY_TILE + j * W);
  return any(lost) ? __builtin_nanf("") : step;
}

// What the kernels above do not fetch of the next key tile: the values' scales, and where this tile has fewer blocks than
// that one, the rest.
EVENER_INLINE void fetch_rest(const TileBlocks<int8_t>& at, int blocks, int64_t dim) {
  const int64_t bytes = block_elements<int8_t>(dim);
  for (int j = 0; j < KEY_TILE / BLOCK; ++j) {
    if (j < blocks) {
      prefetch(at.v_next[j] + dim * BLOCK);
      continue;
    }
    for (int64_t i = 0; i < bytes; i += 64) prefetch(at.k_next[j] + i), prefetch(at.v_next[j] + i);
  }
}

void attention8_tile(const AttentionArgs& a, const AttentionTile& t, float* scratch) {
  const int64_t dim = a.head_dim;
  if (dim > MAX_DIM8) return attention_tile<int8_t>(a, t, scratch);
  const int rows = t.tokens * t.heads;
  const int panel = panel_height(rows);
  uint8_t* q = reinterpret_cast<uint8_t*>(scratch);
  float* p = scratch + MAX_ROWS * dim;
  Running run;
  run.out = p + MAX_ROWS * KEY_TILE;
  run.maximum = run.out + MAX_ROWS * dim;
  run.sum = run.maximum + MAX_ROWS;
  float *q_scale = run.sum + MAX_ROWS, *p_scale = q_scale + MAX_ROWS;
  const float scale = a.scale * 1.44269504f;  // scores in base 2
  for (int i = 0; i < rows; ++i) {
    const float* from = a.q + (t.row + i / t.heads) * a.q_stride + (t.head + i % t.heads) * dim;
    q_scale[i] = query_halves(from, scale, dim, HALF, q + i * 2 * dim, q + i * 2 * dim + dim);
    run.maximum[i] = -__builtin_inff();
    run.sum[i] = 0.0f;
  }
  __builtin_memset(run.out, 0, rows * dim * sizeof(float));

  const int limit = t.position + t.tokens;
  for (int key = 0; key < limit; key += KEY_TILE) {
    const TileBlocks<int8_t> at(a, t, key);
    for (int first = 0; first < rows; first += panel) {
      int r = rows - first < panel ? rows - first : panel, keys = keys_read(t, first + r - 1, key);
      if (keys <= 0) continue;
      int blocks = (keys + BLOCK - 1) / BLOCK;
      const Panel8Kernels& kernels = first ? WARM8 : COLD8;
      float* scores = p + first * KEY_TILE;
      kernels.scores[r](q + first * 2 * dim, q_scale + first, at.k, at.k_next, blocks, dim, scores);
      softmax(p, first, first + r, blocks, dim, run, [&](int i) { return keys_read(t, i, key); });
      for (int i = first; i < first + r; ++i) p_scale[i] = weight_halves(p + i * KEY_TILE, at.v, blocks, dim);
      kernels.values[r](scores, p_scale + first, at.v, at.v_next, blocks, dim, run.out + first * dim);
      if (first == 0 && r <= FEW && (key + KEY_TILE < limit || t.next)) fetch_rest(at, blocks, dim);
    }
  }
  write_out(a, t, run, rows);
}

}  // namespace
