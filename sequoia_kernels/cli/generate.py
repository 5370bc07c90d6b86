"""`generate`: text from a prompt, streaming."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sequoia_kernels.cli.arguments import (
    add_command,
    add_models,
    add_prompts_file,
    add_sampling,
    load_tree,
    positive,
    sampling_settings,
    setting,
)
from sequoia_kernels.cli.pair import DEMO_PROMPT, encode_prompts, load_pair, read_prompts, text_streamer
from sequoia_kernels.cli.terminal import BadUsage, Terminal


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "generate",
        run,
        "Generate text from a prompt, streaming.",
        'sequoia-kernels generate --target T --draft D --prompt "The sequoia is" --temperature 0.8',
    )
    add_models(parser)
    add_sampling(parser)
    parser.add_argument("--prompt", help="text to continue (default: that of the demo); - reads standard input")
    add_prompts_file(parser, "text file with prompts, each of which is continued", 1000)
    parser.add_argument("--batch-size", type=positive, default=1, help="prompts of the file that are decoded together")
    parser.add_argument("--new-tokens", type=positive, default=128, help="tokens to generate, at most")
    parser.add_argument(
        "--lookup", action="store_true", help="besides, propose what stood behind the same words earlier in the text"
    )
    parser.add_argument(
        "--tree",
        default="auto",
        help="auto, adaptive (switches between trees as acceptance drifts), none (no speculation), or a tree, "
        "shaped tree or plan JSON file",
    )
    parser.add_argument("--profile", type=Path, help="profile JSON for auto and adaptive")
    parser.add_argument("--acceptance", type=Path, help="acceptance JSON for them")
    parser.add_argument(
        "--rule", help="verification rule: sequoia or traversal (default: the plan's, or generate's own)"
    )
    parser.add_argument("--compile", action="store_true", help="run forwards of trees through torch.compile")
    parser.add_argument("--stop", action="append", default=[], help="string that ends the text; may be repeated")
    parser.add_argument(
        "--set", action="append", default=[], type=setting, metavar="NAME=VALUE",
        help="any other generation setting of transformers, such as repetition_penalty=1.2; may be repeated",
    )  # fmt: skip


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    import inspect

    from sequoia_kernels import AcceptanceEstimate, HardwareProfile, generate

    for name, _ in args.set:
        if name in inspect.signature(generate).parameters:
            raise BadUsage(f"--set must name a generation setting that is no argument of generate, got {name}")
    if args.lookup and args.tree == "none":
        raise BadUsage("--lookup must not be given with --tree none")
    words = {"auto": "auto", "adaptive": "adaptive", "none": None}
    tree: Any = words[args.tree] if args.tree in words else load_tree(Path(args.tree))
    profile = None if args.profile is None else HardwareProfile.load(args.profile)
    acceptance = None if args.acceptance is None else AcceptanceEstimate.load(args.acceptance)
    if args.prompts_file is not None and args.prompt is not None:
        raise BadUsage("--prompt must not be given with --prompts-file")
    if args.prompts_file is not None:
        texts = read_prompts(args, terminal)
    else:
        texts = [sys.stdin.read() if args.prompt == "-" else DEMO_PROMPT if args.prompt is None else args.prompt]
    pair = load_pair(args, terminal)
    if profile is not None:
        profile.check_device(pair.target.device)
    encoded = encode_prompts(texts, pair)
    for index, ids in enumerate(encoded):
        if ids.shape[1] == 0:
            where = "--prompt" if args.prompts_file is None else f"prompt {index + 1} of --prompts-file"
            raise BadUsage(f"{where} must hold at least one token, got an empty text")
    documents = []
    for first in range(0, len(texts), args.batch_size):
        batch = encoded[first : first + args.batch_size]
        streams = len(texts) == 1 and not terminal.as_json
        ids, mask = _padded(batch)
        try:
            output = generate(
                pair.target, None if tree is None else pair.draft, ids, mask, tree="auto" if tree is None else tree,
                max_new_tokens=args.new_tokens, stop_strings=args.stop or None, tokenizer=pair.tokenizer,
                profile=profile, acceptance=acceptance, rule=args.rule, compile=args.compile,
                lookup=args.lookup,
                streamer=text_streamer(pair.tokenizer) if streams else None, **sampling_settings(args),
                **dict(args.set),
            )  # fmt: skip
        except TypeError as error:
            if args.set and "no generation setting" in str(error):
                raise BadUsage(f"--set must name a generation setting: {error}") from None
            raise
        answers = output.texts(pair.tokenizer)
        if not streams and not terminal.as_json:
            for index, answer in enumerate(answers):
                terminal.text(f"=== prompt {first + index + 1}\n{texts[first + index]}{answer}\n")
        stats = output.stats
        reasons = ", ".join(dict.fromkeys(output.finish_reasons))
        terminal.note(
            f"{sum(stats.new_tokens)} tokens, {stats.tokens_per_second:.1f} tokens/s, "
            f"{stats.tokens_per_step:.2f} tokens per step, ended by {reasons}"
        )
        documents += [
            {"text": answer, "tokens": tokens, "finish_reason": reason, "stats": stats.to_dict()}
            for answer, tokens, reason in zip(answers, output.new_tokens, output.finish_reasons, strict=True)
        ]
    terminal.result(documents[0] if args.prompts_file is None else {"results": documents}, lambda: None)
    return 0


def _padded(rows: Sequence[Any]) -> tuple[Any, Any]:
    """Prompts [1, length] as one batch, padded on the left, and its mask."""
    import torch

    width = max(ids.shape[1] for ids in rows)
    padded = [torch.nn.functional.pad(ids, (width - ids.shape[1], 0)) for ids in rows]
    masks = [torch.nn.functional.pad(torch.ones_like(ids), (width - ids.shape[1], 0)) for ids in rows]
    return torch.cat(padded), torch.cat(masks)
