// A launch of csrc/cuda/few_rows_kernel.h on a CPU, for ctypes.

#include "few_rows_kernel.h"

using namespace sequoia;

namespace {

template <typename Number, int HEAD_DIM>
void run(const FewRows& given) {
    const int eights = eights_of(given.num_rows);
    if (eights == 1) {
        few_rows_kernel<Number, HEAD_DIM, 1>(given);
    } else if (eights == 2) {
        few_rows_kernel<Number, HEAD_DIM, 2>(given);
    } else {
        few_rows_kernel<Number, HEAD_DIM, 4>(given);
    }
}

}  // namespace

// As launch_few_rows; 0 where it ended, 1 where all threads wait for each other, 2 where shared memory does not suffice.
extern "C" int few_rows_on_cpu(
    const std::int64_t* layers, int num_layers, const std::int64_t* addresses, const std::int64_t* strides,
    const std::int64_t* sizes, double eps, double scale, int is_float16, int num_blocks, std::int64_t shared_bytes,
    unsigned seed) {
    FewRows given = few_rows_given(layers, num_layers, addresses, strides, sizes, eps, scale);
    const int head_dim = static_cast<int>(sizes[9]);
    const std::size_t bytes = lay_out_shared_memory(given, head_dim, static_cast<std::size_t>(shared_bytes));
    if (bytes == 0) {
        return 2;
    }
    const bool ends = emulated::launch(static_cast<unsigned>(num_blocks), kThreads, bytes, seed, [&] {
        if (head_dim == 64) {
            is_float16 ? run<Float16, 64>(given) : run<Bfloat16, 64>(given);
        } else {
            is_float16 ? run<Float16, 128>(given) : run<Bfloat16, 128>(given);
        }
    });
    return ends ? 0 : 1;
}
