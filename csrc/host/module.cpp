// sequoia_kernels._host: the part of the package that always has native code behind it.
//
// Every other .cpp file of this directory exports one `void bind_<room>(pybind11::module_&)`. This file only declares
// and calls them. Functions take raw pointers, sizes and strides; nothing here knows torch, so one build serves every
// torch version and building needs none.

#include <pybind11/pybind11.h>

void bind_tree_search(pybind11::module_& module);
void bind_philox(pybind11::module_& module);
void bind_ops(pybind11::module_& module);
void bind_forward(pybind11::module_& module);
void bind_tree_growth(pybind11::module_& module);
void bind_tree_commit(pybind11::module_& module);

PYBIND11_MODULE(_host, module) {
    module.doc() = "Host code of sequoia-kernels: tree search, Philox streams and the CPU backends of the ops.";
    bind_tree_search(module);
    bind_philox(module);
    bind_ops(module);
    bind_forward(module);
    bind_tree_growth(module);
    bind_tree_commit(module);
}
