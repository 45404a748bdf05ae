// Causal attention over a paged KV cache: online softmax (Milakov and Gimelshein 2018; FlashAttention-2) by tiles of
// (token, head) rows that share a KV head.
//
// The arithmetic of a row is the same in every tile: keys in tiles of KEY_TILE at absolute positions; scores summed over
// the head dimension in order; values summed over keys in order; masked keys have weight exactly 0. So a row's result
// does not depend on its neighbours, on how its prompt was cut into chunks, or on the number of threads.
//
// T is what the cache holds: float, bf16, or int8_t with a scale per token. A key's scale multiplies its score, a value's
// its weight, so that products are of the integers themselves.
#pragma once

namespace {

using namespace evener;

// Register tile: R rows x the 16 keys of a block (scores), or x 16 columns (values). More blocks or columns at a time
// when rows are few, to keep enough independent sums in flight.
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

// sum[r][v] += of_row(r) * of_column(v), holding the fewer of the two in registers beside the sums.
template <int R, int V, typename Row, typename Column>
EVENER_INLINE void outer_product(vf (&sum)[R][V], Row&& of_row, Column&& of_column) {
  if constexpr (R >= V) {
    vf column[V];
    EVENER_UNROLL for (int v = 0; v < V; ++v) column[v] = of_column(v);
    EVENER_UNROLL for (int r = 0; r < R; ++r) {
      vf row = of_row(r);
      EVENER_UNROLL for (int v = 0; v < V; ++v) sum[r][v] += row * column[v];
    }
  } else {
    vf row[R];
    EVENER_UNROLL for (int r = 0; r < R; ++r) row[r] = of_row(r);
    EVENER_UNROLL for (int v = 0; v < V; ++v) {
      vf column = of_column(v);
      EVENER_UNROLL for (int r = 0; r < R; ++r) sum[r][v] += row[r] * column;
    }
  }
}

EVENER_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// W keys of a block, from the W-th `lane` on, at element d: K is [D][16], in int8 [D / 4][16][4].
template <typename T>
EVENER_INLINE vf keys_at(const T* block, int64_t d, int lane) {
  return load(block + d * BLOCK + lane * W);
}

// W elements of a block's value of `token`, from `column` on: V is [16][D], in int8 [16 / 4][D][4].
template <typename T>
EVENER_INLINE vf values_at(const T* block, int64_t token, int64_t dim, int64_t column) {
  return load(block + token * dim + column);
}

// Byte `at` of W words of four.
EVENER_INLINE vf byte_of(const int8_t* words, int64_t at) {
  vi v;
  __builtin_memcpy(&v, words, sizeof v);
  return __builtin_convertvector(v << int32_t(24 - 8 * at) >> 24, vf);
}

template <>
inline __attribute__((always_inline)) vf keys_at<int8_t>(const int8_t* block, int64_t d, int lane) {
  return byte_of(block + (d / 4 * BLOCK + lane * W) * 4, d % 4);
}

template <>
inline __attribute__((always_inline)) vf values_at<int8_t>(const int8_t* block, int64_t token, int64_t dim, int64_t column) {
  return byte_of(block + (token / 4 * dim + column) * 4, token % 4);
}

// Runs of 16 elements in a cache line.
template <typename T>
constexpr int RUNS = 4 / sizeof(T);

// The scales of a block's 16 tokens (int8).
EVENER_INLINE const float* scales_of(const int8_t* block, int64_t dim) {
  return reinterpret_cast<const float*>(block + BLOCK * dim);
}

// s[r][16 j + key] = sum_d q[d][r] * k[j][d][key] for blocks j in [0, N). `next` (or nullptr): blocks to fetch ahead.
template <int R, int N, bool AHEAD, typename T>
EVENER_INLINE void scores_of(const float* q, const T* const* k, const T* const* next, int64_t dim, float* s) {
  vf sum[R][N * LANES] = {};
  if (AHEAD && sizeof(T) == 1) {
    EVENER_UNROLL for (int j = 0; j < N; ++j) prefetch(next[j] + dim * BLOCK);
  }
  for (int64_t run = 0; run < dim; run += RUNS<T>) {
    if (AHEAD) {
      EVENER_UNROLL for (int j = 0; j < N; ++j) prefetch(next[j] + run * BLOCK);
    }
    EVENER_UNROLL for (int64_t d = run; d < run + RUNS<T>; ++d)
      outer_product(
          sum, [&](int r) EVENER_INLINED { return set1(q[d * R + r]); },
          [&](int v) EVENER_INLINED { return keys_at(k[v / LANES], d, v % LANES); });
  }
  if constexpr (sizeof(T) == 1) {
    EVENER_UNROLL for (int v = 0; v < N * LANES; ++v) {
      vf scale = load(scales_of(k[v / LANES], dim) + v % LANES * W);
      EVENER_UNROLL for (int r = 0; r < R; ++r) sum[r][v] *= scale;
    }
  }
  EVENER_UNROLL for (int r = 0; r < R; ++r) {
    EVENER_UNROLL for (int v = 0; v < N * LANES; ++v) store(s + r * KEY_TILE + v * W, sum[r][v]);
  }
}

template <int R, bool AHEAD, typename T>
void scores(const float* q, const T* const* k, const T* const* next, int blocks, int64_t dim, float* s) {
  constexpr int N = wide(R);
  int j = 0;
  for (; j + N <= blocks; j += N) scores_of<R, N, AHEAD, T>(q, k + j, next + j, dim, s + j * BLOCK);
  if (N > 1)
    for (; j < blocks; ++j) scores_of<R, 1, AHEAD, T>(q, k + j, next + j, dim, s + j * BLOCK);
}

// out[r][d] += sum_key p[r][key] * v[key][d] for 16 N columns from d = first.
template <int R, int N, bool AHEAD, typename T>
EVENER_INLINE void values_of(const float* p, const T* const* v, const T* const* next, int keys, int64_t dim, int64_t first,
                             float* out) {
  vf sum[R][N * LANES];
  EVENER_UNROLL for (int r = 0; r < R; ++r) {
    EVENER_UNROLL for (int c = 0; c < N * LANES; ++c) sum[r][c] = load(out + r * dim + first + c * W);
  }
  int64_t key = 0;
  do {  // at least one key: with a test before the loop gcc spills the sums
    if (AHEAD && key % RUNS<T> == 0) {  // as many lines as are read, but in the order of memory
      const T* ahead = next[key / BLOCK] + first * BLOCK + key % BLOCK * (16 * N);
      EVENER_UNROLL for (int c = 0; c < N; ++c) prefetch(ahead + c * 16 * RUNS<T>);
    }
    outer_product(
        sum, [&](int r) EVENER_INLINED { return set1(p[r * KEY_TILE + key]); },
        [&](int c) EVENER_INLINED { return values_at(v[key / BLOCK], key % BLOCK, dim, first + c * W); });
  } while (++key < keys);
  EVENER_UNROLL for (int r = 0; r < R; ++r) {
    EVENER_UNROLL for (int c = 0; c < N * LANES; ++c) store(out + r * dim + first + c * W, sum[r][c]);
  }
}

template <int R, bool AHEAD, typename T>
void values(const float* p, const T* const* v, const T* const* next, int keys, int64_t dim, float* out) {
  constexpr int N = wide(R);
  int64_t d = 0;
  for (; d + 16 * N <= dim; d += 16 * N) values_of<R, N, AHEAD, T>(p, v, next, keys, dim, d, out);
  if (N > 1)
    for (; d < dim; d += 16) values_of<R, 1, AHEAD, T>(p, v, next, keys, dim, d, out);
}

constexpr int FEW = 6;

template <typename T>
struct PanelKernels {
  typedef void (*Kernel)(const float*, const T* const*, const T* const*, int, int64_t, float*);
  Kernel scores[PANEL + 1], values[PANEL + 1];
};

template <int R, bool AHEAD, typename T>
constexpr void fill(PanelKernels<T>& k) {
  if constexpr (R > 0) {
    k.scores[R] = scores<R, AHEAD && R <= FEW, T>;
    k.values[R] = values<R, AHEAD && R <= FEW, T>;
    fill<R - 1, AHEAD>(k);
  }
}

template <bool AHEAD, typename T>
constexpr PanelKernels<T> panels() {
  PanelKernels<T> k{};
  fill<PANEL, AHEAD>(k);
  return k;
}

// The first panel to use a tile of keys fetches the next tile meanwhile: a decoding row reads each key once, from memory.
// With more rows than a few memory keeps up by itself.
template <typename T>
constexpr PanelKernels<T> COLD = panels<true, T>();
template <typename T>
constexpr PanelKernels<T> WARM = panels<false, T>();

// A row of a key tile: hide the scores from `valid` on, and return the maximum of the others (valid >= 1).
EVENER_INLINE float maximum_of(float* s, int valid, int blocks) {
  for (int i = valid / W * W; i < blocks * BLOCK; i += W)
    store(s + i, lane_index() + set1i(i) < valid ? load(s + i) : set1(-__builtin_inff()));
  vf top = load(s);
  for (int i = W; i < blocks * BLOCK; i += W) top = vmax(load(s + i), top);
  return hmax(top);
}

// Scores (in base 2) to weights, in place; returns their sum.
EVENER_INLINE float weigh(float* s, int blocks, float maximum) {
  vf total[LANES] = {};
  for (int i = 0; i < blocks * BLOCK; i += BLOCK) {
    EVENER_UNROLL for (int v = 0; v < LANES; ++v) {
      vf p = exp2_vec(load(s + i + v * W) - maximum);
      total[v] += p;
      store(s + i + v * W, p);
    }
  }
  EVENER_UNROLL for (int v = 1; v < LANES; ++v) total[0] += total[v];
  return hsum(total[0]);
}

// The running maximum and sum of each row of a tile, and its unnormalised output.
struct Running {
  float *maximum, *sum, *out;
};

// Online softmax of one key tile for rows [first, end) of `s`. `valid_of(i)`: keys that row i reads; KEY_TILE or more: all.
template <typename Valid>
EVENER_INLINE void softmax(float* s, int first, int end, int blocks, int64_t dim, const Running& run, Valid&& valid_of) {
  float now[PANEL];
  // Two passes, so that the latencies of several rows overlap.
  for (int i = first; i < end; ++i) {
    int valid = valid_of(i);
    now[i - first] = run.maximum[i];
    if (valid <= 0) continue;
    float top = maximum_of(s + i * KEY_TILE, valid < KEY_TILE ? valid : KEY_TILE, blocks);
    if (top > run.maximum[i] || top != top) now[i - first] = top;  // NaN spreads
  }
  for (int i = first; i < end; ++i) {
    float* row = s + i * KEY_TILE;
    if (valid_of(i) <= 0) {
      __builtin_memset(row, 0, blocks * BLOCK * sizeof(float));
      continue;
    }
    float maximum = now[i - first], before = run.maximum[i], sum = weigh(row, blocks, maximum);
    if (maximum != before) {
      float correction = exp2_vec(set1(before - maximum))[0];
      run.maximum[i] = maximum;
      run.sum[i] *= correction;
      for (int64_t d = 0; d < dim; d += W) store(run.out + i * dim + d, load(run.out + i * dim + d) * correction);
    }
    run.sum[i] += sum;
  }
}

// Rows of a panel, so that the panels of a tile are of nearly equal height.
EVENER_INLINE int panel_height(int rows) {
  int panels = (rows + PANEL - 1) / PANEL;
  return (rows + panels - 1) / panels;
}

// Keys that row i of a tile reads of the key tile that begins at `key`; none if that is 0 or less.
EVENER_INLINE int keys_read(const AttentionTile& t, int i, int key) {
  int keys = t.position + i / t.heads + 1 - key;
  return keys > KEY_TILE ? KEY_TILE : keys;
}

// Where the blocks of a key tile are, and those of the next one.
template <typename T>
struct TileBlocks {
  const T *k[KEY_TILE / BLOCK], *v[KEY_TILE / BLOCK], *k_next[KEY_TILE / BLOCK], *v_next[KEY_TILE / BLOCK];

