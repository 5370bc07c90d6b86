"""Drafts: one file a source of proposed tokens, behind the door in source.py, and what a step hands them."""

from sequoia_kernels.drafts.clock import StageClock
from sequoia_kernels.drafts.folders import draft_from_folder
from sequoia_kernels.drafts.given import draft_source
from sequoia_kernels.drafts.layers import LayersDraft
from sequoia_kernels.drafts.levels import DraftLevel, StepTree, TokenBuffers, TreeLayout, each_tree
from sequoia_kernels.drafts.lookup import LookupDraft, LookupDrafting
from sequoia_kernels.drafts.medusa import MedusaDraft
from sequoia_kernels.drafts.model import ModelDraft
from sequoia_kernels.drafts.mtp import MtpDraft
from sequoia_kernels.drafts.source import Drafting, DraftSource
from sequoia_kernels.drafts.state import DecodingState, request_seeds
from sequoia_kernels.drafts.vocabulary import TokenPairing, pair_tokens

__all__ = [
    "DecodingState",
    "DraftLevel",
    "DraftSource",
    "Drafting",
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
    "draft_from_folder",
    "draft_source",
    "each_tree",
    "pair_tokens",
    "request_seeds",
]
