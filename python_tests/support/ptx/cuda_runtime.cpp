// Stands in for the CUDA runtime under launch code that nvcc compiled: a launch is handed to a function of Python's,
// which runs the kernel's PTX in the emulator. Everything else succeeds and does nothing.
#include <cuda_runtime_api.h>

#include <cstddef>
#include <map>
#include <string>

namespace {

using Launch = int (*)(
    const char* kernel, const unsigned* grid, const unsigned* block, std::size_t shared_bytes, void** arguments,
    int is_cooperative);

Launch on_launch = nullptr;

// The device, and the shared memory that a block may have without asking for more.
int num_multiprocessors = 1;
int most_shared_bytes = 48 << 10;
constexpr std::size_t kUsualSharedBytes = 48 << 10;

struct Configuration {
    dim3 grid, block;
    std::size_t shared_bytes;
    void* stream;
};
Configuration configuration; // of the <<<>>> that is being made

struct Kernel {
    std::string name;
    std::size_t most_bytes = kUsualSharedBytes;
};

std::map<const void*, Kernel>& kernels() {
    static std::map<const void*, Kernel> registered;
    return registered;
}

cudaError_t launch(
    const void* function, dim3 grid, dim3 block, void** arguments, std::size_t shared_bytes, bool is_cooperative) {
    const auto found = kernels().find(function);
    if (found == kernels().end() || on_launch == nullptr) {
        return cudaErrorInvalidDeviceFunction;
    }
    if (shared_bytes > found->second.most_bytes) {
        return cudaErrorInvalidValue;
    }
    if (is_cooperative && grid.x * grid.y * grid.z > static_cast<unsigned>(num_multiprocessors)) {
        return cudaErrorCooperativeLaunchTooLarge;
    }
    const unsigned blocks[3] = {grid.x, grid.y, grid.z}, threads[3] = {block.x, block.y, block.z};
    const bool ran = on_launch(found->second.name.c_str(), blocks, threads, shared_bytes, arguments, is_cooperative) == 0;
    return ran ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace

extern "C" {

void sequoia_on_launch(Launch function) { on_launch = function; }
void sequoia_device(int multiprocessors, int shared_bytes) {
    num_multiprocessors = multiprocessors;
    most_shared_bytes = shared_bytes;
}

void** __cudaRegisterFatBinary(void*) {
    static void* handle = nullptr;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(
    void**, const char* host_function, char*, const char* device_name, int, uint3*, uint3*, dim3*, dim3*, int*) {
    kernels()[host_function].name = device_name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, std::size_t shared_bytes, struct CUstream_st* stream) {
    configuration = {grid, block, shared_bytes, stream};
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, std::size_t* shared_bytes, void* stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared_bytes = configuration.shared_bytes;
    *static_cast<void**>(stream) = configuration.stream;
    return cudaSuccess;
}

// CUDA 12 launches by the host's function, CUDA 13 by a handle, which is that function here.
cudaError_t cudaLaunchKernel(
    const void* function, dim3 grid, dim3 block, void** arguments, std::size_t shared_bytes, cudaStream_t) {
    return launch(function, grid, block, arguments, shared_bytes, false);
}
cudaError_t cudaLaunchCooperativeKernel(
    const void* function, dim3 grid, dim3 block, void** arguments, std::size_t shared_bytes, cudaStream_t) {
    return launch(function, grid, block, arguments, shared_bytes, true);
}
cudaError_t __cudaGetKernel(void** kernel, const void* function) {
    *kernel = const_cast<void*>(function);
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(
    void* kernel, dim3 grid, dim3 block, void** arguments, std::size_t shared_bytes, cudaStream_t stream) {
    return cudaLaunchKernel(kernel, grid, block, arguments, shared_bytes, stream);
}
char __cudaInitModule(void**) { return 1; }

cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    if (attribute != cudaDevAttrMultiProcessorCount && attribute != cudaDevAttrMaxSharedMemoryPerBlockOptin) {
        return cudaErrorInvalidValue;
    }
    *value = attribute == cudaDevAttrMultiProcessorCount ? num_multiprocessors : most_shared_bytes;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
    const auto found = kernels().find(function);
    if (found == kernels().end() || attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > most_shared_bytes) {
        return cudaErrorInvalidValue;
    }
    found->second.most_bytes = static_cast<std::size_t>(value);
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "the emulated launch failed"; }
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorLaunchFailure"; }

}  // extern "C"
