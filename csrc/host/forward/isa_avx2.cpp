// The forward for one set of instructions; CMakeLists.txt has the flags.

#if defined(SEQUOIA_X86)

#include "peak_loops.h"
#include "work.h"

namespace sequoia::forward {

void work_avx2(const Pass& pass, int thread) { Worker(pass, thread).run(); }
void measure_avx2(const Peak& peak, int thread) { measure(peak, thread); }

}  // namespace sequoia::forward

#endif
