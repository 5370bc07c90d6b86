"""EAGLE-3 and P-EAGLE heads: published drafts of a layer or two on the target's own hidden states."""

from sequoia_kernels.drafts.eagle3.draft import Eagle3Draft

__all__ = ["Eagle3Draft"]
