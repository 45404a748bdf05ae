// From a kernel call to tasks for the pool. Throws std::invalid_argument for indices that would leave an array.
#pragma once
#include <string>

#include "kernels.h"

namespace evener {

struct Batch {
  const int32_t *cu, *start, *tables, *kv_of_head;
  int64_t sequences, table_width, heads, kv_heads, blocks, rows;
};

// The instruction set in use: "generic", "avx2", "avx512", "avx512vnni", "avx512bf16" or "avx512amx".
const std::string& isa();
// Chooses one, or with "" the best this processor runs; false if it cannot run it.
bool choose_isa(const std::string& name);
std::string supported_isas();

void norm(const NormArgs& args, int64_t rows);
// What `rope` takes for granted: positions in [0, max_position), slots in [-1, slots).
void check_rope(const int32_t* positions, const int32_t* kv_slot, int64_t rows, int64_t max_position, int64_t slots);
void rope(const RopeArgs& args, Kv kv, int64_t rows);
void silu_mul(const SiluArgs& args, int64_t rows);
int gemm_columns();
// Weights of bf16 are packed in pairs of inputs, [ceil(k / 2)][columns][2].
bool bf16_pairs();
void gemm(const GemmArgs& args, bool bf16);
int64_t cell_bytes(int64_t group);
// Panels of int8 cells, and rows out of them.
void pack8(const Pack8Args& args);
void unpack8(const int8_t* packed, const int64_t* index, int64_t rows, int64_t n, int64_t k, int64_t group, float* out);
// x is fp32, [m, k] with rows x_stride apart; args.x and args.x_scale are set here.
void gemm8(Gemm8Args args, const float* x, int64_t x_stride);
void attention(const AttentionArgs& args, Kv kv, const Batch& batch);
void argmax(const float* x, int64_t rows, int64_t width, int64_t stride, int64_t* index, float* value);
void gumbel_argmax(const float* x, int64_t rows, int64_t width, int64_t stride, const float* inv_temperature,
                   const uint64_t* key, uint32_t vocab_offset, const float* floor, int64_t* index, float* value);
// argmax of the rows that are `greedy`, gumbel_argmax of the others, without a floor.
void choose(const float* x, int64_t rows, int64_t width, int64_t stride, const float* inv_temperature,
            const uint64_t* key, const bool* greedy, uint32_t vocab_offset, int64_t* index, float* value);
void gumbel_noise(const uint64_t* key, const int64_t* index, int64_t rows, int64_t width, float* out);
void logsumexp(const float* x, int64_t rows, int64_t width, int64_t stride, float* out);
void top_candidates(const float* x, int64_t rows, int64_t width, int64_t stride, int64_t k, float* values,
                    int64_t* indices);

}  // namespace evener
