// `launch_few_rows` for ctypes: its vectors as arrays, its exceptions as text.
#include <cstddef>
#include <cstdint>
#include <exception>
#include <string>
#include <vector>

namespace sequoia {

void launch_few_rows(
    int device, std::int64_t stream, const std::vector<std::int64_t>& layers, const std::vector<std::int64_t>& addresses,
    const std::vector<std::int64_t>& strides, const std::vector<std::int64_t>& sizes, double eps, double scale,
    bool is_float16);

}  // namespace sequoia

// Four lists, one behind the other, and how long each is. Returns what was thrown, null for nothing.
extern "C" const char* launch_few_rows(
    const std::int64_t* numbers, const std::int64_t* counts, double eps, double scale, int is_float16) {
    static std::string failure;
    std::vector<std::int64_t> lists[4];
    for (int i = 0; i < 4; ++i) {
        lists[i].assign(numbers, numbers + counts[i]);
        numbers += counts[i];
    }
    try {
        sequoia::launch_few_rows(0, 0, lists[0], lists[1], lists[2], lists[3], eps, scale, is_float16 != 0);
    } catch (const std::exception& error) {
        failure = error.what();
        return failure.c_str();
    }
    return nullptr;
}
