"""Folders and modules of DFlash and DSpark drafts to sources: which weights there must be, and what is shared."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sequoia_kernels.drafts.dflash.forms import DFlashForm, is_dflash, read_form
from sequoia_kernels.drafts.dflash.source import DFlashDraft
from sequoia_kernels.drafts.folders import DraftFolder, DraftFormat, register_format
from sequoia_kernels.drafts.source import shares_split_target
from sequoia_kernels.errors import UnsupportedModelError
from sequoia_kernels.models import TreeModel, adapt
from sequoia_kernels.vocabularies import VocabularyMap

__all__ = ["dflash_from_model", "load_dflash"]


def load_dflash(folder: DraftFolder, target: TreeModel) -> DFlashDraft:
    """Load a DFlash or DSpark draft for a target, on its device and in its dtype.

    Embeddings and head that the folder lacks, or has with the same numbers, are the target's own, without a copy.

    Args:
        folder: the folder.
        target: the target that the draft was trained for.

    Raises:
        ValueError: an option is not understood, a weight is missing, left over or of another shape, or the draft does
            not fit the target, or the target is split over ranks.
    """
    if target.ranks is not None:
        raise UnsupportedModelError(shares_split_target(f"the DFlash draft {folder}"))
    form = read_form(folder.config, str(folder))
    weights = {
        name: weight.to(device=target.device, dtype=target.dtype)
        for name, weight in _layer_weights(folder, form).items() | _head_weights(folder, form, target).items()
    }
    vocabulary = _vocabulary(folder, form, target)
    embedding, head = _embedding(folder, form, target), _head(folder, form, target)
    folder.check_all_taken(unused=("verifier_lm_head.weight", "verifier_norm.weight"))
    draft = DFlashDraft(form, weights, embedding, head, vocabulary)
    draft.check_target(target)
    return draft


def dflash_from_model(model: PreTrainedModel, target: Any) -> DFlashDraft:
    """Make a draft of a module of transformers' DFlash class.

    Args:
        model: the assistant, such as `generate(assistant_model=..., speculation_type="dflash")` takes.
        target: its target, a Hugging Face model or a `TreeModel`.

    Returns:
        The draft. Its weights are copies unless they lie on the target's device in its dtype.

    Raises:
        TypeError: `model` is no module of transformers.
        ValueError: it is not of a DFlash class, or does not fit the target.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"dflash_from_model: model must be a transformers PreTrainedModel, got {type(model).__name__}")
    config = model.config.to_dict()
    if not is_dflash(config):
        raise ValueError(f"dflash_from_model: model must be of a DFlash class, got {type(model).__name__}")
    tensors: dict[str, Callable[[], torch.Tensor]] = {
        name: partial(_same, weight) for name, weight in model.state_dict().items()
    }
    return load_dflash(DraftFolder(Path(type(model).__name__), config, tensors), adapt(target))


