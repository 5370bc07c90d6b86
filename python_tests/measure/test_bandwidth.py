"""measure_bandwidth: what it reports, and what it refuses."""

from __future__ import annotations

import pytest

from sequoia_kernels.measure import measure_bandwidth


def test_a_cpu_has_the_bandwidth_of_its_memory():
    found = measure_bandwidth("cpu", num_bytes=1 << 16, seconds=0.005)
    assert list(found) == ["memory_copy"]
    assert 0 < found["memory_copy"] < 1e6


@pytest.mark.parametrize("num_bytes", [0, -1, 1.5, True])
def test_bad_sizes_are_refused(num_bytes):
    with pytest.raises(ValueError, match="num_bytes must be a positive integer"):
        measure_bandwidth("cpu", num_bytes=num_bytes)
