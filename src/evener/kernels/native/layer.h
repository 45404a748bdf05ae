// Whole halves of a decoder layer, so that a batch costs a few calls and not a few hundred.
#pragma once
#include <vector>

#include "launch.h"

namespace evener {

// A packed weight [n, k] and its bias (nullptr: none). `group`: inputs that share a scale, in int8.
struct Matrix {
  enum class Kind { FP32, BF16, INT8 };
  const void* packed;
  const float* bias;
  int64_t n, k;
  Kind kind;
  int64_t group;
};

// One layer's part of a shard. q_norm and k_norm: nullptr without a norm per head.
struct LayerArgs {
  Matrix qkv, o, gate_up, down;
  const float *attn_norm, *mlp_norm, *q_norm, *k_norm;
  void *k_slab, *v_slab;
};

// What all layers of a shard share.
struct ShardArgs {
  int64_t hidden, n_q, n_kv, head_dim, ffn, max_position, blocks, slab_head_stride;
  float eps, scale;
  Kv kv;
  const float *cos, *sin;
  const int32_t* kv_of_head;
};

// The rows of a batch: `real` of them belong to sequences, the rest is padding and takes part in the products only.
struct RowsArgs {
  const int32_t *positions, *kv_slot, *cu, *start, *tables;
  int64_t rows, real, sequences, table_width;
};

// How a shard adds its parts to those of its peers: a function of a transport, as its `Group::sum_for_native`.
struct Peers {
  struct Sum {
    float* t;
    uint64_t count;
    int64_t floor_ns;
    int64_t* stamp;
  };
  bool (*sum)(void* group, const Sum& sum) noexcept;
  void* group;
  int64_t floor_ns;
  static constexpr int STAMP = 5;  // numbers of a stamp
};

class Layers {
 public:
  Layers(const ShardArgs& shard, std::vector<LayerArgs> layers) : shard_(shard), layers_(std::move(layers)) {}

  int64_t count() const { return int64_t(layers_.size()); }
  // x [rows, hidden] += delta (nullptr: nothing); out = this shard's part of attention over the norm of x.
  void attention(int64_t layer, const RowsArgs& rows, float* x, const float* delta, float* out) const;
  // x += delta; out = this shard's part of the feed-forward network over the norm of x.
  void mlp(int64_t layer, const RowsArgs& rows, float* x, const float* delta, float* out) const;
  // All layers of a shard; x is updated in place. With peers, the parts of every half are summed over them, and
  // `stamps` receives one stamp for each of the 2 * count() sums. False: a sum failed, and x is of no use.
  bool run(const RowsArgs& rows, float* x, const Peers* peers, int64_t* stamps) const;

 private:
  ShardArgs shard_;
  std::vector<LayerArgs> layers_;
};

}  // namespace evener
