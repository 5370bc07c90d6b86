// The forward for one set of instructions; CMakeLists.txt has the flags.

#if defined(SEQUOIA_X86)

#include "peak_loops.h"
#include "work.h"

namespace sequoia::forward {

void work_avx512(const Pass& pass, int thread) { Worker(pass, thread).run(); }
#if defined(SEQUOIA_AVX512_BF16)
void work_avx512_bf16(const Pass& pass, int thread) { Worker(pass, thread, true).run(); }
#endif
void measure_avx512(const Peak& peak, int thread) { measure(peak, thread); }

}  // namespace sequoia::forward

#endif
