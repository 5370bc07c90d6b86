"""Drafts: one file a source of proposed tokens, behind the door in source.py, and what a step hands them."""

from sequoia_kernels.drafts.assistant import AssistantDraft
from sequoia_kernels.drafts.clock import StageClock
from sequoia_kernels.drafts.dflash import DFlashDraft, dflash_from_model
from sequoia_kernels.drafts.eagle3 import Eagle3Draft
from sequoia_kernels.drafts.folders import DraftFolder, draft_from_folder, format_of
from sequoia_kernels.drafts.given import LOOKUP, draft_source, is_word
from sequoia_kernels.drafts.layers import LayersDraft
from sequoia_kernels.drafts.levels import DraftLevel, StepTree, TokenBuffers, TreeLayout, each_tree
from sequoia_kernels.drafts.lookup import LookupDraft, LookupDrafting
from sequoia_kernels.drafts.medusa import MedusaDraft
from sequoia_kernels.drafts.model import ModelDraft
from sequoia_kernels.drafts.mtp import MtpDraft
from sequoia_kernels.drafts.source import Drafting, DraftSource, shares_split_target
from sequoia_kernels.drafts.state import DecodingState, request_seeds
from sequoia_kernels.drafts.vocabulary import TokenPairing, pair_tokens

__all__ = [
    "LOOKUP",
    "AssistantDraft",
    "DFlashDraft",
    "DecodingState",
    "DraftFolder",
    "DraftLevel",
    "DraftSource",
    "Drafting",
    "Eagle3Draft",
    "LayersDraft",
    "LookupDraft",
    "LookupDrafting",
    "MedusaDraft",
    "ModelDraft",
    "MtpDraft",
    "StageClock",
    "StepTree",
    "TokenBuffers",
    "TokenPairing",
    "TreeLayout",
    "dflash_from_model",
    "draft_from_folder",
    "draft_source",
    "each_tree",
    "format_of",
    "is_word",
    "pair_tokens",
    "request_seeds",
    "shares_split_target",
]
