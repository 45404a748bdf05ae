// Scans over one row of logits, or over a part of one.
#pragma once

namespace {

using namespace evener;

constexpr float NEG_INF = -__builtin_inff();

float max_of(const float* x, int64_t n) {
  vf m0 = set1(NEG_INF), m1 = m0, m2 = m0, m3 = m0;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    m0 = vmax(load(x + i), m0);
    m1 = vmax(load(x + i + W), m1);
    m2 = vmax(load(x + i + 2 * W), m2);
    m3 = vmax(load(x + i + 3 * W), m3);
  }
  float m = hmax(vmax(vmax(m0, m1), vmax(m2, m3)));
  for (; i < n; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

// A bijection of 32-bit words with good avalanche (constants by C. Wellons, hash-prospector, "lowbias32").
EVENER_INLINE vu mix(vu x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

// w = (bits / 2 + 1/2) / 2^31, in (0, 1).
EVENER_INLINE vf uniform(vu bits) {
  const float below_one = 0.99999994f;  // 1 - 2^-24
  vf w = (__builtin_convertvector((vi)(bits >> 1), vf) + 0.5f) * 4.656612873e-10f;
  return w > below_one ? set1(below_one) : w;
}

// Gumbel noise -log(-log(1 - w)): u = 1 - w keeps the full resolution where the noise is large. log(1 - w) by Kahan's
// correction for the rounding of 1 - w.
EVENER_INLINE vf gumbel(vf w) {
  vf y = 1.0f - w;
  vf lost = 1.0f - y;
  vf e = lost == 0.0f ? w : -log_vec(y) * (w / (lost == 0.0f ? set1(1.0f) : lost));
  return -log_vec(e);
}

// At least gumbel(w), cheaply: -log(-log(1 - w)) <= -log(w) <= -log(2^floor(log2(w))). The surplus covers rounding.
EVENER_INLINE vf gumbel_bound(vf w) {
  vf exponent = __builtin_convertvector(127 - ((vi)w >> 23), vf);
  return exponent * 0.6931472f + 1e-3f;
}

constexpr float GUMBEL_MAX = 23.0f;  // the largest noise is -log(2^-32) = 22.18

Best gumbel_best(const float* x, int64_t n, float inv_temperature, uint32_t key_lo, uint32_t key_hi, uint32_t first,
                 float floor) {
  Best best = {NEG_INF, 0};
  vu lane = (vu)lane_index() + first;
  for (int64_t i = 0; i < n; i += W) {
    vf logit = i + W <= n ? load(x + i) : load_part(x + i, n - i, NEG_INF);
    vi allowed = logit >= floor;
    // Most logits cannot exceed the best whatever their noise is, or do not with their share of it: no logarithms.
    if (!any(allowed & (logit * inv_temperature + GUMBEL_MAX > best.value))) continue;
    vf w = uniform(mix(mix((lane + uint32_t(i)) ^ key_lo) + key_hi));
    if (!any(allowed & (logit * inv_temperature + gumbel_bound(w) > best.value))) continue;
    vf score = allowed ? logit * inv_temperature + gumbel(w) : set1(NEG_INF);
    for (int j = 0; j < W; ++j)
      if (score[j] > best.value) best = {score[j], i + j};
  }
  return best;
}

void noise_of(const int64_t* index, int64_t n, uint32_t key_lo, uint32_t key_hi, float* out) {
  for (int64_t i = 0; i < n; i += W) {
    vu at{};
    for (int j = 0; j < W && i + j < n; ++j) at[j] = uint32_t(index[i + j]);
    store_part(out + i, n - i < W ? n - i : W, gumbel(uniform(mix(mix(at ^ key_lo) + key_hi))));
  }
}

void sum_exp(const float* x, int64_t n, float* maximum, float* sum) {
  float m = max_of(x, n);
  *maximum = m;
  *sum = 0.0f;
  if (m == NEG_INF) return;
  vf s0{}, s1{};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    s0 += exp_vec(load(x + i) - m);
    s1 += exp_vec(load(x + i + W) - m);
  }
  for (; i < n; i += W) s0 += exp_vec((i + W <= n ? load(x + i) : load_part(x + i, n - i, NEG_INF)) - m);
  *sum = hsum(s0 + s1);
}

// The k best so far are a heap in (values, indices) whose root is the worst: the lowest value, of equals the highest
// index.
EVENER_INLINE bool worse(const float* v, const int64_t* id, int64_t a, int64_t b) {
  return v[a] < v[b] || (v[a] == v[b] && id[a] > id[b]);
}

EVENER_INLINE void swap(float* v, int64_t* id, int64_t a, int64_t b) {
  float x = v[a];
  int64_t y = id[a];
  v[a] = v[b], id[a] = id[b];
  v[b] = x, id[b] = y;
}

void sift_down(float* v, int64_t* id, int64_t at, int64_t k) {
  for (;;) {
    int64_t child = 2 * at + 1;
    if (child >= k) return;
    if (child + 1 < k && worse(v, id, child + 1, child)) ++child;
    if (!worse(v, id, child, at)) return;
    swap(v, id, at, child);
    at = child;
  }
}

void top_of(const float* x, int64_t n, int64_t k, float* values, int64_t* indices) {
  for (int64_t i = 0; i < k; ++i) values[i] = x[i], indices[i] = i;
  for (int64_t i = k / 2; i-- > 0;) sift_down(values, indices, i, k);
  auto offer = [&](int64_t i) {
    if (!(x[i] > values[0])) return;  // of equals the earlier index stays
    values[0] = x[i], indices[0] = i;
    sift_down(values, indices, 0, k);
  };
  int64_t i = k;
  for (; i + 4 * W <= n; i += 4 * W) {
    vf m = vmax(vmax(load(x + i), load(x + i + W)), vmax(load(x + i + 2 * W), load(x + i + 3 * W)));
    if (any(m > values[0]))
      for (int j = 0; j < 4 * W; ++j) offer(i + j);
  }
  for (; i < n; ++i) offer(i);
  for (int64_t end = k; end-- > 1;) {  // the worst goes to the end: descending
    swap(values, indices, 0, end);
    sift_down(values, indices, 0, end);
  }
}

}  // namespace
