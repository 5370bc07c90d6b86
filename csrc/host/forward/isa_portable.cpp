// The forward for one set of instructions; CMakeLists.txt has the flags.

#include "work.h"

namespace sequoia::forward {

void work_portable(const Pass& pass, int thread) { Worker(pass, thread).run(); }

}  // namespace sequoia::forward
