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

// Not to be contracted with what it came from: attention8.h keeps scores in memory.
EVENER_INLINE vf rounded_off(vf x) {
  asm("" : "+v"(x));
  return x;
}

constexpr int HALVES = 2 * KEY_TILE;  // bytes of a row's weights

// A row's weights as bytes, high ones and low ones: by fours of keys, first those of all blocks, then the next four of each, as
// packing leaves them.
EVENER_INLINE void store_packed(const vi (&n)[KEY_TILE / BLOCK], uint8_t* to) {
  const __m512i front = _mm512_packus_epi32((__m512i)n[0], (__m512i)n[1]), back = _mm512_packus_epi32((__m512i)n[2], (__m512i)n[3]);
  const __m512i low = _mm512_set1_epi16(255);
  _mm512_storeu_si512(to, _mm512_packus_epi16(_mm512_srli_epi16(front, 8), _mm512_srli_epi16(back, 8)));
  _mm512_storeu_si512(to + KEY_TILE, _mm512_packus_epi16(_mm512_and_si512(front, low), _mm512_and_si512(back, low)));
}

// What becomes of G rows of a panel, from row i on: each step for all of them before the next, as the steps of one row wait
// for each other. `first`: the panel's first row in the tile.
template <int BLOCKS, int G>
EVENER_INLINE void amx8_rows(const HalfSums* sums, const float* q_scale, const vf (&k_scale)[BLOCKS], const vf (&v_scale)[BLOCKS],
                            const AttentionTile& t, int key, int first, int i, int64_t dim, const Running& run, uint8_t* halves,
                            float* p_scale) {
  vf s[G][BLOCKS];
  float top[G], maximum[G];
  EVENER_UNROLL for (int g = 0; g < G; ++g) {
    EVENER_UNROLL for (int j = 0; j < BLOCKS; ++j)
      s[g][j] = rounded_off(sums[j].total(i + g) * k_scale[j] * q_scale[i + g]);
    const int valid = keys_read(t, first + i + g, key);
    if (valid < BLOCKS * BLOCK)
      EVENER_UNROLL for (int j = 0; j < BLOCKS; ++j)
        s[g][j] = lane_index() + set1i(j * BLOCK) < valid ? s[g][j] : set1(-__builtin_inff());
    vf largest = s[g][0];
    EVENER_UNROLL for (int j = 1; j < BLOCKS; ++j) largest = vmax(s[g][j], largest);
    top[g] = hmax(largest);
  }
  vf total[G] = {}, most[G] = {};
  vi lost[G] = {};
  EVENER_UNROLL for (int g = 0; g < G; ++g) {
    const float before = run.maximum[first + i + g];
    maximum[g] = top[g] > before || top[g] != top[g] ? top[g] : before;  // NaN spreads
    EVENER_UNROLL for (int j = 0; j < BLOCKS; ++j) {
      vf p = exp2_vec(s[g][j] - maximum[g]);
      total[g] += p;
      s[g][j] = p == 0.0f ? vf{} : p * v_scale[j];
      most[g] = vmax(most[g], s[g][j]);
      lost[g] |= !(s[g][j] < 3e38f);
    }
  }
  EVENER_UNROLL for (int g = 0; g < G; ++g) {
    const float step = hmax(most[g]) / 65535.0f, inverse = inverse_of(step);
    uint8_t* to = halves + (i + g) * HALVES;
    vi n[KEY_TILE / BLOCK] = {};
    EVENER_UNROLL for (int j = 0; j < BLOCKS; ++j) n[j] = rounded(s[g][j] * inverse);
    store_packed(n, to);
    p_scale[i + g] = any(lost[g]) ? __builtin_nanf("") : step;
  }
  EVENER_UNROLL for (int g = 0; g < G; ++g) {
    const int row = first + i + g;
    const float before = run.maximum[row];
    if (maximum[g] != before) {
      const float correction = exp2_vec(set1(before - maximum[g]))[0];
      run.maximum[row] = maximum[g];
      run.sum[row] *= correction;
      float* out = run.out + row * dim;
      for (int64_t d = 0; d < dim; d += W) store(out + d, load(out + d) * correction);
    }
    run.sum[row] += hsum(total[g]);
  }
}

// The scores of a key tile to weights, and these times their values' scales to integers, [rows][2][KEY_TILE] bytes: what
// scores8_of, softmax and weight_halves do one after the other, in registers.
template <int BLOCKS>
EVENER_OUTLINE void amx8_weights(const HalfSums* sums, const float* q_scale, const TileBlocks<int8_t>& at, const AttentionTile& t,
                                int key, int first, int rows, int64_t dim, const Running& run, uint8_t* halves, float* p_scale) {
  vf k_scale[BLOCKS], v_scale[BLOCKS];
  EVENER_UNROLL for (int j = 0; j < BLOCKS; ++j) {
    k_scale[j] = load(scales_of(at.k[j], dim));
    v_scale[j] = load(scales_of(at.v[j], dim));
  }
  int i = 0;
  for (; i < rows && keys_read(t, first + i, key) <= 0; ++i) {  // later rows read more
    __builtin_memset(halves + i * HALVES, 0, HALVES);
    p_scale[i] = 0.0f;
  }
  for (; i + 4 <= rows; i += 4)
    amx8_rows<BLOCKS, 4>(sums, q_scale, k_scale, v_scale, t, key, first, i, dim, run, halves, p_scale);
  for (; i < rows; ++i)
    amx8_rows<BLOCKS, 1>(sums, q_scale, k_scale, v_scale, t, key, first, i, dim, run, halves, p_scale);
}

constexpr decltype(&amx8_weights<1>) AMX8_WEIGHTS[] = {amx8_weights<1>, amx8_weights<2>, amx8_weights<3>, amx8_weights<4>};

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

  // In the last panel, rows that are not there are multiplied as well, whatever they hold.
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
      AMX8_WEIGHTS[blocks - 1](sums, q_scale + first, at, t, key, first, r, dim, run, halves + first * HALVES, p_scale + first);
      amx8_values(halves + first * HALVES, p_scale + first, values, r, dim, run.out + first * dim);
    }
  }
  tile_release();
  write_out(a, t, run, rows);
}

}  // namespace
