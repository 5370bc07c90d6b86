"""Lossless verification: which path of a drafted token tree the target accepts, and the token that follows it."""

from .op import VerifiedPath, verify_tree

__all__ = ["VerifiedPath", "verify_tree"]
