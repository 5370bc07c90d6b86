// The kernels of few_rows_kernel.h by type: each has a file of its own, so that they are compiled side by side.
#pragma once

#include "few_rows.h"

namespace sequoia {

using FewRowsKernel = void (*)(FewRows);

// By the width of a head, 64 or 128, and groups of 8 rows, 1, 2 or 4.
FewRowsKernel few_rows_bfloat16(int head_dim, int eights);
FewRowsKernel few_rows_float16(int head_dim, int eights);

}  // namespace sequoia
