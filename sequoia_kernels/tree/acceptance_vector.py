"""The rules that every acceptance vector obeys, and a typical one."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["SUM_TOLERANCE", "TYPICAL_ACCEPTANCE", "check_acceptance", "vector_of_chances"]

# Entries are probabilities of disjoint events; measured vectors may exceed 1 by their rounding.
SUM_TOLERANCE = 1e-9

# About what a small draft of a large target shows: trees that are timed for no pair in particular are optimal for it.
TYPICAL_ACCEPTANCE = (0.6, 0.12, 0.05, 0.03, 0.02, 0.015, 0.012, 0.01, 0.008, 0.007, 0.006, 0.005, 0.004, 0.003, 0.002)


def vector_of_chances(chances: np.ndarray) -> np.ndarray:
    """Give the acceptance vector of conditional chances: a[k] = h[k] * product over j < k of (1 - h[j]).

    Args:
        chances: chance of each rank's child once those before it were rejected. [..., ranks] float64.

    Returns:
        The vectors. [..., ranks] float64.
    """
    vectors = chances.copy()
    vectors[..., 1:] *= np.cumprod(1 - chances, axis=-1)[..., :-1]
    return vectors


def check_acceptance(acceptance: Any, caller: str) -> np.ndarray:
    """Return an acceptance vector as a new float64 array, or say what is wrong with it.

    Args:
        acceptance: probability that the child of each rank is the accepted one. [max_children], real numbers >= 0 whose
            sum is at most 1; a sequence, a NumPy array or a CPU tensor. Element 0 belongs to the first child.
        caller: function named in the messages.

    Returns:
        The vector. [max_children], float64, contiguous.

    Raises:
        TypeError: the entries are not real numbers.
        ValueError: the vector is empty or not one-dimensional, or an entry or the sum is out of range.

    Example:
        >>> check_acceptance([0.6, 0.2], "optimal_tree").tolist()
        [0.6, 0.2]
    """
    try:
        raw = np.asarray(acceptance)
    except (TypeError, ValueError, RuntimeError) as reason:  # ragged lists; tensors on a device
        raise TypeError(
            f"{caller}: acceptance must be a sequence of real numbers, got {type(acceptance).__name__} ({reason})"
        ) from None
    if raw.ndim != 1:
        raise ValueError(f"{caller}: acceptance must have shape [max_children], got {list(raw.shape)}")
    if raw.size == 0:
        raise ValueError(f"{caller}: acceptance must have at least 1 entry, got 0; [0.0] says that nothing is accepted")
    if raw.dtype.kind not in "fiu":
        raise TypeError(f"{caller}: acceptance must be a sequence of real numbers, got entries of type {raw.dtype}")
    # entries are rounded to float64 first: what is checked is what is used
    vector = np.array(raw, dtype=np.float64)
    if not np.isfinite(vector).all():
        rank = int(np.flatnonzero(~np.isfinite(vector))[0])
        raise ValueError(f"{caller}: acceptance must have finite entries, got acceptance[{rank}] = {vector[rank]}")
    if vector.min() < 0.0:
        rank = int(np.flatnonzero(vector < 0.0)[0])
        raise ValueError(f"{caller}: acceptance must have entries >= 0, got acceptance[{rank}] = {vector[rank]}")
    total = float(vector.sum())
    if total > 1.0 + SUM_TOLERANCE:
        raise ValueError(f"{caller}: acceptance must have a sum of at most 1, got {total:.12g}")
    return vector
