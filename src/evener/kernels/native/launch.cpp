#include "launch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "aligned.h"
#include "pool.h"

namespace evener {
namespace {

constexpr int64_t GRAIN = 16384;  // elements worth handing to another thread (a few microseconds)
constexpr int64_t TASKS_PER_THREAD = 16;  // of unlike lengths: so many even out
constexpr int64_t CHUNK = 8192;   // logits per task: fits the first-level cache; fixed, so sums do not depend on threads

struct Isa {
  std::string name;
  const Kernels* kernels;
  bool supported;
};

#if defined(__x86_64__)
// Whether the processor has tile registers for int8 and bf16, and the system lets this process use them (it does so on
// demand only: tiles make a thread's state 8 KiB larger).
bool tiles_permitted() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const unsigned bf16 = 1u << 22, tile = 1u << 24, int8 = 1u << 25;
  if ((d & (bf16 | tile | int8)) != (bf16 | tile | int8)) return false;
#if defined(__linux__)
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILE_DATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA) == 0;
#else
  return false;
#endif
}
#endif

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = [] {
    std::vector<Isa> v{{"generic", &generic::kernels, true}};
#if defined(__x86_64__)
    __builtin_cpu_init();
    auto has = [](bool b) { return b; };
    bool v3 = has(__builtin_cpu_supports("avx2")) && has(__builtin_cpu_supports("fma")) &&
              has(__builtin_cpu_supports("bmi")) && has(__builtin_cpu_supports("bmi2"));
    bool v4 = v3 && has(__builtin_cpu_supports("avx512f")) && has(__builtin_cpu_supports("avx512bw")) &&
              has(__builtin_cpu_supports("avx512cd")) && has(__builtin_cpu_supports("avx512dq")) &&
              has(__builtin_cpu_supports("avx512vl"));
    v.push_back({"avx2", &avx2::kernels, v3});
    v.push_back({"avx512", &avx512::kernels, v4});
    static Kernels vnni = avx512::kernels;
    vnni.int8 = avx512vnni::kernels;
    bool v4_vnni = v4 && has(__builtin_cpu_supports("avx512vnni"));
    v.push_back({"avx512vnni", &vnni, v4_vnni});
    static Kernels bf16 = vnni;
    bf16.bf16 = avx512bf16::kernels;
    bool v4_bf16 = v4_vnni && has(__builtin_cpu_supports("avx512bf16"));
    v.push_back({"avx512bf16", &bf16, v4_bf16});
    static Kernels amx = bf16;
    amx.int8.gemm = avx512amx::gemm8;
    amx.int8.attention = avx512amx::attention8;
    amx.bf16 = avx512amx::gemm16;
    v.push_back({"avx512amx", &amx, v4_bf16 && tiles_permitted()});
#endif
    return v;
  }();
  return all;
}

const Isa* current = nullptr;

const Kernels& use() { return *current->kernels; }

thread_local Aligned scratch;

// body(first, end) over ranges of rows of `cost` elements each, of a multiple of `together` rows.
template <typename F>
void over_rows(int64_t rows, int64_t cost, F&& body, int64_t together = 1) {
  int64_t per_task = std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, cost));
  per_task = (per_task + together - 1) / together * together;
  int64_t tasks = (rows + per_task - 1) / per_task;
  if (tasks <= 1 || threads() == 1) return body(int64_t(0), rows);
  parallel_for(tasks, [&](int64_t i) { body(i * per_task, std::min(rows, (i + 1) * per_task)); });
}

// body(row, chunk, first, n) over chunks of every row.
template <typename F>
void over_chunks(int64_t rows, int64_t width, F&& body) {
  int64_t chunks = (width + CHUNK - 1) / CHUNK;
  parallel_for(rows * chunks, [&](int64_t i) {
    int64_t c = i % chunks, first = c * CHUNK;
    body(i / chunks, c, first, std::min(CHUNK, width - first));
  });
}

// body(first, end) over ranges of the panels of n columns.
template <typename F>
void over_panels(int64_t n, F&& body) {
  int64_t columns = use().gemm_columns, panels = (n + columns - 1) / columns;
  if (threads() == 1) return body(int64_t(0), panels);
  // A few tasks per thread, so that a thread that lost its core for a while does not hold up the others.
  int64_t tasks = panels < 4 * threads() ? panels : 4 * threads();
  parallel_for(tasks, [&](int64_t i) { body(panels * i / tasks, panels * (i + 1) / tasks); });
}

