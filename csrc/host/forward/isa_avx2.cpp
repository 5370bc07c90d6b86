// The forward for one set of instructions; CMakeLists.txt has the flags.

#if defined(SEQUOIA_X86)

#include "work.h"

namespace sequoia::forward {

void work_avx2(const Pass& pass, int thread) { Worker(pass, thread).run(); }

}  // namespace sequoia::forward

#endif
