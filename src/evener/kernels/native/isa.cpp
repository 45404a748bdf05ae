// The kernels of one instruction set. Compiled several times, see kernels.cmake. No std templates in here.
#include "vec.h"

#include "narrow.h"

#include "kernels.h"

#include "rows.h"

#include "gemm.h"

#include "attention.h"

#include "gemm8.h"

#include "sampling.h"

namespace evener {
namespace EVENER_ISA {
extern const Kernels kernels;
const Kernels kernels = {
    norm_rows,
    {rope_rows<float>, rope_rows<bf16>, rope_rows<int8_t>},
    silu_rows,
    NR,
    gemm_panels<float>,
    gemm_panels<bf16>,
    int8_kernels,
    {nullptr, nullptr},
    {attention_tile<float>, attention_tile<bf16>},
    max_of,
    gumbel_best,
    noise_of,
    sum_exp,
    top_of,
};
}  // namespace EVENER_ISA
}  // namespace evener
