"""The five ops of a tree decoding step. Each is a room of its own; none knows of another."""

from .warped_logsumexp import WarpedNormaliser, warped_logsumexp

__all__ = [
    "WarpedNormaliser",
    "warped_logsumexp",
]
