// The matrix products, and the attention over int8, of an instruction set with tile registers, that otherwise is another, as
// int8.cpp; compiled by kernels.cmake.
#include "vec.h"

#include "kernels.h"

#include "narrow.h"

#include "rows.h"

#include "gemm.h"

#include "attention.h"

#include "attention8.h"

#include "gemm8.h"

#include "gemm16.h"

#include "amx.h"

#include "amx_attention.h"

namespace evener {
namespace EVENER_ISA {
extern Int8Gemm* const gemm8;
extern AttentionKernel* const attention8;
extern const Bf16Kernels gemm16;
Int8Gemm* const gemm8 = amx8_panels;
AttentionKernel* const attention8 = amx8_attention;
const Bf16Kernels gemm16 = {narrow_rows, amx16_panels};
}  // namespace EVENER_ISA
}  // namespace evener
