// Bindings. Arrays arrive as addresses (a tensor's data_ptr), sizes and strides in elements; the Python wrappers check
// dtype, device and shape.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "launch.h"
#include "layer.h"
#include "pool.h"

namespace nb = nanobind;
using namespace evener;

namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

const float* floats(uintptr_t address) { return at<const float>(address); }
// Asks for huge pages in the whole huge pages of [address, address + bytes); false where there are none.
bool advise_huge_pages(uintptr_t address, uint64_t bytes) {
#if defined(__linux__)
  constexpr uint64_t HUGE_PAGE = 2u << 20;
  uintptr_t first = (address + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE, end = (address + bytes) / HUGE_PAGE * HUGE_PAGE;
  return end > first && madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE) == 0;
#else
  return false;
#endif
}

const int32_t* ints(uintptr_t address) { return at<const int32_t>(address); }

// (address, bias, outputs, inputs, kind, group) as Python gives it.
typedef std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, int, int64_t> MatrixTuple;
typedef std::tuple<MatrixTuple, MatrixTuple, MatrixTuple, MatrixTuple, uintptr_t, uintptr_t, uintptr_t, uintptr_t,
                   uintptr_t, uintptr_t>
    LayerTuple;
typedef std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t> RowsTuple;

Matrix matrix(const MatrixTuple& t) {
  auto [packed, bias, n, k, kind, group] = t;
  return {at<const void>(packed), floats(bias), n, k, Matrix::Kind(kind), group};
}

LayerArgs layer(const LayerTuple& t) {
  auto& [qkv, o, gate_up, down, attn_norm, mlp_norm, q_norm, k_norm, k_slab, v_slab] = t;
  return {matrix(qkv),       matrix(o),         matrix(gate_up), matrix(down),    floats(attn_norm),
          floats(mlp_norm), floats(q_norm), floats(k_norm), at<void>(k_slab), at<void>(v_slab)};
}

RowsArgs rows(const RowsTuple& t) {
  auto [positions, kv_slot, cu, start, tables, rows, real, sequences, table_width] = t;
  return {ints(positions), ints(kv_slot), ints(cu), ints(start), ints(tables), rows, real, sequences, table_width};
}

}  // namespace

