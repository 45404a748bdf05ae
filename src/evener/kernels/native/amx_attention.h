// Attention over a KV cache in int8 by tile products, for prompts: as attention8.h, to the same bits. A block of keys is a
// tile already, [dim / 4][16 keys][4]; the values of a key tile are brought into tiles of 16 columns first, once for all its
// rows. Queries and weights are the two bytes of 16-bit integers, as there; a query's high byte bears its sign, so that no
// offset is to be taken off its sums.
#pragma once

namespace {

using namespace evener;

static_assert(KEY_TILE == 64 && BLOCK == TILE && MAX_ROWS % TILE == 0, "a key tile is the depth of a tile product");

template <int SUM, int X, int WEIGHT>
EVENER_INLINE void tile_dot8_signed() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(X), "i"(WEIGHT));
}

constexpr int64_t DEPTH = 64;    // inputs of a tile product
constexpr int LEAST_ROWS8 = 10;  // with fewer a product takes as long as with 16, and attention8_tile is done sooner

// The bytes of up to TILE rows in tiles 0 (high) and 1 (low); for every other product of theirs sums in 2 and 3, what they
// are multiplied by in 4; for the others in 5, 6 and 7.
constexpr int HIGH = 0, LOW = 1;

struct HalfSums {
  int32_t high[TILE * W], low[TILE * W];

  EVENER_INLINED vf total(int row) const {
    vi h, l;
    __builtin_memcpy(&h, high + row * W, sizeof h), __builtin_memcpy(&l, low + row * W, sizeof l);
    return __builtin_convertvector((h << 8) + l, vf);
  }
};

// sums[j] = q * k[j], of 16 rows and the 16 keys of a block. q: [rows][2][dim] bytes.
EVENER_INLINE void amx8_scores(const uint8_t* q, const int8_t* const* k, int blocks, int64_t dim, HalfSums* sums) {
  auto load_query = [&](int64_t d) EVENER_INLINED {
    tile_load<HIGH>(q + d, 2 * dim);
    tile_load<LOW>(q + dim + d, 2 * dim);
  };
  auto multiply = [&](int j, auto odd) EVENER_INLINED {
    constexpr int SUM = 2 + 3 * decltype(odd)::value, KEYS = SUM + 2;
    tile_zero<SUM>(), tile_zero<SUM + 1>();
    for (int64_t d = 0; d < dim; d += DEPTH) {
      if (dim > DEPTH) load_query(d);
      tile_load<KEYS>(k[j] + d * BLOCK, 64);
      tile_dot8_signed<SUM, HIGH, KEYS>();
      tile_dot8<SUM + 1, LOW, KEYS>();
    }
    tile_store<SUM>(sums[j].high, W * 4);
    tile_store<SUM + 1>(sums[j].low, W * 4);
  };
  if (dim == DEPTH) load_query(0);
  for (int j = 0; j < blocks; j += 2) {
    multiply(j, Rows<0>());
    if (j + 1 < blocks) multiply(j + 1, Rows<1>());
  }
}

// The scores of a key tile to weights, over the sums' high halves once they are read. BLOCKS of 0: all of them, and every row reads all keys.
template <int BLOCKS>
EVENER_OUTLINE void amx8_weights(HalfSums* sums, const float* q_scale, const TileBlocks<int8_t>& at, const AttentionTile& t, int key,
                                int first, int rows, int64_t dim, const Running& run, uint8_t* halves, float* p_scale) {
  constexpr int N = BLOCKS ? BLOCKS : KEY_TILE / BLOCK;
  vf scale[N];
  EVENER_UNROLL for (int j = 0; j < N; ++j) scale[j] = load(scales_of(at.k[j], dim));
  auto score = [&](int r, int j) EVENER_INLINED { return sums[j].total(r) * scale[j]; };
  const Scores8 s{reinterpret_cast<float*>(sums->high), W, sizeof(HalfSums) / sizeof(float)};
  weights8<TILE, N, BLOCKS == 0>(score, s, q_scale, at, t, key, first, rows, dim, run, halves, p_scale);
}

constexpr decltype(&amx8_weights<1>) AMX8_WEIGHTS[] = {amx8_weights<0>, amx8_weights<1>, amx8_weights<2>, amx8_weights<3>,
                                                      amx8_weights<4>};

// The values of a key tile as tiles, [dim / 16][KEY_TILE / 4][16][4], keys in the order of store_packed; those of blocks that
// are not there stay what they were.
EVENER_OUTLINE void gather_values(const int8_t* const* v, int blocks, int64_t dim, int8_t* tiles) {
  for (int j = 0; j < blocks; ++j)
    for (int i = 0; i < BLOCK / 4; ++i)
      for (int64_t c = 0; c < dim / TILE; ++c)
        __builtin_memcpy(tiles + (c * (KEY_TILE / 4) + i * (KEY_TILE / BLOCK) + j) * 64, v[j] + (i * dim + c * TILE) * 4, 64);
}

