"""What several commands do with a pair of models: load it, read prompts for it, measure it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sequoia_kernels.cli.terminal import BadUsage, Terminal

__all__ = [
    "DEMO_PROMPT",
    "Pair",
    "estimate_pair",
    "load_pair",
    "measure_pair",
    "need_draft",
    "read_prompts",
    "text_streamer",
]


DEMO_PROMPT = '''def read_config(path, encoding="utf-8"):
    """Read the configuration file and return a dictionary.

    Raises ValueError if the file is not valid.
    """
'''


class Pair(NamedTuple):
    target: Any
    draft: Any | None
    tokenizer: Any


def load_pair(args: argparse.Namespace, terminal: Terminal) -> Pair:
    """Load the models that the arguments name, or the demo pair."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if getattr(args, "threads", None):
        torch.set_num_threads(args.threads)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadUsage(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
    dtype = getattr(torch, args.dtype)
    target, draft = getattr(args, "target", None), getattr(args, "draft", None)
    budget = getattr(args, "device_memory", None)
    if target is None and draft is not None:
        raise BadUsage("--draft needs --target")
    if budget is not None and not args.offload:
        raise BadUsage("--device-memory needs --offload")
    if target is None and args.offload:
        raise BadUsage("--offload needs --target")
    if target is None:
        from sequoia_kernels.demo import load_demo_pair

        return Pair(*load_demo_pair(dtype, device))
    from sequoia_kernels.models import check_pair, load_model, load_offloaded

    terminal.note(f"loading {target}" + (f" and {draft}" if draft else ""))
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    # The draft first: the default budget of an offloaded target is a share of what is free.
    draft_model = load_model(draft, dtype, device) if draft is not None else None
    target_model: Any
    if args.offload:
        target_model = load_offloaded(
            target, device=device, device_memory_budget=budget, dtype=dtype, host_memory=args.host_memory
        )
        terminal.note(target_model.memory.describe())
    else:
        target_model = load_model(target, dtype, device)
    if draft_model is None:
        return Pair(target_model, None, tokenizer)
    check_pair(target_model, draft_model, tokenizer, transformers.AutoTokenizer.from_pretrained(draft))
    return Pair(target_model, draft_model, tokenizer)


def need_draft(pair: Pair, command: str) -> None:
    if pair.draft is None:
        raise BadUsage(f"{command} needs a draft model; give --draft")


def read_prompts(args: argparse.Namespace, pair: Pair) -> list[Any]:
    """Read the prompts of --prompts-file, or take held-out files of the standard library for the demo pair."""
    path = getattr(args, "prompts_file", None)
    if path is not None:
        texts = [text.strip("\n") for text in Path(path).read_text(encoding="utf-8").split(args.separator)]
        texts = [text for text in texts if text.strip()][: args.num_prompts]
        if not texts:
            raise BadUsage(f"--prompts-file {path} holds no prompt")
    elif getattr(args, "target", None) is None:
        from sequoia_kernels.demo import held_out_prompts

        texts = held_out_prompts(args.num_prompts)
    else:
        raise BadUsage("--prompts-file must be given with --target: acceptance depends on the text")
    encoded = [pair.tokenizer(text, return_tensors="pt").input_ids for text in texts]
    return [ids[:, : args.prompt_tokens].to(pair.target.device) for ids in encoded]


def measure_pair(pair: Pair, contexts: Sequence[int], batch_size: int, quick: bool, terminal: Terminal) -> Any:
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
    from sequoia_kernels import estimate_acceptance, generate
    from sequoia_kernels.decoding import PROBE_TREE

    runs = []
    with terminal.progress("estimating acceptance") as advance:
        for index, ids in enumerate(prompts):
            advance(index, len(prompts), f"prompt {index + 1}")
            output = generate(
                pair.target, pair.draft, ids, tree=tree or PROBE_TREE, max_new_tokens=new_tokens,
                eos_token_id=(), **(sampling | {"seed": sampling["seed"] + index}),
            )  # fmt: skip
            runs.append(output.stats)
        advance(len(prompts), len(prompts))
    return estimate_acceptance(
        runs, temperature=sampling["temperature"], top_k=sampling["top_k"], top_p=sampling["top_p"]
    )


def text_streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=False)
