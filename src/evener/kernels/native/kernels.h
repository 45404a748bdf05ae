// What every instruction set provides: plain functions on plain pointers, without allocation or threads.
// launch.cpp checks, divides the work and calls them. Strides count elements; the last dimension is dense.
#pragma once
#include <cstdint>

namespace evener {

constexpr int BLOCK = 16;      // tokens in a KV block
constexpr int KEY_TILE = 64;   // keys between two rescalings of the online softmax, at fixed absolute positions
constexpr int MAX_ROWS = 48;   // (token, query head) rows of one attention tile
constexpr int GROUP = 64;      // inputs that share a scale in int8 products: so many, or a multiple of them
constexpr int MAX_GROUP = 256; // the sum of a group's weights fits in 16 bits

struct NormArgs {
  const float* x;
  float* residual;  // nullptr: plain norm of x
  const float* weight;
  float* out;
  int64_t inner, width;  // row i is element [i / inner][i % inner] of each array
  int64_t x_outer, x_inner, out_outer, out_inner, residual_outer;
  float eps;
};

// What a KV cache holds. INT8: a block of a head is 16 x head_dim values (rows.h says where), then a scale for each of
// its 16 tokens.
enum class Kv { FP32, BF16, INT8 };

struct RopeArgs {
  const float *qkv, *cos, *sin;
  const int32_t *positions, *kv_slot;
  void *k_slab, *v_slab;
  float* q_out;
  const float *q_norm, *k_norm;  // nullptr: no norm per head
  int64_t qkv_stride, q_out_stride, slab_head_stride, n_q, n_kv, head_dim;
  float eps;
};

struct SiluArgs {
  const float* gate_up;
  float* out;
  int64_t width, gate_up_stride, out_stride;
};

struct GemmArgs {
  const float *x, *bias;  // bias: nullptr, or n
  const void* packed;     // fp32 or bf16
  float* out;
  int64_t m, n, k, x_stride, out_stride;
};

// Pairs of bf16 from row to row of narrowed inputs: whole lines of the cache, so whole tiles too.
constexpr int64_t pairs_stride(int64_t k) { return (k + 31) / 32 * 16; }

// x [m, k] to bf16, [m, pairs_stride(k)] pairs, with 0 after the last input.
struct NarrowArgs {
  const float* x;
  int64_t k, x_stride;
  uint32_t* out;
};

struct Gemm16Args {
  const uint32_t* x;  // as NarrowArgs::out
  const float* bias;  // nullptr, or n
  const void* packed;
  float* out;
  int64_t m, n, k, out_stride;
};

// x [m, k] to inputs of an int8 product, [m, groups * group], their scales, and the integers that stand for 0, negated
// in 16 bits, [groups, m]. A kernel may read up to SLACK rows of inputs beyond these, and elements beyond the others;
// scales there are 0.
struct QuantizeArgs {
  static constexpr int64_t SLACK = 16;
  const float* x;
  int64_t m, k, group, x_stride;
  void* out;
  float* scales;
  int32_t* zeros;
};

// weight [n, k] to panels of int8 cells, [ceil(n / columns)][ceil(k / group)][cell bytes].
struct Pack8Args {
  const float* weight;
  int8_t* packed;
  int64_t n, k, group, stride;
};

struct Gemm8Args {
  const void* x;
  const float* x_scale;
  const int32_t* x_zero;
  const int8_t* packed;
  const float* bias;  // nullptr, or n
  float* out;
  int64_t m, n, k, group, out_stride;
};

struct AttentionArgs {
  const float* q;
  const void *k_slab, *v_slab;
  float* out;
  int64_t q_stride, out_stride, slab_head_stride, head_dim;
  float scale;
};

// Up to MAX_ROWS rows: `tokens` consecutive positions of one sequence times `heads` query heads of one KV head.
struct AttentionTile {
  const int32_t* table;
  int32_t row, tokens, position, head, heads, kv_head;
  const AttentionTile* next;  // what this thread computes after it, to fetch its first keys in time; or nullptr
};

constexpr int64_t attention_scratch_floats(int64_t head_dim) {
  return MAX_ROWS * (2 * head_dim + KEY_TILE + 4) + KEY_TILE * head_dim / 4;
}

struct Best {
  float value;
  int64_t index;
};

typedef void AttentionKernel(const AttentionArgs&, const AttentionTile&, float* scratch);

typedef void Int8Gemm(const Gemm8Args&, int64_t panel, int64_t end);

struct Int8Kernels {
  int input_bytes;  // of a quantised input
  void (*quantize)(const QuantizeArgs&, int64_t row, int64_t end);
  void (*pack)(const Pack8Args&, int64_t panel, int64_t end);
  void (*unpack)(const int8_t* packed, const int64_t* index, int64_t rows, int64_t k, int64_t group, float* out);
  Int8Gemm* gemm;
  AttentionKernel* attention;  // over a KV cache in int8
};

// Products of bf16 with bf16; where these are nullptr, weights of bf16 are multiplied in fp32 (Kernels::gemm_bf16).
struct Bf16Kernels {
  void (*narrow)(const NarrowArgs&, int64_t row, int64_t end);
  void (*gemm)(const Gemm16Args&, int64_t panel, int64_t end);
};

struct Kernels {
  void (*norm)(const NormArgs&, int64_t row, int64_t end);
  void (*rope[3])(const RopeArgs&, int64_t row, int64_t end);  // by Kv
  void (*silu_mul)(const SiluArgs&, int64_t row, int64_t end);
  int gemm_columns;  // of a panel: packed is [ceil(n / columns)][k][columns]
  void (*gemm)(const GemmArgs&, int64_t panel, int64_t end);
  void (*gemm_bf16)(const GemmArgs&, int64_t panel, int64_t end);
  Int8Kernels int8;
  Bf16Kernels bf16;
  // Over fp32 and bf16. `scratch`: attention_scratch_floats, aligned to 64 bytes.
  AttentionKernel* attention[2];
  float (*max)(const float* x, int64_t n);
  // The best noisy score and its index, {-inf, 0} where nothing passes; see gumbel_argmax in reference.py.
  Best (*gumbel)(const float* x, int64_t n, float inv_temperature, uint32_t key_lo, uint32_t key_hi, uint32_t first,
                 float floor);
  void (*noise)(const int64_t* index, int64_t n, uint32_t key_lo, uint32_t key_hi, float* out);
  // Maximum, and the sum of exp(x - maximum) (0 where all are -inf).
  void (*sum_exp)(const float* x, int64_t n, float* maximum, float* sum);
  void (*top)(const float* x, int64_t n, int64_t k, float* values, int64_t* indices);
};

namespace generic {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512vnni {  // otherwise as avx512
extern const Int8Kernels kernels;
}
namespace avx512bf16 {  // otherwise as avx512vnni
extern const Bf16Kernels kernels;
}
namespace avx512amx {  // otherwise as avx512bf16
extern Int8Gemm* const gemm8;
extern AttentionKernel* const attention8;  // over int8
extern const Bf16Kernels gemm16;
}
#endif

}  // namespace evener
