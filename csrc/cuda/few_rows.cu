// The launch of few_rows_kernel.h.

#include "few_rows_kernel.h"
#include "few_rows_kernels.h"
#include "launch.h"

#include <vector>

namespace sequoia {

// Addresses, strides and sizes in the order of few_rows.h. One block a multiprocessor. `is_float16`: else the numbers are
// bfloat16.
void launch_few_rows(
    int device,
    std::int64_t stream,
    const std::vector<std::int64_t>& layers,
    const std::vector<std::int64_t>& addresses,
    const std::vector<std::int64_t>& strides,
    const std::vector<std::int64_t>& sizes,
    double eps,
    double scale,
    bool is_float16) {
    const auto require = requirements_of("few_rows");
    const auto count_of = [](const std::vector<std::int64_t>& numbers) { return static_cast<std::int64_t>(numbers.size()); };
    const std::int64_t num_layers = count_of(layers) / kFewRowsLayerAddresses;
    require(num_layers >= 1 && num_layers <= kFewRowsMaxLayers && count_of(layers) == num_layers * kFewRowsLayerAddresses,
            "layers", "be 8 addresses of each of 1 to 32 layers", count_of(layers));
    require(count_of(addresses) == kFewRowsAddresses, "addresses", "be 15", count_of(addresses));
    require(count_of(strides) == kFewRowsStrides, "strides", "be 6", count_of(strides));
    require(count_of(sizes) == kFewRowsSizes, "sizes", "be 13", count_of(sizes));
    const std::int64_t num_rows = sizes[1], num_nodes = sizes[2], head_dim = sizes[9], width = sizes[10], inner = sizes[11];
    require(num_rows >= 1 && num_rows <= 32, "rows", "be in [1, 32]", num_rows);
    require(num_nodes >= 1 && num_rows % num_nodes == 0, "nodes", "divide the rows", num_nodes);
    require(sizes[4] >= 1 && sizes[4] <= kFewRowsMaxTreeRows, "tree rows", "be in [1, 1024]", sizes[4]);
    require(sizes[5] >= 1 && sizes[5] <= kFewRowsMaxSlots, "slots", "be in [1, 4096]", sizes[5]);
    require(head_dim == 64 || head_dim == 128, "head_dim", "be 64 or 128", head_dim);
    require(sizes[8] >= 1 && sizes[7] % sizes[8] == 0, "kv_heads", "divide the heads", sizes[8]);
    require(width >= 32 && width % 32 == 0 && width <= kFewRowsMaxWidth, "width", "be a multiple of 32 up to 2048", width);
    require(inner >= 32 && inner % 32 == 0, "inner width", "be a multiple of 32", inner);
    require(strides[4] <= INT32_MAX / sizes[5], "slot stride", "reach all slots in 2^31 elements", strides[4]);
    const DeviceGuard guard(device, "few_rows");
    FewRows given = few_rows_given(layers.data(), static_cast<int>(num_layers), addresses.data(), strides.data(), sizes.data(),
                                   eps, scale);
    int num_blocks = 0;
    int most_bytes = 0;
    check_cuda(cudaDeviceGetAttribute(&num_blocks, cudaDevAttrMultiProcessorCount, device), "few_rows");
    check_cuda(cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "few_rows");
    const std::size_t bytes =
        lay_out_shared_memory(given, static_cast<int>(head_dim), static_cast<std::size_t>(most_bytes));
    require(bytes > 0, "shared memory", "hold what few rows of this width need", most_bytes);
    const FewRowsKernel kernel =
        (is_float16 ? few_rows_float16 : few_rows_bfloat16)(static_cast<int>(head_dim), eights_of(given.num_rows));
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
               "few_rows_kernel");
    void* arguments[] = {&given};
    check_cuda(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(num_blocks), dim3(kThreads), arguments,
                                           bytes, as_stream(stream)),
               "few_rows_kernel");
}

// Asks the driver for a kernel, as a launch would.
cudaError_t find_few_rows() {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, few_rows_bfloat16(64, 1));
}

}  // namespace sequoia
