// The int8 kernels of an instruction set that otherwise is one of isa.cpp's, as isa.cpp compiled by kernels.cmake.
#include "vec.h"

#include "kernels.h"

#include "narrow.h"

#include "rows.h"

#include "gemm.h"

#include "attention.h"

#include "attention8.h"

#include "gemm8.h"

namespace evener {
namespace EVENER_ISA {
extern const Int8Kernels kernels;
const Int8Kernels kernels = int8_kernels;
}  // namespace EVENER_ISA
}  // namespace evener