// One step of SplitMix64 (Steele, Lea and Flood 2014).
uint64_t mix(uint64_t z) {
  z += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

void check_range(const char* what, const int32_t* x, int64_t n, int64_t low, int64_t high) {
  if (n == 0) return;
  int32_t least = x[0], most = x[0];
  for (int64_t i = 1; i < n; ++i) least = std::min(least, x[i]), most = std::max(most, x[i]);
  if (least >= low && most < high) return;
  int32_t bad = least < low ? least : most;
  throw std::invalid_argument(std::string(what) + " holds " + std::to_string(bad) + ", outside [" + std::to_string(low) +
                              ", " + std::to_string(high) + ")");
}

}  // namespace

const std::string& isa() { return current->name; }

bool choose_isa(const std::string& name) {
  for (auto it = isas().rbegin(); it != isas().rend(); ++it)
    if (it->supported && (name.empty() || name == it->name)) {
      current = &*it;
      return true;
    }
  return false;
}

std::string supported_isas() {
  std::string s;
  for (auto& i : isas())
    if (i.supported) s += (s.empty() ? "" : ", ") + i.name;
  return s;
}

void norm(const NormArgs& a, int64_t rows) {
  over_rows(rows, a.width, [&](int64_t first, int64_t end) { use().norm(a, first, end); });
}

void check_rope(const int32_t* positions, const int32_t* kv_slot, int64_t rows, int64_t max_position, int64_t slots) {
  check_range("positions", positions, rows, 0, max_position);
  check_range("kv_slot", kv_slot, rows, -1, slots);
}

void rope(const RopeArgs& a, Kv kv, int64_t rows) {
  auto body = [&](int64_t first, int64_t end) { use().rope[int(kv)](a, first, end); };
  over_rows(rows, (a.n_q + 2 * a.n_kv) * a.head_dim, body, BLOCK);  // tokens of a block share words
}

void silu_mul(const SiluArgs& a, int64_t rows) {
  over_rows(rows, 2 * a.width, [&](int64_t first, int64_t end) { use().silu_mul(a, first, end); });
}

int gemm_columns() { return use().gemm_columns; }

bool bf16_pairs() { return use().bf16.gemm != nullptr; }

void gemm(const GemmArgs& a, bool bf16) {
  if (bf16 && bf16_pairs()) {
    thread_local Aligned inputs;  // the caller's; helpers read it through the arguments
    NarrowArgs narrow{a.x, a.k, a.x_stride, reinterpret_cast<uint32_t*>(inputs.at_least(a.m * pairs_stride(a.k)))};
    over_rows(a.m, a.k, [&](int64_t first, int64_t end) { use().bf16.narrow(narrow, first, end); });
    const Gemm16Args b{narrow.out, a.bias, a.packed, a.out, a.m, a.n, a.k, a.out_stride};
    return over_panels(a.n, [&](int64_t first, int64_t end) { use().bf16.gemm(b, first, end); });
  }
  auto kernel = bf16 ? use().gemm_bf16 : use().gemm;
  over_panels(a.n, [&](int64_t first, int64_t end) { kernel(a, first, end); });
}

int64_t cell_bytes(int64_t group) { return use().gemm_columns * (group + 4); }

void pack8(const Pack8Args& a) {
  int64_t columns = use().gemm_columns, panels = (a.n + columns - 1) / columns;
  parallel_for(panels, [&](int64_t i) { use().int8.pack(a, i, i + 1); });
}

void unpack8(const int8_t* packed, const int64_t* index, int64_t rows, int64_t n, int64_t k, int64_t group, float* out) {
  for (int64_t r = 0; r < rows; ++r)
    if (index[r] < 0 || index[r] >= n)
      throw std::invalid_argument("index_T holds " + std::to_string(index[r]) + ", outside [0, " + std::to_string(n) + ")");
  over_rows(rows, k, [&](int64_t first, int64_t end) { use().int8.unpack(packed, index + first, end - first, k, group, out + first * k); });
}

