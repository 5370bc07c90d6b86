// Launch checks shared by all CUDA kernels of the package. Framework-free: device pointers arrive as integers, sizes and
// strides as int64, the caller's stream as the integer value of its cudaStream_t.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace sequoia {

// What the reader of an error can do about it; empty where the runtime's own text is enough.
inline const char* launch_hint(cudaError_t status) {
    switch (status) {
        case cudaErrorInsufficientDriver:
            return "; no NVIDIA driver is loaded, or it is older than the CUDA toolkit this package was built with: "
                   "update the driver, or rebuild with an older nvcc";
        case cudaErrorNoDevice:
            return "; the driver sees no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES";
        case cudaErrorNoKernelImageForDevice:
        case cudaErrorInvalidDeviceFunction:
        case cudaErrorUnsupportedPtxVersion:
            return "; this build has no code for this GPU: rebuild with SEQUOIA_CUDA_ARCHS naming its architecture";
        case cudaErrorIllegalAddress:
        case cudaErrorAssert:
        case cudaErrorLaunchFailure:
            return "; the fault may come from an earlier kernel of this process: run with CUDA_LAUNCH_BLOCKING=1";
        default:
            return "";
    }
}

// Throws std::runtime_error (RuntimeError in Python) naming what failed, the runtime's text and a hint.
inline void check_cuda(cudaError_t status, const char* what) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) +
                                 ")" + launch_hint(status));
    }
}

// Call after every <<<>>>. Asynchronous faults of this launch are reported by a later call, as everywhere in CUDA.
inline void check_launch(const char* kernel_name) { check_cuda(cudaGetLastError(), kernel_name); }

// What checks a launch's arguments before anything is written: throws std::invalid_argument (ValueError in Python) in the
// words of the package's errors.
inline auto requirements_of(const char* kernel) {
    return [kernel](bool condition, const char* argument, const char* rule, std::int64_t actual) {
        if (!condition) {
            throw std::invalid_argument(std::string(kernel) + ": " + argument + " must " + rule + ", got " +
                                        std::to_string(actual));
        }
    };
}

inline cudaStream_t as_stream(std::int64_t stream) {
    return reinterpret_cast<cudaStream_t>(static_cast<std::uintptr_t>(stream));
}

template <typename T>
T* as_pointer(std::int64_t address) {
    return reinterpret_cast<T*>(static_cast<std::uintptr_t>(address));
}

// Makes `device` current and restores the caller's device at the end of the scope. The static runtime in this module
// keeps a current device of its own, so the stream's device is named by the caller, never assumed.
class DeviceGuard {
public:
    DeviceGuard(int device, const char* what) : device_(device) {
        check_cuda(cudaGetDevice(&previous_), what);
        if (previous_ != device_) {
            check_cuda(cudaSetDevice(device_), what);
        }
    }
    ~DeviceGuard() {
        if (previous_ != device_) {
            cudaSetDevice(previous_);
        }
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    int device_;
    int previous_ = 0;
};

}  // namespace sequoia
