// What a caller's dictionary of memory and sizes says.

#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace sequoia {

inline std::uintptr_t address_of(const pybind11::dict& source, const char* name) {
    return source[name].cast<std::uintptr_t>();
}
inline std::int64_t number_of(const pybind11::dict& source, const char* name) {
    return source[name].cast<std::int64_t>();
}

}  // namespace sequoia
