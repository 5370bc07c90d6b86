"""`generate`: text from a prompt, streaming."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from sequoia_kernels.cli.arguments import add_command, add_models, add_sampling, load_tree, positive, sampling_settings
from sequoia_kernels.cli.pair import DEMO_PROMPT, encode_prompts, load_pair, text_streamer
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
    parser.add_argument("--new-tokens", type=positive, default=128, help="tokens to generate, at most")
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


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    from sequoia_kernels import AcceptanceEstimate, HardwareProfile, generate

    words = {"auto": "auto", "adaptive": "adaptive", "none": None}
    tree: Any = words[args.tree] if args.tree in words else load_tree(Path(args.tree))
    profile = None if args.profile is None else HardwareProfile.load(args.profile)
    acceptance = None if args.acceptance is None else AcceptanceEstimate.load(args.acceptance)
    text = sys.stdin.read() if args.prompt == "-" else DEMO_PROMPT if args.prompt is None else args.prompt
    pair = load_pair(args, terminal)
    if profile is not None:
        profile.check_device(pair.target.device)
    (ids,) = encode_prompts([text], pair)
    if ids.shape[1] == 0:
        raise BadUsage("--prompt must hold at least one token, got an empty text")
    output = generate(
        pair.target, None if tree is None else pair.draft, ids, tree="auto" if tree is None else tree,
        max_new_tokens=args.new_tokens, stop_strings=args.stop, tokenizer=pair.tokenizer, profile=profile,
        acceptance=acceptance, rule=args.rule, compile=args.compile,
        streamer=None if terminal.as_json else text_streamer(pair.tokenizer), **sampling_settings(args),
    )  # fmt: skip
    stats = output.stats
    terminal.note(
        f"{stats.new_tokens[0]} tokens, {stats.tokens_per_second:.1f} tokens/s, "
        f"{stats.tokens_per_step:.2f} tokens per step, ended by {output.finish_reasons[0]}"
    )
    if terminal.as_json:
        document = {
            "text": pair.tokenizer.decode(output.new_tokens[0], skip_special_tokens=True),
            "tokens": output.new_tokens[0],
            "finish_reason": output.finish_reasons[0],
            "stats": stats.to_dict(),
        }
        terminal.result(document, lambda: None)
    return 0
