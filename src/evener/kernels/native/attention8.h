// Attention over a KV cache in int8 by integer products (vpdpbusd), otherwise as attention.h. Queries and softmax weights
// become 16-bit integers in two bytes, with a step of each row's own (weights: and of each key tile's): what is lost is far
// below what int8 keys and values have lost already. Sums are exact, so a row's result depends on nothing but the row, as in
// attention.h. Of a prompt's attention most goes to what lies between the two products, so that is counted in operations: 28
// for 16 scores, with horizontal steps for 16 rows at a time.
#pragma once

namespace {

using namespace evener;

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

template <bool B>
struct Flag {
  static constexpr bool value = B;
};

constexpr int32_t HALF = 32768;  // added to a query's integers, to make them unsigned
constexpr int64_t MAX_DIM8 = 512;  // 32767 * 127 * 512 stays below 2^31; partial sums may wrap, their total does not

// Registers hold, for R rows: two sums for each of N vectors, and one more for a query's offset.
constexpr int wide8(int rows) { return rows <= 3 ? 4 : rows <= 6 ? 2 : 1; }

// s[r][16 j + key] = q[r] * k[j][key], but for the query's step, for blocks j in [0, N). q: [R][2][dim] bytes.
template <int R, int N, bool AHEAD>
EVENER_INLINE void scores8_of(const uint8_t* q, const int8_t* const* k, const int8_t* const* next, int64_t dim, float* s) {
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
      store(s + r * KEY_TILE + j * BLOCK, __builtin_convertvector(total, vf) * scale);
    }
  }
}

template <int R, bool AHEAD>
EVENER_INLINE void scores8(const uint8_t* q, const int8_t* const* k, const int8_t* const* next, int blocks, int64_t dim,
                           float* s) {
  constexpr int N = wide8(R);
  int j = 0;
  for (; j + N <= blocks; j += N) scores8_of<R, N, AHEAD>(q, k + j, next + j, dim, s + j * BLOCK);
  if (N > 1)
    for (; j < blocks; ++j) scores8_of<R, 1, AHEAD>(q, k + j, next + j, dim, s + j * BLOCK);
}

// Where a row has the two bytes of its weights: as packing leaves them, by fours of keys, first those of all blocks, then the
// next four of each.
constexpr int HALVES = 2 * KEY_TILE;
constexpr int place_of(int key) { return key % BLOCK * (KEY_TILE / BLOCK) + key / BLOCK * 4; }  // of every fourth key

EVENER_INLINE void store_packed(const __m512i (&n)[KEY_TILE / BLOCK], uint8_t* to) {
  const __m512i front = _mm512_packus_epi32(n[0], n[1]), back = _mm512_packus_epi32(n[2], n[3]), low = _mm512_set1_epi16(255);
  _mm512_storeu_si512(to, _mm512_packus_epi16(_mm512_srli_epi16(front, 8), _mm512_srli_epi16(back, 8)));
  _mm512_storeu_si512(to + KEY_TILE, _mm512_packus_epi16(_mm512_and_si512(front, low), _mm512_and_si512(back, low)));
}

// out[r][d] += p[r] * v[.][d], scaled, for 16 N columns from d = first. halves: [R][HALVES], as store_packed.
template <int R, int N, bool AHEAD>
EVENER_INLINE void values8_of(const uint8_t* halves, const float* p_scale, const int8_t* const* v, const int8_t* const* next,
                              int blocks, int64_t dim, int64_t first, float* out) {
  vi high[R][N] = {}, low[R][N] = {};
  for (int key = 0; key < blocks * BLOCK; key += 4) {
    const int8_t* from = v[key / BLOCK] + (key % BLOCK / 4 * dim + first) * 4;
    vi values[N];
    EVENER_UNROLL for (int c = 0; c < N; ++c) {
      if (AHEAD) prefetch(next[key / BLOCK] + (key % BLOCK / 4 * dim + first + c * W) * 4);
      values[c] = bytes_at(from + c * W * 4);
    }
    EVENER_UNROLL for (int r = 0; r < R; ++r) {
      const uint8_t* row = halves + r * HALVES + place_of(key);
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
EVENER_INLINE void values8(const uint8_t* halves, const float* p_scale, const int8_t* const* v, const int8_t* const* next,
                           int blocks, int64_t dim, float* out) {
  constexpr int N = wide8(R);
  int64_t d = 0;
  for (; d + 16 * N <= dim; d += 16 * N) values8_of<R, N, AHEAD>(halves, p_scale, v, next, blocks, dim, d, out);
  if (N > 1)
    for (; d < dim; d += 16) values8_of<R, 1, AHEAD>(halves, p_scale, v, next, blocks, dim, d, out);
}

// Lane r: what `both` makes of all lanes of m[r], in hsum's order, by halving up to 16 rows at a time.
template <int R, typename Both>
EVENER_INLINE __m512 across(const __m512* m, Both&& both) {
  __m512 u[8], w[4], y[2];
  auto row = [&](int r) EVENER_INLINED { return m[r < R ? r : R - 1]; };
  EVENER_UNROLL for (int i = 0; i < 8; ++i)
    u[i] = both(_mm512_shuffle_f32x4(row(2 * i), row(2 * i + 1), 0x88), _mm512_shuffle_f32x4(row(2 * i), row(2 * i + 1), 0xdd));
  EVENER_UNROLL for (int i = 0; i < 4; ++i)
    w[i] = both(_mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0x88), _mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0xdd));
  EVENER_UNROLL for (int i = 0; i < 2; ++i)
    y[i] = both(_mm512_shuffle_ps(w[2 * i], w[2 * i + 1], 0x44), _mm512_shuffle_ps(w[2 * i], w[2 * i + 1], 0xee));
  const __m512 z = both(_mm512_shuffle_ps(y[0], y[1], 0x88), _mm512_shuffle_ps(y[0], y[1], 0xdd));  // lane 4 q + l: row 4 l + q
  return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), z);
}

