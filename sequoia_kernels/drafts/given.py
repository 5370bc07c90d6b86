"""What `generate` takes as a draft, as a source."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from sequoia_kernels.drafts.assistant import AssistantDraft, is_assistant
from sequoia_kernels.drafts.folders import draft_from_folder
from sequoia_kernels.drafts.layers import first_layers
from sequoia_kernels.drafts.lookup import LookupDraft
from sequoia_kernels.drafts.model import ModelDraft
from sequoia_kernels.drafts.mtp import MtpDraft
from sequoia_kernels.drafts.source import DraftSource, shares_split_target
from sequoia_kernels.drafts.vocabulary import TokenPairing, pair_tokens
from sequoia_kernels.errors import UnsupportedModelError
from sequoia_kernels.models import TreeModel, adapt, load_model

__all__ = ["LAYERS", "LOOKUP", "MTP", "draft_source", "is_word"]

LOOKUP, MTP = "lookup", "mtp"
LAYERS = "layers:"  # and a number


def is_word(draft: Any) -> bool:
    """Tell whether a string names a draft that needs no folder."""
    return isinstance(draft, str) and (draft in (LOOKUP, MTP) or draft.startswith(LAYERS))


def draft_source(
    draft: Any,
    target: TreeModel | None = None,
    *,
    compile: bool | str = False,
    lookup: bool = False,
    tokenizer: Any | None = None,
    draft_tokenizer: Any | None = None,
) -> Any:
    """Give a draft as a source.

    Changes of its models since they were last used are noticed here.

    Args:
        draft: a Hugging Face model, a Gemma 4 assistant among them, a `TreeModel`, a source itself, "lookup",
            "layers:8" (say) for the target's own first layers, "mtp" for its multi-token prediction modules, or the
            folder or hub id of a published draft or of a model, which is loaded to the target's device; None for none.
        target: the target, which lookup, layers and what is loaded are for.
        compile: as in `adapt`; a source is left alone.
        lookup: look tokens up in the text besides.
        tokenizer: the target's tokenizer.
        draft_tokenizer: that of a model which may have other tokens than the target; needs `tokenizer`. A model that is
            loaded comes with its own.

    Returns:
        The source; None without a draft and lookup.

    Raises:
        TypeError: `lookup` is no bool, or the target or a tokenizer is missing.
        FileNotFoundError: a name that is no folder, and no hub id that can be reached or is cached.
        ValueError: a folder cannot be read, its draft does not fit the target, or no number of its layers.
        UnsupportedModelError: a model cannot decode trees.
    """
    if not isinstance(lookup, bool):
        raise TypeError(f"generate: lookup must be True or False, got {lookup!r}")
    if draft_tokenizer is not None and tokenizer is None:
        raise TypeError("generate: tokenizer must be given with draft_tokenizer, got None")
    named = isinstance(draft, (str, os.PathLike))
    of_target = is_assistant(draft) or (is_word(draft) and draft != LOOKUP)
    if of_target and target is not None and target.ranks is not None:
        raise UnsupportedModelError(shares_split_target(repr(draft) if named else type(draft).__name__))
    if target is None and (lookup or named):
        raise TypeError(f"draft_source: target must be given for {'lookup' if lookup else draft}, got None")
    if named and draft == LOOKUP:
        draft, lookup = None, True
    elif named:
        assert target is not None
        draft, draft_tokenizer = _named(draft, target, tokenizer, draft_tokenizer)
    source = draft
    if is_assistant(draft):
        if target is None:
            raise TypeError(f"draft_source: target must be given for {type(draft).__name__}, got None")
        source = AssistantDraft(draft, target)
    elif draft is not None and not isinstance(draft, DraftSource):
        model = adapt(draft, compile=compile)
        source = ModelDraft(model, _pairing(target, model, tokenizer, draft_tokenizer))
    elif draft is not None:
        for model in draft.models:
            model.refresh()
    if not lookup or isinstance(source, LookupDraft):
        return source
    assert target is not None
    return LookupDraft(target, source)


def _named(name: str | os.PathLike[str], target: TreeModel, tokenizer: Any, draft_tokenizer: Any) -> tuple[Any, Any]:
    """Give what a name stands for: a part of the target, a published draft, or a model with its tokenizer."""
    if name == MTP:
        return MtpDraft.from_target(target), None
    if isinstance(name, str) and name.startswith(LAYERS):
        number = name.removeprefix(LAYERS)
        if not number.isdecimal():
            raise ValueError(f"generate: draft must name a number of layers behind {LAYERS!r}, got {name!r}")
        return first_layers(target, int(number)), None
    if not os.fspath(name):
        raise ValueError("generate: draft must not be an empty string")
    try:
        source = draft_from_folder(name, target)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"generate: draft must be a model, a draft source, {LOOKUP!r} or the folder or hub id of one, "
            f"got {os.fspath(name)!r}: {error}"
        ) from error
    if source is not None:
        return source, None
    if tokenizer is not None and draft_tokenizer is None:
        from transformers import AutoTokenizer

        # A folder without one is taken for a model of the target's tokens.
        with contextlib.suppress(OSError, ValueError):
            draft_tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return load_model(name, device=target.device), draft_tokenizer


def _pairing(target: TreeModel | None, model: TreeModel, tokenizer: Any, draft_tokenizer: Any) -> TokenPairing | None:
    if target is None or draft_tokenizer is None:
        return None
    return pair_tokens(tokenizer, draft_tokenizer, target.vocab_size, model.vocab_size, model.device)
