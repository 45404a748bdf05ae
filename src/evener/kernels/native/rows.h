// Kernels that treat each row by itself: RMS norm, rotary embedding with the KV write, SwiGLU's product.
#pragma once

namespace {

using namespace evener;

EVENER_INLINE float square(float x) { return x * x; }

// 1 / sqrt(mean(x^2) + eps); four partial sums keep the adders busy.
EVENER_INLINE float inverse_rms(const float* x, int64_t n, float eps) {
  vf s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    vf a = load(x + i), b = load(x + i + W), c = load(x + i + 2 * W), d = load(x + i + 3 * W);
    s0 += a * a;
    s1 += b * b;
    s2 += c * c;
    s3 += d * d;
  }
  for (; i + W <= n; i += W) {
    vf a = load(x + i);
    s0 += a * a;
  }
  float sum = hsum((s0 + s1) + (s2 + s3));
  for (; i < n; ++i) sum += square(x[i]);
  return 1.0f / __builtin_sqrtf(sum / float(n) + eps);
}

EVENER_INLINE void scale_by(const float* x, const float* weight, float r, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, load(x + i) * r * load(weight + i));
  for (; i < n; ++i) out[i] = x[i] * r * weight[i];
}

void norm_rows(const NormArgs& a, int64_t row, int64_t end) {
  for (; row < end; ++row) {
    int64_t outer = row / a.inner, inner = row % a.inner;
    const float* x = a.x + outer * a.x_outer + inner * a.x_inner;
    if (a.residual) {
      float* residual = a.residual + outer * a.residual_outer;
      int64_t i = 0;
      for (; i + W <= a.width; i += W) store(residual + i, load(residual + i) + load(x + i));
      for (; i < a.width; ++i) residual[i] += x[i];
      x = residual;
    }
    scale_by(x, a.weight, inverse_rms(x, a.width, a.eps), a.width, a.out + outer * a.out_outer + inner * a.out_inner);
  }
}

// Rotates pairs (x[i], x[i + half]) by the angle of column i. `weight` (and the norm) may be absent; x may be out.
EVENER_INLINE void rotate(const float* x, const float* weight, float eps, const float* cos, const float* sin,
                          int64_t head_dim, float* out) {
  int64_t half = head_dim / 2;
  if (weight) {
    scale_by(x, weight, inverse_rms(x, head_dim, eps), head_dim, out);
    x = out;
  }
  int64_t i = 0;
  for (; i + W <= half; i += W) {
    vf a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(out + i, a * c - b * s);
    store(out + half + i, b * c + a * s);
  }
  for (; i < half; ++i) {
    float a = x[i], b = x[half + i], c = cos[i], s = sin[i];
    out[i] = a * c - b * s;
    out[half + i] = b * c + a * s;
  }
}

constexpr int64_t MAX_HEAD_DIM = 1024;  // launch.cpp refuses more

// Elements of one head's block: 16 tokens, and for int8 their scales.
template <typename T>
constexpr int64_t block_elements(int64_t dim) {
  return BLOCK * dim + (sizeof(T) == 1 ? BLOCK * 4 : 0);
}

// Where element d of token t is in a block, [D][16] or [16][D]; in int8 with runs of four in the other direction, as
// integer products take them: [D / 4][16][4] (the last run is shorter where D is no multiple of 4) and [16 / 4][D][4].
struct KeyPlaces {
  int64_t t, dim;
  int64_t of(int64_t d, const void*) const { return d * BLOCK + t; }
  int64_t of(int64_t d, const int8_t*) const {
    int64_t run = d / 4 * 4;
    return run * BLOCK + t * (dim - run < 4 ? dim - run : 4) + d % 4;
  }
};

struct ValuePlaces {
  int64_t t, dim;
  int64_t of(int64_t d, const void*) const { return t * dim + d; }
  int64_t of(int64_t d, const int8_t*) const { return (t / 4 * dim + d) * 4 + t % 4; }
};

// x [dim], the key or value of token `offset` of a block, into it.
template <typename Places>
EVENER_INLINE void write_token(const float* x, int64_t dim, float* block, int64_t, Places at) {
  for (int64_t d = 0; d < dim; ++d) block[at.of(d, block)] = x[d];
}

template <typename Places>
EVENER_INLINE void write_token(const float* x, int64_t dim, bf16* block, int64_t, Places at) {
  for (int64_t d = 0; d < dim; ++d) block[at.of(d, block)] = to_bf16(x[d]);
}

EVENER_INLINE void write_scale(float scale, int64_t dim, int8_t* block, int64_t offset) {
  __builtin_memcpy(block + BLOCK * dim + offset * 4, &scale, 4);
}

EVENER_INLINE vi integers_at(const float* x, int64_t d, float inverse) { return rounded(load(x + d) * inverse); }
EVENER_INLINE int8_t integer_of(float x, float inverse) { return int8_t(rounded(set1(x * inverse))[0]); }

