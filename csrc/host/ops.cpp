// Collects the CPU backends of the ops: one file an op, each with a `bind_<op>`.

#include <pybind11/pybind11.h>

namespace py = pybind11;

void bind_compact_kv_cache(py::module_& module);
void bind_expand_tree_mask(py::module_& module);
void bind_sample_without_replacement(py::module_& module);
void bind_tree_attention(py::module_& module);
void bind_verify_tree(py::module_& module);
void bind_warped_logsumexp(py::module_& module);

void bind_ops(py::module_& module) {
    bind_compact_kv_cache(module);
    bind_expand_tree_mask(module);
    bind_sample_without_replacement(module);
    bind_tree_attention(module);
    bind_verify_tree(module);
    bind_warped_logsumexp(module);
}
