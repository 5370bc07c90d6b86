// few_rows_kernel.h for float16.

#include "few_rows_kernel.h"
#include "few_rows_kernels.h"

namespace sequoia {
namespace {

template <int HEAD_DIM>
FewRowsKernel of_tiles(int tiles) {
    return tiles == 1 ? few_rows_kernel<Float16, HEAD_DIM, 1>
                      : tiles == 2 ? few_rows_kernel<Float16, HEAD_DIM, 2> : few_rows_kernel<Float16, HEAD_DIM, 4>;
}

}  // namespace

FewRowsKernel few_rows_float16(int head_dim, int tiles) { return head_dim == 64 ? of_tiles<64>(tiles) : of_tiles<128>(tiles); }

}  // namespace sequoia
