// A launch of csrc/cuda/few_rows_kernel.h on a CPU, for ctypes.

#include "few_rows_kernel.h"

using namespace sequoia;

namespace {

template <typename Number, int HEAD_DIM>
void run(const FewRows& given, int tiles) {
    if (tiles == 1) {
        few_rows_kernel<Number, HEAD_DIM, 1>(given);
    } else if (tiles == 2) {
        few_rows_kernel<Number, HEAD_DIM, 2>(given);
    } else {
        few_rows_kernel<Number, HEAD_DIM, 4>(given);
    }
}

}  // namespace

// As launch_few_rows; 0 where it ended, 1 where all threads wait for each other.
extern "C" int few_rows_on_cpu(
    const std::int64_t* layers, int num_layers, const std::int64_t* addresses, const std::int64_t* strides,
    const std::int64_t* sizes, double eps, double scale, int is_float16, int together, int num_blocks, unsigned seed) {
    FewRows given = few_rows_given(layers, num_layers, addresses, strides, sizes, eps, scale);
    const int tiles = tiles_of_rows(given.num_rows);
    const std::size_t bytes = lay_out_shared_memory(given);
    const int num_phases = given.end_phase;
    for (int phase = 0; phase < num_phases; phase = given.end_phase) {
        given.first_phase = phase;
        given.end_phase = together ? num_phases : phase + 1;
        const auto call = [&] {
            if (sizes[9] == 64) {
                is_float16 ? run<Float16, 64>(given, tiles) : run<Bfloat16, 64>(given, tiles);
            } else {
                is_float16 ? run<Float16, 128>(given, tiles) : run<Bfloat16, 128>(given, tiles);
            }
        };
        if (!emulated::launch(static_cast<unsigned>(num_blocks), kThreads, bytes, seed + phase, call)) {
            return 1;
        }
    }
    return 0;
}