void gemm8(Gemm8Args a, const float* x, int64_t x_stride) {
  thread_local Aligned inputs;  // the caller's; helpers read it through the arguments
  int64_t groups = (a.k + a.group - 1) / a.group, floats = (a.m * groups * a.group * use().int8.input_bytes + 63) / 64 * 16;
  const int64_t scales = a.m * groups + QuantizeArgs::SLACK;
  float* room = inputs.at_least(floats + 2 * scales + QuantizeArgs::SLACK * groups * a.group);
  QuantizeArgs q{x, a.m, a.k, a.group, x_stride, room, room + floats, reinterpret_cast<int32_t*>(room + floats + scales)};
  // Denormal numbers, as integers there would be, take processors a hundred times as long.
  std::fill(q.scales + a.m * groups, q.scales + scales, 0.0f);
  over_rows(a.m, a.k, [&](int64_t first, int64_t end) { use().int8.quantize(q, first, end); });
  a.x = q.out, a.x_scale = q.scales, a.x_zero = q.zeros;
  over_panels(a.n, [&](int64_t first, int64_t end) { use().int8.gemm(a, first, end); });
}

void attention(const AttentionArgs& a, Kv kv, const Batch& b) {
  check_range("kv_of_head", b.kv_of_head, b.heads, 0, b.kv_heads);
  thread_local std::vector<AttentionTile> tiles;
  tiles.clear();
  for (int64_t r = 0; r < b.sequences; ++r) {
    int64_t first = b.cu[r], count = int64_t(b.cu[r + 1]) - first, start = b.start[r];
    if (count == 0) continue;
    const int32_t* table = b.tables + r * b.table_width;
    int64_t keys = start + count, used = (keys + BLOCK - 1) / BLOCK;
    if (count < 0 || first < 0 || first + count > b.rows)
      throw std::invalid_argument("cu_R must not fall nor leave [0, " + std::to_string(b.rows) + "], the rows of q");
    if (start < 0 || used > b.table_width)
      throw std::invalid_argument("sequence " + std::to_string(r) + " reads keys 0.." + std::to_string(keys) +
                                  ", its block table holds " + std::to_string(b.table_width * BLOCK));
    check_range("tables_RM", table, used, 0, b.blocks);
    for (int64_t h = 0; h < b.heads;) {
      int64_t n = 1;  // a run of query heads on one KV head
      while (h + n < b.heads && n < MAX_ROWS && b.kv_of_head[h + n] == b.kv_of_head[h]) ++n;
      int64_t per_tile = MAX_ROWS / n;
      for (int64_t t = 0; t < count; t += per_tile)
        tiles.push_back({table, int32_t(first + t), int32_t(std::min(per_tile, count - t)), int32_t(start + t),
                         int32_t(h), int32_t(n), b.kv_of_head[h], nullptr});
      h += n;
    }
  }
  // A thread takes so many in a row, each of which fetches the first keys of the one after it.
  const int64_t count = int64_t(tiles.size()), tasks = threads() == 1 ? 1 : TASKS_PER_THREAD * threads();
  const int64_t in_a_row = std::max<int64_t>(1, count / tasks);
  for (int64_t i = 0; i + 1 < count; ++i)
    if ((i + 1) % in_a_row) tiles[i].next = &tiles[i + 1];
  const AttentionTile* list = tiles.data();  // the vector is the caller's; helpers have their own
  int64_t floats = attention_scratch_floats(a.head_dim);
  AttentionKernel* kernel = kv == Kv::INT8 ? use().int8.attention : use().attention[int(kv)];
  parallel_for((count + in_a_row - 1) / in_a_row, [&](int64_t task) {
    for (int64_t i = task * in_a_row; i < std::min(count, (task + 1) * in_a_row); ++i)
      kernel(a, list[i], scratch.at_least(floats));
  });
}

void argmax(const float* x, int64_t rows, int64_t width, int64_t stride, int64_t* index, float* value) {
  int64_t chunks = (width + CHUNK - 1) / CHUNK;
  thread_local std::vector<float> tops;
  tops.resize(rows * chunks);
  float* top = tops.data();
  over_chunks(rows, width, [&](int64_t r, int64_t c, int64_t first, int64_t n) {
    top[r * chunks + c] = use().max(x + r * stride + first, n);
  });
  for (int64_t r = 0; r < rows; ++r) {
    const float* of_row = top + r * chunks;
    int64_t c = std::max_element(of_row, of_row + chunks) - of_row;  // the first of equals
    const float *from = x + r * stride + c * CHUNK, *end = x + r * stride + std::min(width, (c + 1) * CHUNK);
    const float* at = std::find(from, end, of_row[c]);
    index[r] = at == end ? 0 : at - (x + r * stride);
    value[r] = of_row[c];
  }
}

