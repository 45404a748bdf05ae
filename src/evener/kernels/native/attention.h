// Causal attention over a paged KV cache: online softmax (Milakov and Gimelshein 2018; FlashAttention-2) by tiles of
// (token, head) rows that share a KV head.
//
// The arithmetic of a row is the same in every tile: keys in tiles of KEY_TILE at absolute positions; scores summed over
// the head dimension in order; values summed over keys in order; masked keys have weight exactly 0. So a row's result does not
// depend on its neighbours, on how its prompt was cut into chunks, or on the number of threads.
#pragma once

namespace {

using namespace evener;

// Register tile: R rows x the 16 keys of a block (scores), or x 16 columns (values). More blocks or columns at a time when
// rows are few, to keep enough independent sums in flight.
constexpr int LANES = BLOCK / W;  // vectors per 16 floats
#if EVENER_WIDTH == 16
constexpr int PANEL = 12, SUMS = 24;
#elif EVENER_WIDTH == 8
constexpr int PANEL = 6, SUMS = 12;
#else
constexpr int PANEL = 2, SUMS = 8;
#endif
constexpr int wide(int rows) {
  int n = SUMS / (rows * LANES);
  return n >= 4 ? 4 : n >= 2 ? 2 : 1;
}

EVENER_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// s[r][16 j + key] = sum_d q[d][r] * k[j][d][key] for blocks j in [0, N). `next` (or nullptr): blocks to fetch ahead.
template <int R, int N, bool AHEAD>
EVENER_INLINE void scores_of(const float* q, const float* const* k, const float* const* next, int64_t dim, float* s) {
  vf sum[R][N * LANES] = {};
#pragma GCC unroll 2
  for (int64_t d = 0; d < dim; ++d) {
    vf row[R];
    EVENER_UNROLL for (int r = 0; r < R; ++r) row[r] = set1(q[d * R + r]);
    EVENER_UNROLL for (int j = 0; j < N; ++j) {
      if (AHEAD) prefetch(next[j] + d * BLOCK);
      EVENER_UNROLL for (int v = 0; v < LANES; ++v) {
        vf key = load(k[j] + d * BLOCK + v * W);
        EVENER_UNROLL for (int r = 0; r < R; ++r) sum[r][j * LANES + v] += row[r] * key;
      }
    }
  }
  EVENER_UNROLL for (int r = 0; r < R; ++r) {
    EVENER_UNROLL for (int v = 0; v < N * LANES; ++v) store(s + r * KEY_TILE + v * W, sum[r][v]);
  }
}

template <int R, bool AHEAD>
void scores(const float* q, const float* const* k, const float* const* next, int blocks, int64_t dim, float* s) {
  constexpr int N = wide(R);
  int j = 0;
  for (; j + N <= blocks; j += N) scores_of<R, N, AHEAD>(q, k + j, next + j, dim, s + j * BLOCK);
  if (N > 1)
    for (; j < blocks; ++j) scores_of<R, 1, AHEAD>(q, k + j, next + j, dim, s + j * BLOCK);
}

// out[r][d] += sum_key p[r][key] * v[key][d] for 16 N columns.
template <int R, int N, bool AHEAD>
EVENER_INLINE void values_of(const float* p, const float* const* v, const float* const* next, int keys, int64_t dim,
                             float* out) {
  vf sum[R][N * LANES];
  EVENER_UNROLL for (int r = 0; r < R; ++r) {
    EVENER_UNROLL for (int c = 0; c < N * LANES; ++c) sum[r][c] = load(out + r * dim + c * W);
  }
  for (int j = 0; j * BLOCK < keys; ++j) {
    int n = keys - j * BLOCK < BLOCK ? keys - j * BLOCK : BLOCK;
    const float *from = v[j], *ahead = next[j], *weight = p + j * BLOCK;
#pragma GCC unroll 2
    for (int t = 0; t < n; ++t) {
      vf row[R];
      EVENER_UNROLL for (int r = 0; r < R; ++r) row[r] = set1(weight[r * KEY_TILE + t]);
      if (AHEAD) {
        EVENER_UNROLL for (int c = 0; c < N; ++c) prefetch(ahead + t * dim + c * 16);
      }
      EVENER_UNROLL for (int c = 0; c < N * LANES; ++c) {
        vf value = load(from + t * dim + c * W);
        EVENER_UNROLL for (int r = 0; r < R; ++r) sum[r][c] += row[r] * value;
      }
    }
  }
  EVENER_UNROLL for (int r = 0; r < R; ++r) {
    EVENER_UNROLL for (int c = 0; c < N * LANES; ++c) store(out + r * dim + c * W, sum[r][c]);
  }
}

template <int R, bool AHEAD>
void values(const float* p, const float* const* v, const float* const* next, int keys, int64_t dim, float* out) {
  constexpr int N = wide(R);
  const float *from[KEY_TILE / BLOCK], *ahead[KEY_TILE / BLOCK];
  int64_t d = 0;
  auto shift = [&] {
    for (int j = 0; j < KEY_TILE / BLOCK; ++j) from[j] = v[j] + d, ahead[j] = next[j] + d;
  };
  for (; d + 16 * N <= dim; d += 16 * N) {
    shift();
    values_of<R, N, AHEAD>(p, from, ahead, keys, dim, out + d);
  }
  if (N > 1)
    for (; d < dim; d += 16) {
      shift();
      values_of<R, 1, AHEAD>(p, from, ahead, keys, dim, out + d);
    }
}

typedef void (*PanelKernel)(const float*, const float* const*, const float* const*, int, int64_t, float*);
struct PanelKernels {
  PanelKernel scores[PANEL + 1], values[PANEL + 1];
};

template <int R, bool AHEAD>
constexpr void fill(PanelKernels& k) {
  if constexpr (R > 0) {
    k.scores[R] = scores<R, AHEAD>;
    k.values[R] = values<R, AHEAD>;
    fill<R - 1, AHEAD>(k);
  }
}

template <bool AHEAD>
constexpr PanelKernels panels() {
  PanelKernels k{};
  fill<PANEL, AHEAD>(k);
  return k;
}

constexpr PanelKernels ONCE = panels<true>(), REUSED = panels<false>();

// One key tile of one row: scores (in base 2) to weights, in place; returns what older sums must be multiplied by.
EVENER_INLINE float softmax_tile(float* s, int valid, int blocks, float* maximum, float* sum) {
  if (valid <= 0) {
    for (int i = 0; i < blocks * BLOCK; i += W) store(s + i, vf{});
    return 1.0f;
  }
  for (int i = valid / W * W; i < blocks * BLOCK; i += W)
    store(s + i, lane_index() + set1i(i) < valid ? load(s + i) : set1(-__builtin_inff()));
  vf top = load(s);
  for (int i = W; i < blocks * BLOCK; i += W) top = vmax(load(s + i), top);
  float before = *maximum, now = hmax(top);
  if (now < before) now = before;
  vf total[LANES] = {};
  for (int i = 0; i < blocks * BLOCK; i += BLOCK) {
    EVENER_UNROLL for (int v = 0; v < LANES; ++v) {
      vf p = exp2_vec(load(s + i + v * W) - now);
      total[v] += p;
      store(s + i + v * W, p);
    }
  }
  EVENER_UNROLL for (int v = 1; v < LANES; ++v) total[0] += total[v];
  float correction = now == before ? 1.0f : exp2_vec(set1(before - now))[0];
  *maximum = now;
  *sum = *sum * correction + hsum(total[0]);
  return correction;
}

void attention_tile(const AttentionArgs& a, const AttentionTile& t, float* scratch) {
  const int64_t dim = a.head_dim;
  const int rows = t.tokens * t.heads;
  float *q = scratch, *sums = q + MAX_ROWS * dim, *p = sums + MAX_ROWS * dim;
  float *maximum = p + MAX_ROWS * KEY_TILE, *total = maximum + MAX_ROWS;
  const float scale = a.scale * 1.44269504f;  // scores in base 2

  for (int i = 0; i < rows; ++i) {  // queries by panels, transposed
    int first = i / PANEL * PANEL, r = rows - first < PANEL ? rows - first : PANEL;
    const float* from = a.q + (t.row + i / t.heads) * a.q_stride + (t.head + i % t.heads) * dim;
    float* to = q + first * dim + (i - first);
    for (int64_t d = 0; d < dim; ++d) to[d * r] = from[d] * scale;
    maximum[i] = -__builtin_inff();
    total[i] = 0.0f;
  }
  __builtin_memset(sums, 0, rows * dim * sizeof(float));

  // With one panel each key is read once, so memory is the limit: fetch the next tile while this one is used.
  const PanelKernels& kernels = rows <= PANEL ? ONCE : REUSED;
  const float *k_head = a.k_slab + t.kv_head * a.slab_head_stride, *v_head = a.v_slab + t.kv_head * a.slab_head_stride;
  const int limit = t.position + t.tokens;  // keys the last token reads
  const int n_blocks = (limit + BLOCK - 1) / BLOCK;
  for (int key = 0; key < limit; key += KEY_TILE) {
    const float *k[4], *v[4], *k_next[4], *v_next[4];
    for (int j = 0; j < KEY_TILE / BLOCK; ++j) {
      int block = key / BLOCK + j, next = block + KEY_TILE / BLOCK;
      if (block >= n_blocks) block = n_blocks - 1;
      if (next >= n_blocks) next = block;
      int64_t at = int64_t(t.table[block]) * BLOCK * dim, at_next = int64_t(t.table[next]) * BLOCK * dim;
      k[j] = k_head + at, v[j] = v_head + at, k_next[j] = k_head + at_next, v_next[j] = v_head + at_next;
    }
    // Keys of this tile that the last token of a panel reads.
    auto keys_of = [&](int first, int r) {
      int keys = t.position + (first + r - 1) / t.heads + 1 - key;
      return keys > KEY_TILE ? KEY_TILE : keys;
    };
    for (int first = 0; first < rows; first += PANEL) {
      int r = rows - first < PANEL ? rows - first : PANEL, keys = keys_of(first, r);
      if (keys <= 0) continue;
      int blocks = (keys + BLOCK - 1) / BLOCK;
      kernels.scores[r](q + first * dim, k, k_next, blocks, dim, p + first * KEY_TILE);
      for (int i = first; i < first + r; ++i) {
        int valid = t.position + i / t.heads + 1 - key;
        if (valid > KEY_TILE) valid = KEY_TILE;
        float correction = softmax_tile(p + i * KEY_TILE, valid, blocks, maximum + i, total + i);
        if (correction != 1.0f)
          for (int64_t d = 0; d < dim; d += W) store(sums + i * dim + d, load(sums + i * dim + d) * correction);
      }
    }
    for (int first = 0; first < rows; first += PANEL) {
      int r = rows - first < PANEL ? rows - first : PANEL, keys = keys_of(first, r);
      if (keys > 0) kernels.values[r](p + first * KEY_TILE, v, v_next, keys, dim, sums + first * dim);
    }
  }
  for (int i = 0; i < rows; ++i) {
    float* to = a.out + (t.row + i / t.heads) * a.out_stride + (t.head + i % t.heads) * dim;
    float inverse = 1.0f / total[i];
    for (int64_t d = 0; d < dim; d += W) store(to + d, load(sums + i * dim + d) * inverse);
  }
}

}  // namespace