// out[r] += p[r] * values, scaled, as values8_of.
EVENER_OUTLINE void amx8_values(const uint8_t* halves, const float* p_scale, const int8_t* tiles, int rows, int64_t dim, float* out) {
  alignas(64) HalfSums sums[2];
  tile_load<HIGH>(halves, HALVES);
  tile_load<LOW>(halves + KEY_TILE, HALVES);
  auto multiply = [&](int64_t c, auto odd) EVENER_INLINED {
    constexpr int SUM = 2 + 3 * decltype(odd)::value, VALUES = SUM + 2;
    tile_zero<SUM>(), tile_zero<SUM + 1>();
    tile_load<VALUES>(tiles + c * KEY_TILE * TILE, 64);
    tile_dot8<SUM, HIGH, VALUES>();
    tile_dot8<SUM + 1, LOW, VALUES>();
    tile_store<SUM>(sums[decltype(odd)::value].high, W * 4);
    tile_store<SUM + 1>(sums[decltype(odd)::value].low, W * 4);
  };
  auto add = [&](int64_t c, const HalfSums& of) EVENER_INLINED {
    for (int r = 0; r < rows; ++r) {
      float* to = out + r * dim + c * TILE;
      store(to, load(to) + of.total(r) * p_scale[r]);
    }
  };
  const int64_t columns = dim / TILE;  // of tiles: even
  for (int64_t c = 0; c < columns; c += 2) {
    multiply(c, Rows<0>());
    multiply(c + 1, Rows<1>());
    add(c, sums[0]);
    add(c + 1, sums[1]);
  }
}

void amx8_attention(const AttentionArgs& a, const AttentionTile& t, float* scratch) {
  const int64_t dim = a.head_dim;
  const int rows = t.tokens * t.heads;
  if (rows < LEAST_ROWS8 || dim % DEPTH || dim > MAX_DIM8) return attention8_tile(a, t, scratch);
  uint8_t* q = reinterpret_cast<uint8_t*>(scratch);
  uint8_t* halves = reinterpret_cast<uint8_t*>(scratch + MAX_ROWS * dim);
  Running run;
  run.out = scratch + MAX_ROWS * (dim + KEY_TILE);
  run.maximum = run.out + MAX_ROWS * dim;
  run.sum = run.maximum + MAX_ROWS;
  float *q_scale = run.sum + MAX_ROWS, *p_scale = q_scale + MAX_ROWS;
  int8_t* values = reinterpret_cast<int8_t*>(p_scale + MAX_ROWS);  // of a key tile
  const float scale = a.scale * 1.44269504f;  // scores in base 2
  for (int i = 0; i < rows; ++i) {
    const float* from = a.q + (t.row + i / t.heads) * a.q_stride + (t.head + i % t.heads) * dim;
    q_scale[i] = query_halves(from, scale, dim, 0, q + i * 2 * dim, q + i * 2 * dim + dim);
    run.maximum[i] = -__builtin_inff();
    run.sum[i] = 0.0f;
  }
  __builtin_memset(run.out, 0, rows * dim * sizeof(float));
  // In the last panel, rows that are not there are multiplied as well: as zeros.
  __builtin_memset(q + rows * 2 * dim, 0, (rows + TILE - 1) / TILE * TILE * 2 * dim - rows * 2 * dim);
  for (int i = rows; i < MAX_ROWS; ++i) q_scale[i] = 0.0f;
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.set(tile, TILE);
  config.load();

  alignas(64) HalfSums sums[KEY_TILE / BLOCK];
  const int limit = t.position + t.tokens;
  for (int key = 0; key < limit; key += KEY_TILE) {
    const TileBlocks<int8_t> at(a, t, key);
    gather_values(at.v, (keys_read(t, rows - 1, key) + BLOCK - 1) / BLOCK, dim, values);
    for (int first = 0; first < rows; first += TILE) {
      const int r = rows - first < TILE ? rows - first : TILE, keys = keys_read(t, first + r - 1, key);
      if (keys <= 0) continue;
      const int blocks = (keys + BLOCK - 1) / BLOCK;
      amx8_scores(q + first * 2 * dim, at.k, blocks, dim, sums);
      const bool whole = keys_read(t, first, key) == KEY_TILE;  // later rows read more
      AMX8_WEIGHTS[whole ? 0 : blocks](sums, q_scale + first, at, t, key, first, r, dim, run, halves + first * HALVES, p_scale + first);
      amx8_values(halves + first * HALVES, p_scale + first, values, r, dim, run.out + first * dim);
    }
  }
  tile_release();
  write_out(a, t, run, rows);
}

}  // namespace
