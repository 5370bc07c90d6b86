"""Draws of several different tokens per row: how the draft's children of a tree node are chosen."""

from .op import SampledTokens, sample_without_replacement

__all__ = ["SampledTokens", "sample_without_replacement"]
