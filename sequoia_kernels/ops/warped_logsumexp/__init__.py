"""Log-normaliser and cut of logits under temperature, top-k and top-p."""

from .op import WarpedNormaliser, warped_logsumexp

__all__ = ["WarpedNormaliser", "warped_logsumexp"]
