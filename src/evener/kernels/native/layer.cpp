#include "layer.h"

#include <algorithm>
#include <cstring>

#include "aligned.h"
#include "pool.h"

namespace evener {
namespace {

// Rows that pass through a half together: what lies between two products then stays in the second-level cache.
constexpr int64_t BLOCK_ROWS = 64;
// So many rows per thread are enough for each to take its own through a half, without waiting for another between two
// products. It reads all weights then, where threads that share rows read a part of them each: with fewer rows that
// counts for more.
constexpr int64_t OWN_ROWS = 32;
constexpr int64_t TILE_ROWS = 16;  // of a tile register

thread_local Aligned between;  // what lies between two products, of whoever computes the block

// body(first, count) over blocks of rows of nearly equal size, each on one thread, or all threads in one.
template <typename F>
void over_blocks(int64_t rows, F&& body) {
  int64_t n = threads();
  if (n > 1 && rows >= OWN_ROWS * n) {
    int64_t blocks = (rows + BLOCK_ROWS * n - 1) / (BLOCK_ROWS * n) * n;
    auto border = [&](int64_t b) { return b == blocks ? rows : rows * b / blocks / TILE_ROWS * TILE_ROWS; };
    return parallel_for(blocks, [&](int64_t b) {
      if (int64_t count = border(b + 1) - border(b)) body(border(b), count);
    });
  }
  int64_t most = BLOCK_ROWS * n, blocks = (rows + most - 1) / most;
  for (int64_t b = 0; b < blocks; ++b) {
    int64_t first = rows * b / blocks;
    body(first, rows * (b + 1) / blocks - first);
  }
}

// What a part that computes nothing adds to the sum over its group, and x += delta as always.
void nothing(const Matrix& w, int64_t size, int64_t rows, float* x, const float* delta, float* out) {
  if (delta)
    for (int64_t i = 0; i < rows * size; ++i) x[i] += delta[i];
  for (int64_t r = 0; r < rows; ++r, out += size)
    if (w.bias)
      std::copy(w.bias, w.bias + size, out);
    else
      std::fill(out, out + size, 0.0f);
}

void product(const Matrix& w, const float* x, int64_t rows, float* out) {
  if (w.kind == Matrix::Kind::INT8)
    gemm8({nullptr, nullptr, nullptr, static_cast<const int8_t*>(w.packed), w.bias, out, rows, w.n, w.k, w.group, w.n}, x, w.k);
  else
    gemm({x, w.bias, w.packed, out, rows, w.n, w.k, w.k, w.n}, w.kind == Matrix::Kind::BF16);
}

}  // namespace

void Layers::attention(int64_t layer, const RowsArgs& b, float* x, const float* delta, float* out) const {
  const LayerArgs& w = layers_.at(layer);
  const ShardArgs& s = shard_;
  if (!s.n_q) return nothing(w.o, s.hidden, b.rows, x, delta, out);
  const int64_t hidden = s.hidden, width = s.n_q * s.head_dim, fused = (s.n_q + 2 * s.n_kv) * s.head_dim;
  check_rope(b.positions, b.kv_slot, b.real, s.max_position, s.blocks * BLOCK);  // before anything is written
  thread_local Aligned room;
  float *q = room.at_least(2 * b.rows * width), *heads = q + b.rows * width;
  over_blocks(b.rows, [&](int64_t first, int64_t count) {
    float *normed = between.at_least(count * (hidden + fused)), *qkv = normed + count * hidden;
    float* residual = x + first * hidden;
    norm({delta ? delta + first * hidden : residual, delta ? residual : nullptr, w.attn_norm, normed, 1, hidden, hidden, 0,
          hidden, 0, hidden, s.eps},
         count);
    product(w.qkv, normed, count, qkv);
    int64_t real = std::min(count, b.real - first);
    if (real > 0)
      rope({qkv, s.cos, s.sin, b.positions + first, b.kv_slot + first, w.k_slab, w.v_slab, q + first * width, w.q_norm,
            w.k_norm, fused, width, s.slab_head_stride, s.n_q, s.n_kv, s.head_dim, s.eps},
           s.kv, real);
  });
  evener::attention({q, w.k_slab, w.v_slab, heads, width, width, s.slab_head_stride, s.head_dim, s.scale}, s.kv,
                    {b.cu, b.start, b.tables, s.kv_of_head, b.sequences, b.table_width, s.n_q, s.n_kv, s.blocks, b.real});
  const int64_t written = b.cu[b.sequences];  // checked by then
  std::memset(heads + written * width, 0, (b.rows - written) * width * sizeof(float));
  over_blocks(b.rows, [&](int64_t first, int64_t count) {
    product(w.o, heads + first * width, count, out + first * hidden);
  });
}

void Layers::mlp(int64_t layer, const RowsArgs& b, float* x, const float* delta, float* out) const {
  const LayerArgs& w = layers_.at(layer);
  const ShardArgs& s = shard_;
  if (!s.ffn) return nothing(w.down, s.hidden, b.rows, x, delta, out);
  const int64_t hidden = s.hidden;
  over_blocks(b.rows, [&](int64_t first, int64_t count) {
    float* normed = between.at_least(count * (hidden + 3 * s.ffn));
    float *gate_up = normed + count * hidden, *act = gate_up + count * 2 * s.ffn;
    norm({delta + first * hidden, x + first * hidden, w.mlp_norm, normed, 1, hidden, hidden, 0, hidden, 0, hidden, s.eps},
         count);
    product(w.gate_up, normed, count, gate_up);
    silu_mul({gate_up, act, s.ffn, 2 * s.ffn, s.ffn}, count);
    product(w.down, act, count, out + first * hidden);
  });
}

bool Layers::run(const RowsArgs& b, float* x, const Peers* peers, int64_t* stamps) const {
  thread_local Aligned room;
  const int64_t size = b.rows * shard_.hidden;
  float *attn = room.at_least(2 * size), *down = attn + size;
  auto sum = [&](float* part) {
    if (!peers) return true;
    bool done = peers->sum(peers->group, {part, uint64_t(size), peers->floor_ns, stamps});
    stamps += Peers::STAMP;
    return done;
  };
  for (int64_t i = 0; i < count(); ++i) {
    attention(i, b, x, i ? down : nullptr, attn);
    if (!sum(attn)) return false;
    mlp(i, b, x, attn, down);
    if (!sum(down)) return false;
  }
  if (count())
    for (int64_t i = 0; i < size; ++i) x[i] += down[i];
  return true;
}

}  // namespace evener