NB_MODULE(_native, m) {
  auto free = nb::call_guard<nb::gil_scoped_release>();
  choose_isa("");

  m.def("isa", &isa);
  m.def("choose_isa", &choose_isa);
  m.def("supported_isas", &supported_isas);
  m.def("threads", &threads);
  m.def("set_threads", &set_threads, free);
  m.def("advise_huge_pages", &advise_huge_pages);

  m.def(
      "norm",
      [](uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t out, int64_t rows, int64_t inner, int64_t width,
         int64_t x_outer, int64_t x_inner, int64_t out_outer, int64_t out_inner, int64_t residual_outer, float eps) {
        norm({floats(x), at<float>(residual), floats(weight), at<float>(out), inner, width, x_outer, x_inner, out_outer,
              out_inner, residual_outer, eps},
             rows);
      },
      free);
  m.def(
      "rope",
      [](uintptr_t qkv, uintptr_t cos, uintptr_t sin, uintptr_t positions, uintptr_t kv_slot, uintptr_t k_slab,
         uintptr_t v_slab, uintptr_t q_out, uintptr_t q_norm, uintptr_t k_norm, int kv, int64_t rows, int64_t qkv_stride,
         int64_t q_out_stride, int64_t slab_head_stride, int64_t n_q, int64_t n_kv, int64_t head_dim, float eps,
         int64_t max_position, int64_t slots) {
        check_rope(ints(positions), ints(kv_slot), rows, max_position, slots);
        rope({floats(qkv), floats(cos), floats(sin), ints(positions), ints(kv_slot), at<void>(k_slab), at<void>(v_slab),
              at<float>(q_out), floats(q_norm), floats(k_norm), qkv_stride, q_out_stride, slab_head_stride, n_q, n_kv,
              head_dim, eps},
             Kv(kv), rows);
      },
      free);
  m.def(
      "silu_mul",
      [](uintptr_t gate_up, uintptr_t out, int64_t rows, int64_t width, int64_t gate_up_stride, int64_t out_stride) {
        silu_mul({floats(gate_up), at<float>(out), width, gate_up_stride, out_stride}, rows);
      },
      free);
  m.def("gemm_columns", &gemm_columns);
  m.def(
      "gemm",
      [](uintptr_t x, uintptr_t packed, uintptr_t bias, uintptr_t out, int64_t m, int64_t n, int64_t k, int64_t x_stride,
         int64_t out_stride, bool bf16) {
        gemm({floats(x), floats(bias), at<const void>(packed), at<float>(out), m, n, k, x_stride, out_stride}, bf16);
      },
      free);
  m.def("bf16_pairs", &bf16_pairs);
  m.def("cell_bytes", &cell_bytes);
  m.attr("GROUP") = GROUP;
  m.attr("MAX_GROUP") = MAX_GROUP;
  m.def(
      "pack8",
      [](uintptr_t weight, uintptr_t packed, int64_t n, int64_t k, int64_t group, int64_t stride) {
        pack8({floats(weight), at<int8_t>(packed), n, k, group, stride});
      },
      free);
  m.def(
      "unpack8",
      [](uintptr_t packed, uintptr_t index, int64_t rows, int64_t n, int64_t k, int64_t group, uintptr_t out) {
        unpack8(at<const int8_t>(packed), at<const int64_t>(index), rows, n, k, group, at<float>(out));
      },
      free);
  m.def(
      "gemm8",
      [](uintptr_t x, uintptr_t packed, uintptr_t bias, uintptr_t out, int64_t m, int64_t n, int64_t k, int64_t group,
         int64_t x_stride, int64_t out_stride) {
        gemm8({nullptr, nullptr, nullptr, at<const int8_t>(packed), floats(bias), at<float>(out), m, n, k, group, out_stride},
              floats(x), x_stride);
      },
      free);
  m.def(
      "attention",
      [](uintptr_t q, uintptr_t k_slab, uintptr_t v_slab, uintptr_t out, int64_t q_stride, int64_t out_stride,
         int64_t slab_head_stride, int64_t head_dim, float scale, int kv, uintptr_t cu, uintptr_t start, uintptr_t tables,
         uintptr_t kv_of_head, int64_t sequences, int64_t table_width, int64_t heads, int64_t kv_heads, int64_t blocks,
         int64_t rows) {
        attention({floats(q), at<const void>(k_slab), at<const void>(v_slab), at<float>(out), q_stride, out_stride,
                   slab_head_stride, head_dim, scale},
                  Kv(kv),
                  {ints(cu), ints(start), ints(tables), ints(kv_of_head), sequences, table_width, heads, kv_heads, blocks,
                   rows});
      },
      free);
  m.def(
      "argmax",
      [](uintptr_t x, int64_t rows, int64_t width, int64_t stride, uintptr_t index, uintptr_t value) {
        argmax(floats(x), rows, width, stride, at<int64_t>(index), at<float>(value));
      },
      free);
  m.def(
      "gumbel_argmax",
      [](uintptr_t x, int64_t rows, int64_t width, int64_t stride, uintptr_t inv_temperature, uintptr_t key,
         uint32_t vocab_offset, uintptr_t floor, uintptr_t index, uintptr_t value) {
        gumbel_argmax(floats(x), rows, width, stride, floats(inv_temperature), at<const uint64_t>(key), vocab_offset,
                      floats(floor), at<int64_t>(index), at<float>(value));
      },
      free);
  m.def(
      "choose",
      [](uintptr_t x, int64_t rows, int64_t width, int64_t stride, uintptr_t inv_temperature, uintptr_t key,
         uintptr_t greedy, uint32_t vocab_offset, uintptr_t index, uintptr_t value) {
        choose(floats(x), rows, width, stride, floats(inv_temperature), at<const uint64_t>(key), at<const bool>(greedy),
               vocab_offset, at<int64_t>(index), at<float>(value));
      },
      free);
  m.def(
      "gumbel_noise",
      [](uintptr_t key, uintptr_t index, int64_t rows, int64_t width, uintptr_t out) {
        gumbel_noise(at<const uint64_t>(key), at<const int64_t>(index), rows, width, at<float>(out));
      },
      free);
  m.def(
      "logsumexp",
      [](uintptr_t x, int64_t rows, int64_t width, int64_t stride, uintptr_t out) {
        logsumexp(floats(x), rows, width, stride, at<float>(out));
      },
      free);
  m.def(
      "top_candidates",
      [](uintptr_t x, int64_t rows, int64_t width, int64_t stride, int64_t k, uintptr_t values, uintptr_t indices) {
        top_candidates(floats(x), rows, width, stride, k, at<float>(values), at<int64_t>(indices));
      },
      free);

  nb::class_<Layers>(m, "Layers")
      .def("__init__",
           [](Layers* self, const std::vector<LayerTuple>& given, int64_t hidden, int64_t n_q, int64_t n_kv,
              int64_t head_dim, int64_t ffn, int64_t max_position, int64_t blocks, int64_t slab_head_stride, float eps,
              float scale, int kv, uintptr_t cos, uintptr_t sin, uintptr_t kv_of_head) {
             std::vector<LayerArgs> layers;
             for (auto& t : given) layers.push_back(layer(t));
             new (self) Layers({hidden, n_q, n_kv, head_dim, ffn, max_position, blocks, slab_head_stride, eps, scale, Kv(kv),
                                floats(cos), floats(sin), ints(kv_of_head)},
                               std::move(layers));
           })
      .def("attention",
           [](const Layers& self, int64_t i, const RowsTuple& r, uintptr_t x, uintptr_t delta, uintptr_t out) {
             nb::gil_scoped_release released;
             self.attention(i, rows(r), at<float>(x), floats(delta), at<float>(out));
           })
      .def("mlp",
           [](const Layers& self, int64_t i, const RowsTuple& r, uintptr_t x, uintptr_t delta, uintptr_t out) {
             nb::gil_scoped_release released;
             self.mlp(i, rows(r), at<float>(x), floats(delta), at<float>(out));
           })
      .def("run", [](const Layers& self, const RowsTuple& r, uintptr_t x) {
        nb::gil_scoped_release released;
        self.run(rows(r), at<float>(x), nullptr, nullptr);
      })
      // Holds the interpreter lock, as the sums expect; they give it up while they sleep.
      .def("run_with_peers", [](const Layers& self, const RowsTuple& r, uintptr_t x, uintptr_t sum, uintptr_t group,
                                int64_t floor_ns, uintptr_t stamps) {
        Peers peers{reinterpret_cast<decltype(Peers::sum)>(sum), at<void>(group), floor_ns};
        return self.run(rows(r), at<float>(x), &peers, at<int64_t>(stamps));
      });
}
