// The forward for one set of instructions; CMakeLists.txt has the flags.

#include "peak_loops.h"
#include "work.h"

namespace sequoia::forward {

void work_portable(const Pass& pass, int thread) { Worker(pass, thread).run(); }
void measure_portable(const Peak& peak, int thread) { measure(peak, thread); }

}  // namespace sequoia::forward
