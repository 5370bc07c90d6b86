"""DFlash and DSpark: drafts that score a block of depths in one forward on the target's hidden states."""

from sequoia_kernels.drafts.dflash.loading import dflash_from_model, load_dflash
from sequoia_kernels.drafts.dflash.source import DFlashDraft

__all__ = ["DFlashDraft", "dflash_from_model", "load_dflash"]
