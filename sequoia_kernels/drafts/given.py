"""What `generate` takes as a draft, as a source."""

from __future__ import annotations

from typing import Any

from sequoia_kernels.drafts.layers import first_layers
from sequoia_kernels.drafts.lookup import LookupDraft
from sequoia_kernels.drafts.model import ModelDraft
from sequoia_kernels.drafts.source import DraftSource
from sequoia_kernels.drafts.vocabulary import pair_tokens
from sequoia_kernels.models import TreeModel, adapt

__all__ = ["LAYERS", "LOOKUP", "draft_source"]

LOOKUP = "lookup"
LAYERS = "layers:"  # and a number


def draft_source(
    draft: Any,
    target: TreeModel | None = None,
    *,
    compile: bool | str = False,
    lookup: bool = False,
    tokenizers: tuple[Any, Any] | None = None,
) -> Any:
    """Give a draft as a source: a Hugging Face model, a `TreeModel`, a source itself, "lookup", or "layers:8", say.

    Changes of its models since they were last used are noticed here.

    Args:
        draft: the draft; None for none.
        target: the target, which lookup is for, and whose first layers "layers:8" names.
        compile: as in `adapt`; a source is left alone.
        lookup: look tokens up in the text besides.
        tokenizers: the target's and the draft's, of a model that may have other tokens than the target.

    Returns:
        The source; None without a draft and lookup.

    Raises:
        TypeError: `lookup` is no bool, or lookup or layers have no target.
        ValueError: a string that names no draft, or not a number of the target's layers.
        UnsupportedModelError: a model cannot decode trees.
    """
    if not isinstance(lookup, bool):
        raise TypeError(f"generate: lookup must be True or False, got {lookup!r}")
    if isinstance(draft, str):
        number = draft.removeprefix(LAYERS)
        if draft == LOOKUP:
            draft, lookup = None, True
        elif draft != number and number.isdecimal():
            if target is None:
                raise TypeError("draft_source: target must be given for layers, got None")
            draft = first_layers(target, int(number))
        else:
            raise ValueError(
                f"generate: draft must be a model, a draft source, {LOOKUP!r} or '{LAYERS}' and a number of layers, "
                f"got {draft!r}"
            )
    source = draft
    if draft is not None and not isinstance(draft, DraftSource):
        model = adapt(draft, compile=compile)
        pairing = None
        if tokenizers is not None and target is not None:
            pairing = pair_tokens(*tokenizers, target.vocab_size, model.vocab_size)
        source = ModelDraft(model, pairing)
    elif draft is not None:
        for model in draft.models:
            model.refresh()
    if not lookup or isinstance(source, LookupDraft):
        return source
    if target is None:
        raise TypeError("draft_source: target must be given for lookup, got None")
    return LookupDraft(target, source)
