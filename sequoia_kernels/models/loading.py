"""Load models by transformers' ordinary means, with errors that say what to do, and check that two make a pair."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sequoia_kernels.errors import UnsupportedModelError
from sequoia_kernels.models.adapter import TreeModel, adapt

__all__ = ["MAX_PADDING", "check_pair", "check_sizes", "load_model", "local_folder"]

# Heads are padded to multiples of up to 512 rows; heads that differ by more than that hold different tokens.
MAX_PADDING = 1024


def load_model(
    path_or_id: str | os.PathLike[str], dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Load a decoder-only language model from a folder or a hub id, ready for decoding.

    Args:
        path_or_id: a folder written by `save_pretrained`, or a hub id such as "organisation/name".
        dtype: dtype of the weights; None keeps the one they are stored in.
        device: device to load to.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: the folder does not exist, holds no model, or the id is neither cached nor reachable.
        ValueError: the folder's files are not a readable model, or weights are missing in them.
        UnsupportedModelError: the model is not a decoder-only language model.

    Notes:
        Uses `AutoModelForCausalLM.from_pretrained`; the hub's cache, tokens and offline mode work as usual. Weights
        that the files lack are an error and not, as in transformers, initialised at random. Code that comes with a
        model is not run.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     LlamaForCausalLM(config).save_pretrained(folder)
        ...     model = load_model(folder, dtype=torch.bfloat16)
        >>> model.config.model_type, model.dtype
        ('llama', torch.bfloat16)
    """
    folder = local_folder(path_or_id, "load_model")
    name = os.fspath(folder or path_or_id)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        raise _unreadable(name, folder, error) from error
    except Exception as error:  # transformers checks few of a configuration's values itself
        raise ValueError(f"load_model: {name} must hold a model that transformers knows: {error}") from error
    if config.is_encoder_decoder or type(config) not in AutoModelForCausalLM._model_mapping:
        kind = "an encoder-decoder" if config.is_encoder_decoder else "not a causal language model"
        raise UnsupportedModelError(
            f"load_model: {name} must be a decoder-only language model, got family {config.model_type}, which is {kind}"
        )
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype="auto" if dtype is None else dtype, output_loading_info=True,
            trust_remote_code=False,
        )  # fmt: skip
    except OSError as error:
        raise _unreadable(name, folder, error) from error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # safetensors and pickle raise classes of their own for damaged files
        raise ValueError(f"load_model: {name} must hold readable weights: {error}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"load_model: {name} must hold all weights of a {config.model_type} model, got none for {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        )
    return model.to(device).eval()


def local_folder(path_or_id: str | os.PathLike[str], where: str, argument: str = "path_or_id") -> Path | None:
    """Return the folder of a model that is here, None for what can only be a hub's id; else FileNotFoundError."""
    name = os.fspath(path_or_id)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            if (folder / "adapter_config.json").is_file():
                raise FileNotFoundError(
                    f"{where}: {argument} must be a folder with a whole model, got {folder} with an adapter alone; "
                    "write one with merge_and_unload().save_pretrained of the adapted model"
                )
            raise FileNotFoundError(
                f"{where}: {argument} must be a folder with a config.json, got {folder}; write one with save_pretrained"
            )
        return folder
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(
            f"{where}: {argument} must be an existing folder or a hub id, got {name!r}: no such folder"
        )
    return None


def _unreadable(name: str, folder: Path | None, error: OSError) -> Exception:
    if folder is not None:
        return ValueError(f"load_model: {name} must be a folder that transformers can read: {error}")
    return FileNotFoundError(
        f"load_model: {name!r} must be an existing folder or a hub id that can be reached or is cached, got: {error}"
    )


def check_sizes(target: TreeModel, draft: TreeModel) -> None:
    """Raise ValueError where a draft is larger than its target."""
    if draft.num_parameters > target.num_parameters:
        raise ValueError(
            f"check_pair: draft must be at most as large as the target with {target.num_parameters:,} parameters, "
            f"got {draft.num_parameters:,}; are the two swapped?"
        )


def check_pair(
    target: TreeModel | PreTrainedModel,
    draft: TreeModel | PreTrainedModel,
    target_tokenizer: Any | None = None,
    draft_tokenizer: Any | None = None,
) -> int:
    """Check that a draft can propose tokens for a target.

    Args:
        target: the model whose output is wanted.
        draft: the model that proposes; at most as large as the target.
        target_tokenizer: its tokenizer, for a check of the vocabularies' content; both or none.
        draft_tokenizer: the draft's tokenizer.

    Returns:
        The common vocabulary size: ids below it mean the same to both. Heads may be padded differently.

    Raises:
        ValueError: the draft is larger than the target, only one tokenizer is given, or the vocabularies differ in
            content.

    Notes:
        Decoding stays lossless with any draft; a draft with other tokens would only never be accepted. Without
        tokenizers, heads that differ by more rows than padding explains are taken for different vocabularies.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> def model(vocab_size, layers):
        ...     config = LlamaConfig(vocab_size=vocab_size, hidden_size=16, intermediate_size=32,
        ...                          num_hidden_layers=layers, num_attention_heads=2)
        ...     return LlamaForCausalLM(config).eval()
        >>> check_pair(model(vocab_size=48, layers=2), model(vocab_size=40, layers=1))
        40
    """
    target, draft = adapt(target), adapt(draft)
    check_sizes(target, draft)
    common = min(target.vocab_size, draft.vocab_size)
    if (target_tokenizer is None) != (draft_tokenizer is None):
        raise ValueError("check_pair: target_tokenizer and draft_tokenizer must be given together, got only one")
    if target_tokenizer is None or draft_tokenizer is None:
        difference = abs(target.vocab_size - draft.vocab_size)
        if difference > MAX_PADDING:
            raise ValueError(
                f"check_pair: draft must share the target's vocabulary of {target.vocab_size} tokens, "
                f"got {draft.vocab_size}, which is not a matter of padding; where it is (check_pair compares what two "
                "tokenizers hold), give both heads one size with draft.resize_token_embeddings; where the tokenizers "
                "are two, give generate both as tokenizer and draft_tokenizer"
            )
        return common
    of_target, of_draft = (
        {token_id: token for token, token_id in tokenizer.get_vocab().items()}
        for tokenizer in (target_tokenizer, draft_tokenizer)
    )
    for token_id in sorted(of_target.keys() & of_draft.keys()):
        if token_id < common and of_target[token_id] != of_draft[token_id]:
            raise ValueError(
                f"check_pair: draft must share the target's vocabulary, got token id {token_id} = "
                f"{of_draft[token_id]!r} in the draft and {of_target[token_id]!r} in the target"
            )
    return common
