"""Microbenchmarks that write the hardware profile."""

from sequoia_kernels.measure.bandwidth import measure_bandwidth
from sequoia_kernels.measure.microbenchmarks import measure_microbenchmarks
from sequoia_kernels.measure.pair_times import affordable_node_counts, measure_profile
from sequoia_kernels.measure.timing import Timing, time_calls

__all__ = [
    "Timing", "affordable_node_counts", "measure_bandwidth", "measure_microbenchmarks", "measure_profile", "time_calls",
]  # fmt: skip