EVENER_INLINE __m512 most_of(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
EVENER_INLINE __m512 sum_of(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
// Of what is not negative; NaN is above all.
EVENER_INLINE __m512 top_of(__m512 a, __m512 b) {
  return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}

// Not to be contracted with what it goes into: the largest score less itself is 0.
EVENER_INLINE __m512 rounded_off(__m512 x) {
  asm("" : "+v"(x));
  return x;
}

// 2^x for x <= 0, of the lanes of `where`; 0 in the others and below -126, NaN for NaN. Relative error under 2e-7: 2^f for
// f in [0, 1) by a near-minimax polynomial (Lawson's algorithm) with constant term 1.
EVENER_INLINE __m512 exp2_down(__m512 x, __mmask16 where) {
  const __m512 f = _mm512_reduce_ps(x, 1);  // x - floor(x)
  __m512 p = _mm512_set1_ps(0.0018671317f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.009017027f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.055799916f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24016444f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6931513f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_maskz_scalef_ps(_mm512_mask_cmp_ps_mask(where, x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ), p, x);
}

// Where a panel's scores are: that of row r and key 16 j + i at [r * row + j * block + i].
struct Scores8 {
  float* at;
  int row, block;
};

// Online softmax of one key tile for the R rows from `first` on, of which `rows` are there: scores, but for the queries'
// steps, to weights, these times their values' scales to integers, and their steps: that of the row's own largest, however small
// the row's weights are in this tile, or NaN where the row reads what is not finite. `score(r, j)`: 16 scores. WHOLE: every
// row reads all keys. Every row takes the same steps, whatever R and BLOCKS are.
template <int R, int BLOCKS, bool WHOLE, typename Score>
EVENER_INLINE void weights8(Score&& score, const Scores8& s, const float* q_scale, const TileBlocks<int8_t>& at,
                            const AttentionTile& t, int key, int first, int rows, int64_t dim, const Running& run, uint8_t* halves,
                            float* p_scale) {
  static_assert(R <= W && (!WHOLE || BLOCKS * BLOCK == KEY_TILE));
  const __mmask16 there = __mmask16((1u << rows) - 1);
  alignas(64) __m512 top[R], total[R];
  alignas(64) float now[W], inverses[W], corrections[W];
  auto of = [&](int r, int j) EVENER_INLINED { return s.at + r * s.row + j * s.block; };
  auto read = [&](int r, int j) EVENER_INLINED {
    if (WHOLE) return __mmask16(0xffff);
    const int keys = keys_read(t, first + r, key) - j * BLOCK;
    return keys <= 0 ? __mmask16(0) : keys >= BLOCK ? __mmask16(0xffff) : __mmask16((1u << keys) - 1);
  };

  EVENER_UNROLL for (int r = 0; r < R; ++r) {
    EVENER_UNROLL for (int j = 0; j < BLOCKS; ++j) {
      __m512 x = (__m512)score(r, j);
      if (!WHOLE) x = _mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), read(r, j), x);
      _mm512_storeu_ps(of(r, j), x);
      top[r] = j ? most_of(x, top[r]) : x;
    }
  }
  const __m512 q = _mm512_maskz_loadu_ps(there, q_scale), before = _mm512_maskz_loadu_ps(there, run.maximum + first);
  const __m512 maximum = most_of(_mm512_mul_ps(across<R>(top, most_of), q), before);  // as before where a row reads nothing
  _mm512_store_ps(now, maximum);

  __m512 scale[BLOCKS];
  EVENER_UNROLL for (int j = 0; j < BLOCKS; ++j) scale[j] = _mm512_loadu_ps(scales_of(at.v[j], dim));
  EVENER_UNROLL for (int r = 0; r < R; ++r) {
    const __m512 step = _mm512_set1_ps(q_scale[r]), most = _mm512_set1_ps(now[r]);
    EVENER_UNROLL for (int j = 0; j < BLOCKS; ++j) {
      const __mmask16 lanes = read(r, j);
      const __m512 p = exp2_down(rounded_off(_mm512_loadu_ps(of(r, j)) * step) - most, lanes);
      total[r] = j ? sum_of(total[r], p) : p;
      // A key that the row does not read has weight 0, whatever its scale is.
      const __m512 weight = WHOLE ? _mm512_mul_ps(p, scale[j]) : _mm512_maskz_mul_ps(lanes, p, scale[j]);
      _mm512_storeu_ps(of(r, j), weight);
      top[r] = j ? top_of(weight, top[r]) : weight;
    }
  }
  const __m512 correction = exp2_down(_mm512_sub_ps(before, maximum), there);
  _mm512_mask_storeu_ps(run.maximum + first, there, maximum);
  const __m512 sum = _mm512_maskz_loadu_ps(there, run.sum + first);
  _mm512_mask_storeu_ps(run.sum + first, there, _mm512_fmadd_ps(sum, correction, across<R>(total, sum_of)));

  const __m512 largest = across<R>(top, top_of), step = _mm512_mul_ps(largest, _mm512_set1_ps(1.0f / 65535.0f));
  const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), step), limit = _mm512_set1_ps(3e38f);  // 0: weights so small are 0
  _mm512_store_ps(inverses, _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(inverse, limit, _CMP_LE_OQ), inverse));
  const __mmask16 lost = _mm512_cmp_ps_mask(largest, limit, _CMP_NLE_UQ);
  _mm512_mask_storeu_ps(p_scale, there, _mm512_mask_mov_ps(step, lost, _mm512_set1_ps(__builtin_nanf(""))));
  EVENER_UNROLL for (int r = 0; r < R; ++r) {
    const __m512 by = _mm512_set1_ps(inverses[r]);
    __m512i n[KEY_TILE / BLOCK] = {};
    EVENER_UNROLL for (int j = 0; j < BLOCKS; ++j) n[j] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(of(r, j)), by));
    store_packed(n, halves + r * HALVES);
  }

  unsigned changed = _mm512_mask_cmp_ps_mask(there, before, maximum, _CMP_NEQ_UQ);
  if (!changed) return;
  _mm512_store_ps(corrections, correction);
  for (; changed; changed &= changed - 1) {
    const int r = __builtin_ctz(changed);
    float* out = run.out + (first + r) * dim;
    for (int64_t d = 0; d < dim; d += W) store(out + d, load(out + d) * corrections[r]);
  }
}