def _same(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _layer_weights(folder: DraftFolder, form: DFlashForm) -> dict[str, torch.Tensor]:
    config, renamed = form.config, dict(form.renamed)
    width, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    of_queries, of_keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    found = {
        name: folder.need(renamed.get(name, name), shape=shape)
        for name, shape in (
            ("fc.weight", (width, None)), ("hidden_norm.weight", (width,)), ("norm.weight", (width,))
        )
    }  # fmt: skip
    for index in range(config.num_hidden_layers):
        layer = f"layers.{index}."
        attention = f"{layer}self_attn."
        for kind in ("weight", "bias") if config.attention_bias else ("weight",):
            columns = (width,) if kind == "weight" else ()
            fused = f"{attention}qkv_proj.{kind}"
            sizes = {"q": of_queries, "k": of_keys, "v": of_keys}
            if fused in folder:
                whole = folder.need(fused, shape=(sum(sizes.values()), *columns))
                parts = whole.split(list(sizes.values()))
                found |= {f"{attention}{side}_proj.{kind}": part for side, part in zip(sizes, parts, strict=True)}
            else:
                for side, rows in sizes.items():
                    name = f"{attention}{side}_proj.{kind}"
                    found[name] = folder.need(name, shape=(rows, *columns))
            name = f"{attention}o_proj.{kind}"
            found[name] = folder.need(name, shape=(width, of_queries) if columns else (width,))
        shapes = {
            f"{attention}q_norm.weight": (head_dim,),
            f"{attention}k_norm.weight": (head_dim,),
            f"{layer}input_layernorm.weight": (width,),
            f"{layer}post_attention_layernorm.weight": (width,),
            f"{layer}mlp.gate_proj.weight": (inner, width),
            f"{layer}mlp.up_proj.weight": (inner, width),
            f"{layer}mlp.down_proj.weight": (width, inner),
        }
        found |= {name: folder.need(name, shape=shape) for name, shape in shapes.items()}
    return found


def _head_weights(folder: DraftFolder, form: DFlashForm, target: TreeModel) -> dict[str, torch.Tensor]:
    width, rank = form.config.hidden_size, form.markov_rank
    vocab = form.draft_vocab_size or target.vocab_size
    shapes: dict[str, tuple[int | None, ...]] = {}
    if form.markov_kind is not None:
        shapes["markov_head.markov_w1.weight"] = (None, rank)
        shapes["markov_head.markov_w2.weight"] = (vocab, rank)
    if form.markov_kind == "gated":
        shapes["markov_head.gate_proj.weight"] = (rank, width + rank)
        shapes["markov_head.gate_proj.bias"] = (rank,)
    if form.markov_kind == "rnn":
        shapes["markov_head.joint_proj.weight"] = (3 * rank, 2 * rank + width)
        shapes["markov_head.joint_proj.bias"] = (3 * rank,)
    if form.has_confidence:
        shapes["confidence_head.proj.weight"] = (1, width + (rank if form.confidence_reads_token else 0))
        shapes["confidence_head.proj.bias"] = (1,)
    return {name: folder.need(name, shape=shape) for name, shape in shapes.items()}


def _vocabulary(folder: DraftFolder, form: DFlashForm, target: TreeModel) -> VocabularyMap | None:
    """Give the map of a reduced vocabulary, whose ids are kept as differences."""
    size = form.draft_vocab_size or target.vocab_size
    differences = folder.take("d2t", shape=(size,), optional=form.draft_vocab_size is None)
    known = folder.take("t2d", shape=(None,), optional=True)
    if differences is None:
        return None
    ids = differences.to(torch.int64) + torch.arange(size)
    if form.draft_vocab_size is None and not differences.any():
        return None  # every token is itself
    if known is not None and known.nonzero().flatten().tolist() != ids.sort().values.tolist():
        raise ValueError(f"{folder}: t2d must mark the tokens of d2t, got {int(known.sum())} others or more")
    try:
        return VocabularyMap.of(ids, target.vocab_size).to(target.device)
    except ValueError as error:
        raise ValueError(f"{folder}: d2t must map to the target's {target.vocab_size} tokens: {error}") from error


def _embedding(folder: DraftFolder, form: DFlashForm, target: TreeModel) -> nn.Module:
    """Give the embedding of tokens: the weight of the target's alone, without what its class does with it."""
    shared = getattr(target.model.get_input_embeddings(), "weight", None)
    width = form.config.hidden_size
    own = folder.take("embed_tokens.weight", shape=(None, width), optional=True)
    if own is not None and not _equals(own, shared, target):
        shared = own.to(device=target.device, dtype=target.dtype)
    if not isinstance(shared, torch.Tensor) or shared.is_meta or shared.dim() != 2 or not shared.is_floating_point():
        raise ValueError(
            f"{folder}: must hold embed_tokens.weight for a target whose embedding is not a plain weight on its device"
        )
    if shared.shape[1] != width:
        raise ValueError(f"{folder}: target must have embeddings of width {width}, the draft's, got {shared.shape[1]}")
    if form.mask_token_id >= shared.shape[0]:
        raise ValueError(
            f"{folder}: mask_token_id must be below the {shared.shape[0]} tokens, got {form.mask_token_id}"
        )
    if form.embedding_scale != 1.0:
        shared = shared * form.embedding_scale
    embedding = nn.Embedding(1, 1, device="meta")
    embedding.num_embeddings, embedding.embedding_dim = shared.shape
    embedding.weight = shared if isinstance(shared, nn.Parameter) else nn.Parameter(shared, requires_grad=False)
    return embedding


def _head(folder: DraftFolder, form: DFlashForm, target: TreeModel) -> nn.Module:
    """Give the head: the folder's, rows of the target's, or the target's."""
    shared, width = target.model.get_output_embeddings(), form.config.hidden_size
    own = folder.take("lm_head.weight", shape=(form.draft_vocab_size or target.vocab_size, width), optional=True)
    of_target = getattr(shared, "weight", None)
    if form.draft_vocab_size is None and (own is None or _equals(own, of_target, target)):
        if not isinstance(shared, nn.Module):
            raise ValueError(f"{folder}: must hold lm_head.weight for a target without a head of its own")
        return shared
    if own is None:
        raise ValueError(f"{folder}: must hold lm_head.weight for a vocabulary of {form.draft_vocab_size} tokens")
    head = nn.Linear(1, 1, bias=False, device="meta")
    head.in_features, head.out_features = own.shape[1], own.shape[0]
    head.weight = nn.Parameter(own.to(device=target.device, dtype=target.dtype), requires_grad=False)
    return head


def _equals(own: torch.Tensor, shared: Any, target: TreeModel) -> bool:
    plain = isinstance(shared, torch.Tensor) and not shared.is_meta and shared.shape == own.shape
    return plain and torch.equal(own.to(device=target.device, dtype=target.dtype), shared)


register_format(DraftFormat("dflash", is_dflash, load_dflash))
