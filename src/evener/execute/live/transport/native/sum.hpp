// Sums in rank order, element by element: ((x0 + x1) + x2) + ... Only IEEE additions, so the bits do not depend on
// the instruction set, on the rank, or on how a tensor is cut into chunks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace evener {

enum class Dtype : int { f32 = 0, bf16 = 1 };
inline size_t bytes_of(Dtype d) { return d == Dtype::f32 ? 4 : 2; }

// out[i] = sum over parts[0..ranks) in order, `count` elements. bf16 is added in fp32 and rounded once, to nearest
// even. `out` may be one of the parts.
void sum(Dtype dtype, char* out, const char* const* parts, int ranks, size_t count);

}  // namespace evener
