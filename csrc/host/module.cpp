// sequoia_kernels._host: the part of the package that always has native code behind it.
//
// Every other .cpp file of this directory exports one `void bind_<room>(pybind11::module_&)`. This file only declares
// and calls them. Functions take raw pointers, sizes and strides; nothing here knows torch, so one build serves every
// torch version and building needs none.

#include <pybind11/pybind11.h>

#ifdef SEQUOIA_HAS_TREE_SEARCH
void bind_tree_search(pybind11::module_& module);
#endif
#ifdef SEQUOIA_HAS_PHILOX
void bind_philox(pybind11::module_& module);
#endif
#ifdef SEQUOIA_HAS_OPS
void bind_ops(pybind11::module_& module);
#endif

PYBIND11_MODULE(_host, module) {
    module.doc() = "Host code of sequoia-kernels: tree search, Philox streams and the CPU backends of the ops.";
#ifdef SEQUOIA_HAS_TREE_SEARCH
    bind_tree_search(module);
#endif
#ifdef SEQUOIA_HAS_PHILOX
    bind_philox(module);
#endif
#ifdef SEQUOIA_HAS_OPS
    bind_ops(module);
#endif
}
