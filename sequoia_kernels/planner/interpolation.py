"""Reading times between the sizes that were measured: monotone, straight between knots, stated beyond them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["MonotoneGrid", "isotonic"]


class MonotoneGrid:
    """Times on a grid of two sizes, monotone in both, with interpolation and stated extrapolation.

    Noise is removed by isotonic regression (pool adjacent violators), first along the second axis and then along the
    first; it is order preserving, so the second pass keeps what the first made. In between times are piecewise linear.
    Below the first knot of an axis they stay at its value (a smaller size is not claimed to be cheaper). Above the last
    they go on linearly with the larger of the last segment's slope and the whole axis's mean slope (a larger size is
    not claimed to be cheaper than it was so far); an axis of one knot is constant. Each column goes on along the first
    axis by its own slope, but not below the column before it; along the second axis all rows take the steepest row's.

    Args:
        first: knots of the first axis, increasing. [X]
        second: knots of the second axis, increasing. [Y]
        values: times, positive. [X, Y]

    Example:
        >>> grid = MonotoneGrid([0], [1, 2, 4], [[1.0, 3.0, 2.0]])
        >>> [float(grid.at(0, size)) for size in (1, 2, 3, 4)]
        [1.0, 2.5, 2.5, 2.5]
    """

    def __init__(self, first: Sequence[float], second: Sequence[float], values: ArrayLike) -> None:
        self.first = np.asarray(first, dtype=np.float64)
        self.second = np.asarray(second, dtype=np.float64)
        table = np.array(values, dtype=np.float64)
        for row in range(table.shape[0]):
            table[row] = isotonic(table[row])
        for column in range(table.shape[1]):
            table[:, column] = isotonic(table[:, column])
        self.values = table
        self._first_slope = _end_slope(self.first, table)  # [Y]
        self._second_slope = float(_end_slope(self.second, table.T).max())

    def at(self, first: float, second: ArrayLike) -> NDArray[np.float64]:
        """Give the time at one size of the first axis and one or many of the second."""
        place = float(np.interp(first, self.first, np.arange(self.first.size)))
        low = int(place)
        high = min(low + 1, self.first.size - 1)
        row = self.values[low] + (place - low) * (self.values[high] - self.values[low])
        if first > self.first[-1]:
            row = np.maximum.accumulate(row + (first - self.first[-1]) * self._first_slope)
        sizes = np.asarray(second, dtype=np.float64)
        beyond = np.maximum(sizes - self.second[-1], 0)
        return np.asarray(np.interp(sizes, self.second, row) + beyond * self._second_slope)


def isotonic(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least-squares non-decreasing fit, by pooling adjacent violators."""
    blocks: list[tuple[float, int]] = []  # (mean, length), means increasing
    for value in values:
        mean, length = float(value), 1
        while blocks and blocks[-1][0] > mean:
            left_mean, left_length = blocks.pop()
            mean = (left_mean * left_length + mean * length) / (left_length + length)
            length += left_length
        blocks.append((mean, length))
    return np.repeat([mean for mean, _ in blocks], [length for _, length in blocks])


def _end_slope(knots: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Slopes along the first axis above its last knot, for each column of values."""
    if knots.size == 1:
        return np.zeros(values.shape[1])
    last = (values[-1] - values[-2]) / (knots[-1] - knots[-2])
    mean = (values[-1] - values[0]) / (knots[-1] - knots[0])
    return np.asarray(np.maximum(last, mean))
