// The kernels of one instruction set. Compiled several times, see kernels.cmake. No std templates in here.
#include "vec.h"

#include "kernels.h"

#include "rows.h"

#include "gemm.h"

#include "attention.h"

#include "sampling.h"

namespace evener {
namespace EVENER_ISA {
extern const Kernels kernels;
const Kernels kernels = {norm_rows, rope_rows, silu_rows, NR, gemm_panels, attention_tile, max_of, gumbel_best, noise_of, sum_exp, top_of};
}  // namespace EVENER_ISA
}  // namespace evener