  TileBlocks(const AttentionArgs& a, const AttentionTile& t, int key) {
    const bool last = key + KEY_TILE >= t.position + t.tokens;
    const AttentionTile& then = last && t.next ? *t.next : t;
    for (int j = 0; j < KEY_TILE / BLOCK; ++j) {
      int64_t at = place(a, t, key / BLOCK + j), next = place(a, then, last ? j : key / BLOCK + j + KEY_TILE / BLOCK);
      k[j] = static_cast<const T*>(a.k_slab) + at, v[j] = static_cast<const T*>(a.v_slab) + at;
      k_next[j] = static_cast<const T*>(a.k_slab) + next, v_next[j] = static_cast<const T*>(a.v_slab) + next;
    }
  }

  // Where a block of a tile's sequence is in a slab; past the last one, that one.
  static int64_t place(const AttentionArgs& a, const AttentionTile& t, int block) {
    int last = (t.position + t.tokens - 1) / BLOCK;
    return t.kv_head * a.slab_head_stride + t.table[block < last ? block : last] * block_elements<T>(a.head_dim);
  }
};

// The rows of a tile to where they belong, normalised.
EVENER_INLINE void write_out(const AttentionArgs& a, const AttentionTile& t, const Running& run, int rows) {
  const int64_t dim = a.head_dim;
  for (int i = 0; i < rows; ++i) {
    float* to = a.out + (t.row + i / t.heads) * a.out_stride + (t.head + i % t.heads) * dim;
    float inverse = 1.0f / run.sum[i];
    for (int64_t d = 0; d < dim; d += W) store(to + d, load(run.out + i * dim + d) * inverse);
  }
}

template <typename T>
void attention_tile(const AttentionArgs& a, const AttentionTile& t, float* scratch) {
  const int64_t dim = a.head_dim;
  const int rows = t.tokens * t.heads;
  const int panel = panel_height(rows);
  float *q = scratch, *p = q + MAX_ROWS * dim;
  Running run;
  run.out = p + MAX_ROWS * KEY_TILE;
  run.maximum = run.out + MAX_ROWS * dim;
  run.sum = run.maximum + MAX_ROWS;
  const float scale = a.scale * 1.44269504f;  // scores in base 2

  for (int i = 0; i < rows; ++i) {  // queries by panels, transposed
    int first = i / panel * panel, r = rows - first < panel ? rows - first : panel;
    const float* from = a.q + (t.row + i / t.heads) * a.q_stride + (t.head + i % t.heads) * dim;
    float* to = q + first * dim + (i - first);
    for (int64_t d = 0; d < dim; ++d) to[d * r] = from[d] * scale;
    run.maximum[i] = -__builtin_inff();
    run.sum[i] = 0.0f;
  }
  __builtin_memset(run.out, 0, rows * dim * sizeof(float));

  const int limit = t.position + t.tokens;  // keys the last token reads
  for (int key = 0; key < limit; key += KEY_TILE) {
    const TileBlocks<T> at(a, t, key);
    const T *const *k = at.k, *const *v = at.v, *const *k_next = at.k_next, *const *v_next = at.v_next;
    for (int first = 0; first < rows; first += panel) {
      int r = rows - first < panel ? rows - first : panel, keys = keys_read(t, first + r - 1, key);
      if (keys <= 0) continue;
      int blocks = (keys + BLOCK - 1) / BLOCK;
      (first ? WARM<T> : COLD<T>).scores[r](q + first * dim, k, k_next, blocks, dim, p + first * KEY_TILE);
      softmax(p, first, first + r, blocks, dim, run, [&](int i) { return keys_read(t, i, key); });
      if constexpr (sizeof(T) == 1) {
        for (int j = 0; j < blocks * LANES; ++j) {
          vf scale = load(scales_of(v[j / LANES], dim) + j % LANES * W);
          for (int i = first; i < first + r; ++i) store(p + i * KEY_TILE + j * W, load(p + i * KEY_TILE + j * W) * scale);
        }
      }
    }
    for (int first = 0; first < rows; first += panel) {
      int r = rows - first < panel ? rows - first : panel, keys = keys_read(t, first + r - 1, key);
      if (keys > 0)
        (first ? WARM<T> : COLD<T>).values[r](p + first * KEY_TILE, v, v_next, keys, dim, run.out + first * dim);
    }
  }
  write_out(a, t, run, rows);
}

}  // namespace
