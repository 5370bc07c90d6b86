// few_rows_kernel.h for bfloat16.

#include "few_rows_kernel.h"
#include "few_rows_kernels.h"

namespace sequoia {
namespace {

template <int HEAD_DIM>
FewRowsKernel of_eights(int eights) {
    return eights == 1   ? few_rows_kernel<Bfloat16, HEAD_DIM, 1>
           : eights == 2 ? few_rows_kernel<Bfloat16, HEAD_DIM, 2>
                         : few_rows_kernel<Bfloat16, HEAD_DIM, 4>;
}

}  // namespace

FewRowsKernel few_rows_bfloat16(int head_dim, int eights) {
    return head_dim == 64 ? of_eights<64>(eights) : of_eights<128>(eights);
}

}  // namespace sequoia
