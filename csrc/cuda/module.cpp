// sequoia_kernels._cuda: bindings of the CUDA kernels. Each kernel file defines a launch function of integers only; this
// file declares and binds it. The runtime is linked statically, so the module imports on a machine without a driver.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "launch.h"

namespace py = pybind11;

namespace sequoia {

void launch_compact_kv_cache(
    int device,
    std::int64_t stream,
    std::int64_t cache_table,
    std::int64_t num_caches,
    std::int64_t num_slices,
    std::int64_t accepted_nodes,
    std::int64_t stride_nodes_request,
    std::int64_t stride_nodes_level,
    std::int64_t num_levels,
    std::int64_t num_accepted,
    std::int64_t stride_num_accepted,
    std::int64_t cache_lens,
    std::int64_t stride_cache_lens,
    std::int64_t length_bits,
    std::int64_t batch_size,
    std::int64_t block_table,
    std::int64_t stride_table_request,
    std::int64_t stride_table_page,
    std::int64_t page_size,
    std::int64_t max_pages);

cudaError_t find_compact_kv_cache();

void launch_few_rows(
    int device,
    std::int64_t stream,
    const std::vector<std::int64_t>& layers,
    const std::vector<std::int64_t>& addresses,
    const std::vector<std::int64_t>& strides,
    const std::vector<std::int64_t>& sizes,
    double eps,
    double scale,
    bool is_float16);

cudaError_t find_few_rows();

namespace {

// None for success, otherwise what failed. The query's own error must not be reported by the next launch.
py::object reason_of(cudaError_t status) {
    if (status == cudaSuccess) {
        return py::none();
    }
    cudaGetLastError();
    return py::str(std::string(cudaGetErrorString(status)) + launch_hint(status));
}

py::object unavailable_reason() {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    return reason_of(status == cudaSuccess && count == 0 ? cudaErrorNoDevice : status);
}

py::object device_reason(int device) {
    int previous = 0;
    cudaError_t status = cudaGetDevice(&previous);
    if (status == cudaSuccess) {
        status = cudaSetDevice(device);
        if (status == cudaSuccess) {
            status = find_compact_kv_cache();
            status = status == cudaSuccess ? find_few_rows() : status;
        }
        cudaSetDevice(previous);
    }
    return reason_of(status);
}

}  // namespace
}  // namespace sequoia

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "CUDA kernels of sequoia-kernels: raw pointers, strides in the units named, the caller's stream.";
    module.attr("architectures") = SEQUOIA_CUDA_ARCHITECTURES;
    module.attr("toolkit_version") = CUDART_VERSION;
    module.def("unavailable_reason", &sequoia::unavailable_reason,
               "Return None where a CUDA device can be used, otherwise the reason why not.");
    module.def("device_reason", &sequoia::device_reason, py::arg("device"),
               "Return None where this build has code that the device can run, otherwise the reason why not.");
    module.def("compact_kv_cache", &sequoia::launch_compact_kv_cache, py::arg("device"), py::arg("stream"),
               py::arg("cache_table"), py::arg("num_caches"), py::arg("num_slices"), py::arg("accepted_nodes"),
               py::arg("stride_nodes_request"), py::arg("stride_nodes_level"), py::arg("num_levels"),
               py::arg("num_accepted"), py::arg("stride_num_accepted"), py::arg("cache_lens"),
               py::arg("stride_cache_lens"), py::arg("length_bits"), py::arg("batch_size"), py::arg("block_table"),
               py::arg("stride_table_request"), py::arg("stride_table_page"), py::arg("page_size"),
               py::arg("max_pages"), "Launch the in-place compaction and the advance of cache_lens on the given stream.");
    module.def("few_rows", &sequoia::launch_few_rows, py::arg("device"), py::arg("stream"), py::arg("layers"),
               py::arg("addresses"), py::arg("strides"), py::arg("sizes"), py::arg("eps"), py::arg("scale"),
               py::arg("is_float16"),
               "Launch a forward of few rows through a small decoder on the given stream; see csrc/cuda/few_rows.h.");
}
