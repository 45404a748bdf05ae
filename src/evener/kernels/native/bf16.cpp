// The bf16 products of an instruction set that otherwise is another, as int8.cpp; compiled by kernels.cmake.
#include "vec.h"

#include "kernels.h"

#include "narrow.h"

#include "gemm.h"

#include "gemm16.h"

namespace evener {
namespace EVENER_ISA {
extern const Bf16Kernels kernels;
const Bf16Kernels kernels = {narrow_rows, gemm16_panels};
}  // namespace EVENER_ISA
}  // namespace evener