void gumbel_argmax(const float* x, int64_t rows, int64_t width, int64_t stride, const float* inv_temperature,
                   const uint64_t* key, uint32_t vocab_offset, const float* floor, int64_t* index, float* value) {
  auto scan = [&](int64_t r, int64_t first, int64_t n) {
    uint64_t z = mix(key[r]);
    Best best = use().gumbel(x + r * stride + first, n, inv_temperature[r], uint32_t(z), uint32_t(z >> 32),
                             vocab_offset + uint32_t(first), floor[r]);
    if (best.value > -std::numeric_limits<float>::infinity()) best.index += first;
    return best;
  };
  if (threads() == 1) {  // one scan a row: the best so far prunes all that follows
    for (int64_t r = 0; r < rows; ++r) {
      Best best = scan(r, 0, width);
      index[r] = best.index, value[r] = best.value;
    }
    return;
  }
  int64_t chunks = (width + CHUNK - 1) / CHUNK;
  thread_local std::vector<Best> all;
  all.resize(rows * chunks);
  Best* found = all.data();
  over_chunks(rows, width,
              [&](int64_t r, int64_t c, int64_t first, int64_t n) { found[r * chunks + c] = scan(r, first, n); });
  for (int64_t r = 0; r < rows; ++r) {
    Best best{-std::numeric_limits<float>::infinity(), 0};
    for (int64_t c = 0; c < chunks; ++c)
      if (found[r * chunks + c].value > best.value) best = found[r * chunks + c];
    index[r] = best.index, value[r] = best.value;
  }
}

void choose(const float* x, int64_t rows, int64_t width, int64_t stride, const float* inv_temperature,
            const uint64_t* key, const bool* greedy, uint32_t vocab_offset, int64_t* index, float* value) {
  const float floor = -std::numeric_limits<float>::infinity();
  for (int64_t r = 0; r < rows; ++r)
    if (greedy[r])
      argmax(x + r * stride, 1, width, stride, index + r, value + r);
    else
      gumbel_argmax(x + r * stride, 1, width, stride, inv_temperature + r, key + r, vocab_offset, &floor, index + r,
                    value + r);
}

void gumbel_noise(const uint64_t* key, const int64_t* index, int64_t rows, int64_t width, float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    uint64_t z = mix(key[r]);
    use().noise(index + r * width, width, uint32_t(z), uint32_t(z >> 32), out + r * width);
  }
}

void logsumexp(const float* x, int64_t rows, int64_t width, int64_t stride, float* out) {
  int64_t chunks = (width + CHUNK - 1) / CHUNK;
  thread_local std::vector<float> parts;
  parts.resize(2 * rows * chunks);
  float* part = parts.data();
  over_chunks(rows, width, [&](int64_t r, int64_t c, int64_t first, int64_t n) {
    float* p = part + 2 * (r * chunks + c);
    use().sum_exp(x + r * stride + first, n, p, p + 1);
  });
  for (int64_t r = 0; r < rows; ++r) {
    const float* p = part + 2 * r * chunks;
    float top = p[0];
    for (int64_t c = 1; c < chunks; ++c) top = std::max(top, p[2 * c]);
    double sum = 0.0;
    if (top > -std::numeric_limits<float>::infinity())
      for (int64_t c = 0; c < chunks; ++c) sum += double(p[2 * c + 1]) * std::exp(double(p[2 * c]) - double(top));
    out[r] = float(double(top) + std::log(sum));
  }
}

void top_candidates(const float* x, int64_t rows, int64_t width, int64_t stride, int64_t k, float* values,
                    int64_t* indices) {
  over_rows(rows, width, [&](int64_t first, int64_t end) {
    for (int64_t r = first; r < end; ++r) use().top(x + r * stride, width, k, values + r * k, indices + r * k);
  });
}

}  // namespace evener
