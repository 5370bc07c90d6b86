"""What several commands do with a pair of models: load it, read prompts for it, measure it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sequoia_kernels.cli.terminal import BadUsage, Terminal
from sequoia_kernels.documents import read_text

__all__ = [
    "DEMO_PROMPT",
    "Pair",
    "encode_prompts",
    "estimate_pair",
    "load_pair",
    "measure_pair",
    "need_draft",
    "read_prompts",
    "text_streamer",
]

HUB_SECONDS = 10.0

DEMO_PROMPT = '''def read_config(path, encoding="utf-8"):
    """Read the configuration file and return a dictionary.

    Raises ValueError if the file is not valid.
    """
'''


class Pair(NamedTuple):
    """Both models and the target's tokenizer."""

    target: Any
    draft: Any | None
    tokenizer: Any


def load_pair(args: argparse.Namespace, terminal: Terminal) -> Pair:
    """Load the models that the arguments name, or the demo pair."""
    import torch
    import transformers

    from sequoia_kernels.drafts import draft_source, is_word
    from sequoia_kernels.models import adapt, check_sizes, load_model
    from sequoia_kernels.offload import load_offloaded

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadUsage(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    target, draft, budget = args.target, args.draft, args.device_memory
    if target is None and draft is not None and not is_word(draft):
        raise BadUsage("--draft needs --target")
    if budget is not None and not args.offload:
        raise BadUsage("--device-memory needs --offload")
    if target is None and args.offload:
        raise BadUsage("--offload needs --target")
    if target is None:
        from sequoia_kernels.demo import load_demo_pair

        demo = Pair(*load_demo_pair(dtype or torch.float32, device))
        return demo if draft is None else demo._replace(draft=draft_source(draft, adapt(demo.target)))
    target = _find_model("--target", target, terminal)
    kind, draft = (None, None) if draft is None else _draft_kind(draft, terminal)
    terminal.note(f"loading {target}" + (f" and {draft}" if draft else ""))
    tokenizer = transformers.AutoTokenizer.from_pretrained(target, trust_remote_code=False)
    # The draft first: the default budget of an offloaded target is a share of what is free.
    draft_model = load_model(draft, dtype, device) if draft is not None and kind == "model" else None
    target_model: Any
    if args.offload:
        target_model = load_offloaded(
            target, device=device, device_memory_budget=budget, dtype=dtype, host_memory=args.host_memory
        )
        terminal.note(target_model.memory.describe())
    else:
        target_model = load_model(target, dtype, device)
    dtypes = [str(model.dtype).removeprefix("torch.") for model in (target_model, draft_model) if model is not None]
    terminal.note(f"computing in {' and '.join(dict.fromkeys(dtypes))}" + (", as stored" if dtype is None else ""))
    if draft is None:
        return Pair(target_model, None, tokenizer)
    if draft_model is None:
        return Pair(target_model, draft_source(draft, adapt(target_model)), tokenizer)
    check_sizes(adapt(target_model), adapt(draft_model))
    draft_tokenizer = transformers.AutoTokenizer.from_pretrained(draft, trust_remote_code=False)
    source = draft_source(draft_model, adapt(target_model), tokenizer=tokenizer, draft_tokenizer=draft_tokenizer)
    if source.vocabulary is not None:
        size = source.vocabulary.draft_vocab_size
        terminal.note(f"the draft has another vocabulary: it proposes the {size} tokens that both have")
    return Pair(target_model, source, tokenizer)


def _draft_kind(name: str, terminal: Terminal) -> tuple[str, str]:
    """Tell what --draft names, "word", "published" or "model", and give it for whoever loads it."""
    from sequoia_kernels.drafts import format_of, is_word

    if is_word(name):
        return "word", name
    found = _find_model("--draft", name, terminal)
    published = format_of(found)
    if published is not None:
        terminal.note(f"--draft: {found} holds a draft of the format {published.name}")
    return "model" if published is None else "published", found


def _find_model(option: str, name: str, terminal: Terminal) -> str:
    """Give the name for transformers, or refuse it at once: loading would ask a hub out of reach for a minute."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    if Path(name).expanduser().is_dir():
        return os.path.expanduser(name)
    try:
        if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
            return name
        terminal.note(f"{option}: there is no folder {name}; asking the hub for a model of this name")
        huggingface_hub.model_info(name, timeout=HUB_SECONDS)
    except Exception as error:  # no connection, offline, no such name: classes of several libraries
        if isinstance(error, HfHubHTTPError) and not isinstance(error, RepositoryNotFoundError):
            return name  # the hub answers, if not this question: let the loading ask
        reason = str(error).strip().partition("\n")[0]
        raise BadUsage(
            f"{option} must be a folder or the name of a model on the hub, got {name}: there is no such folder, "
            f"and the hub did not know it or was not reached ({reason})"
        ) from error
    return name


def need_draft(args: argparse.Namespace) -> None:
    """Refuse a target without a draft that draws, for commands that need both."""
    from sequoia_kernels.drafts import LOOKUP

    if args.target is not None and args.draft is None:
        raise BadUsage(f"{args.command} needs a draft model; give --draft")
    if args.draft == LOOKUP:
        raise BadUsage(f"{args.command} needs a draft that draws its tokens, got --draft lookup")


def read_prompts(args: argparse.Namespace, terminal: Terminal) -> list[str]:
    """Read the prompts of --prompts-file, or take held-out files of the standard library for the demo pair."""
    path = args.prompts_file
    if path is not None:
        try:
            pieces = read_text(path).split(args.separator)
        except UnicodeDecodeError:
            raise BadUsage(f"--prompts-file {path} must be text in UTF-8") from None
        texts = [text.strip("\n") for text in pieces if text.strip()]
        if not texts:
            raise BadUsage(f"--prompts-file {path} holds no prompt")
        used = min(len(texts), args.num_prompts)
        terminal.note(f"{used} of {len(texts)} prompts read from {path}, separated by {args.separator!r}")
        return texts[:used]
    if args.target is not None:
        raise BadUsage("--prompts-file must be given with --target: acceptance depends on the text")
    from sequoia_kernels.demo import held_out_prompts

    return held_out_prompts(args.num_prompts)


def encode_prompts(texts: Sequence[str], pair: Pair, most: int | None = None) -> list[Any]:
    """Encode prompts, each [1, at most so many tokens], on the target's device."""
    encoded = [pair.tokenizer(text, return_tensors="pt").input_ids for text in texts]
    return [ids[:, :most].to(pair.target.device) for ids in encoded]


def measure_pair(pair: Pair, contexts: Sequence[int], batch_size: int, quick: bool, terminal: Terminal) -> Any:
    """Measure the profile of a pair, the loop's overhead included."""
    from sequoia_kernels import measure_profile
    from sequoia_kernels.decoding import measure_overhead

    with terminal.progress("measuring this machine") as advance:
        profile = measure_profile(
            pair.target, pair.draft, context_lens=contexts, batch_size=batch_size, quick=quick, progress=advance
        )
        return measure_overhead(pair.target, pair.draft, profile, context_len=min(contexts), batch_size=batch_size)


def estimate_pair(
    pair: Pair, prompts: Sequence[Any], new_tokens: int, sampling: dict[str, Any], terminal: Terminal, tree: Any = None
) -> Any:
    """Estimate the acceptance of a pair from continuations of the prompts."""
    from sequoia_kernels import estimate_acceptance, generate
    from sequoia_kernels.decoding import probe_tree
    from sequoia_kernels.drafts import draft_source

    runs = []
    tree = tree or probe_tree(draft_source(pair.draft))
    with terminal.progress("estimating acceptance") as advance:
        for index, ids in enumerate(prompts):
            advance(index, len(prompts), f"prompt {index + 1}")
            output = generate(
                pair.target, pair.draft, ids, tree=tree, max_new_tokens=new_tokens,
                eos_token_id=(), rule="sequoia", **(sampling | {"seed": sampling["seed"] + index}),
            )  # fmt: skip
            runs.append(output.stats)
        advance(len(prompts), len(prompts))
    return estimate_acceptance(
        runs, temperature=sampling["temperature"], top_k=sampling["top_k"], top_p=sampling["top_p"]
    )


def record_pair(
    pair: Pair, prompts: Sequence[Any], new_tokens: int, sampling: dict[str, Any], terminal: Terminal, tree: Any = None
) -> Any:
    """Record the steps of continuations of the prompts."""
    from sequoia_kernels.decoding import record_steps

    with terminal.progress("recording steps") as advance:
        return record_steps(
            pair.target, pair.draft, prompts, tree=tree, max_new_tokens=new_tokens, progress=advance, **sampling
        )


def text_streamer(tokenizer: Any) -> Any:
    """Give what prints a text while it is generated."""
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=False)