// What a panel of R rows does with a key tile, from scores to outputs.
template <int R, bool AHEAD>
EVENER_OUTLINE void panel8(const uint8_t* q, const float* q_scale, const TileBlocks<int8_t>& at, const AttentionTile& t, int key,
                           int first, int blocks, int64_t dim, const Running& run) {
  alignas(64) float s[R * KEY_TILE], p_scale[R];
  alignas(64) uint8_t halves[R * HALVES];
  scores8<R, AHEAD>(q, at.k, at.k_next, blocks, dim, s);
  auto score = [&](int r, int j) EVENER_INLINED { return load(s + r * KEY_TILE + j * BLOCK); };
  auto weights = [&](auto whole) EVENER_INLINED {
    weights8<R, KEY_TILE / BLOCK, decltype(whole)::value>(score, {s, KEY_TILE, BLOCK}, q_scale, at, t, key, first, R, dim, run, halves,
                                                          p_scale);
  };
  if (keys_read(t, first, key) == KEY_TILE)  // later rows read more
    weights(Flag<true>());
  else
    weights(Flag<false>());
  values8<R, AHEAD>(halves, p_scale, at.v, at.v_next, blocks, dim, run.out + first * dim);
}

typedef void Panel8(const uint8_t*, const float*, const TileBlocks<int8_t>&, const AttentionTile&, int, int, int, int64_t,
                    const Running&);
struct Panel8Kernels {
  Panel8* of[PANEL + 1];
};

template <int R, bool AHEAD>
constexpr void fill8(Panel8Kernels& k) {
  if constexpr (R > 0) {
    k.of[R] = panel8<R, AHEAD && R <= FEW>;
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

// A query, times `scale`, to integers, each with `offset` added; returns their step, which is never negative.
EVENER_INLINE float query_halves(const float* q, float scale, int64_t dim, int32_t offset, uint8_t* high, uint8_t* low) {
  float step = scale_of(q, dim, 32767), inverse = __builtin_copysignf(inverse_of(step), scale);
  for (int64_t d = 0; d < dim; d += W) store_halves(rounded(load(q + d) * inverse) + offset, high + d, low + d);
  return step * __builtin_fabsf(scale);
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
  Running run;
  run.out = scratch + MAX_ROWS * (dim + KEY_TILE);
  run.maximum = run.out + MAX_ROWS * dim;
  run.sum = run.maximum + MAX_ROWS;
  float* q_scale = run.sum + MAX_ROWS;
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
      (first ? WARM8 : COLD8).of[r](q + first * 2 * dim, q_scale + first, at, t, key, first, blocks, dim, run);
      if (first == 0 && r <= FEW && (key + KEY_TILE < limit || t.next)) fetch_rest(at, blocks, dim);
    }
  }
  write_out(a, t, run, rows);
}

}  // namespace