EVENER_INLINE void write_token(const float* x, int64_t dim, int8_t* block, int64_t offset, KeyPlaces at) {
  typedef int8_t Bytes __attribute__((vector_size(W)));
  const float scale = scale_of(x, dim, 127), inverse = inverse_of(scale);
  int64_t d = 0;
  for (; d + W <= dim; d += W) {
    const Bytes q = __builtin_convertvector(integers_at(x, d, inverse), Bytes);
    EVENER_UNROLL for (int i = 0; i < W; i += 4) __builtin_memcpy(block + at.of(d + i, block), (const char*)&q + i, 4);
  }
  for (; d < dim; ++d) block[at.of(d, block)] = integer_of(x[d], inverse);
  write_scale(scale, dim, block, offset);
}

EVENER_INLINE void write_token(const float* x, int64_t dim, int8_t* block, int64_t offset, ValuePlaces at) {
  const float scale = scale_of(x, dim, 127), inverse = inverse_of(scale);
  int64_t d = 0;
  for (; d + W <= dim; d += W) {
    const vi q = integers_at(x, d, inverse);
    EVENER_UNROLL for (int i = 0; i < W; ++i) block[at.of(d + i, block)] = int8_t(q[i]);
  }
  for (; d < dim; ++d) block[at.of(d, block)] = integer_of(x[d], inverse);
  write_scale(scale, dim, block, offset);
}

// The values of four tokens, `stride` apart, whose bytes share words: the same as write_token four times.
EVENER_INLINE void write_four_values(const float* x, int64_t stride, int64_t dim, int8_t* block, int64_t offset) {
  float inverse[4];
  EVENER_UNROLL for (int t = 0; t < 4; ++t) {
    const float scale = scale_of(x + t * stride, dim, 127);
    inverse[t] = inverse_of(scale);
    write_scale(scale, dim, block, offset + t);
  }
  int8_t* words = block + offset * dim;
  int64_t d = 0;
  for (; d + W <= dim; d += W) {
    vi word{};
    EVENER_UNROLL for (int t = 0; t < 4; ++t)
      word |= (integers_at(x + t * stride, d, inverse[t]) & 255) << 8 * t;
    __builtin_memcpy(words + d * 4, &word, sizeof word);
  }
  for (; d < dim; ++d)
    for (int t = 0; t < 4; ++t) words[d * 4 + t] = integer_of(x[t * stride + d], inverse[t]);
}

// Whether four tokens from `row` on are four of a block that share words.
EVENER_INLINE bool four_together(const RopeArgs& a, int64_t row, int64_t end) {
  const int64_t slot = a.kv_slot[row];
  if (slot % 4 || end - row < 4) return false;
  for (int t = 1; t < 4; ++t)
    if (a.kv_slot[row + t] != slot + t) return false;
  return true;
}

template <typename T>
void rope_rows(const RopeArgs& a, int64_t row, int64_t end) {
  int64_t dim = a.head_dim, written = row;  // values of the rows before it
  float rotated[MAX_HEAD_DIM];
  for (; row < end; ++row) {
    const float* q = a.qkv + row * a.qkv_stride;
    const float *k = q + a.n_q * dim, *v = k + a.n_kv * dim;
    const float *cos = a.cos + a.positions[row] * (dim / 2), *sin = a.sin + a.positions[row] * (dim / 2);
    for (int64_t h = 0; h < a.n_q; ++h)
      rotate(q + h * dim, a.q_norm, a.eps, cos, sin, dim, a.q_out + row * a.q_out_stride + h * dim);
    int64_t slot = a.kv_slot[row];
    if (slot < 0) continue;
    int64_t block = slot / BLOCK * block_elements<T>(dim), offset = slot % BLOCK;
    T *k_to = static_cast<T*>(a.k_slab) + block, *v_to = static_cast<T*>(a.v_slab) + block;
    const bool four = sizeof(T) == 1 && row >= written && four_together(a, row, end);
    for (int64_t h = 0; h < a.n_kv; ++h, k_to += a.slab_head_stride, v_to += a.slab_head_stride) {
      rotate(k + h * dim, a.k_norm, a.eps, cos, sin, dim, rotated);
      write_token(rotated, dim, k_to, offset, KeyPlaces{offset, dim});
      if constexpr (sizeof(T) == 1)
        if (four) write_four_values(v + h * dim, a.qkv_stride, dim, v_to, offset);
      if (!four && row >= written) write_token(v + h * dim, dim, v_to, offset, ValuePlaces{offset, dim});
    }
    if (four) written = row + 4;
  }
}

void silu_rows(const SiluArgs& a, int64_t row, int64_t end) {
  for (; row < end; ++row) {
    const float *gate = a.gate_up + row * a.gate_up_stride, *up = gate + a.width;
    float* out = a.out + row * a.out_stride;
    for (int64_t i = 0; i < a.width; i += W) {
      int64_t n = a.width - i < W ? a.width - i : W;
      vf g = n == W ? load(gate + i) : load_part(gate + i, n, 0.0f);
      vf u = n == W ? load(up + i) : load_part(up + i, n, 0.0f);
      vf x = -g;
      vf y = g / (1.0f + exp_vec(x > 88.0f ? set1(88.0f) : x)) * u;
      if (n == W)
        store(out + i, y);
      else
        store_part(out + i, n, y);
    }
  }
}

}  // namespace
