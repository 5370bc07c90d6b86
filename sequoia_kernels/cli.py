"""The command line: demo, generate, acceptance, profile, plan, doctor.

Results go to standard output, progress and logs to standard error, so that `--json` output can be piped. Exit status:
0 done, 1 the work failed, 2 a bad argument or file, 130 interrupted. Files are written whole or not at all.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from sequoia_kernels import __version__

DEMO_PROMPT = '''def read_config(path, encoding="utf-8"):
    """Read the configuration file and return a dictionary.

    Raises ValueError if the file is not valid.
    """
'''


class _BadUsage(Exception):
    """Arguments that do not go together; shown without a traceback, exit status 2."""


class _Pair(NamedTuple):
    target: Any
    draft: Any | None
    tokenizer: Any


class Terminal:
    """Where a command writes: results on standard output, everything else on standard error."""

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self.as_json = as_json
        self.out = Console(highlight=False, soft_wrap=True)
        self.err = Console(stderr=True, highlight=False, quiet=quiet)

    def result(self, document: dict[str, Any], show: Callable[[], None]) -> None:
        """Print the JSON document with --json, else show it for people."""
        if self.as_json:
            sys.stdout.write(json.dumps(document, indent=2) + "\n")
        else:
            show()

    def problem(self, text: str) -> None:
        """Say why the command failed, quiet or not."""
        Console(stderr=True, highlight=False, soft_wrap=True).print(text, style="bold red", markup=False)

    def note(self, text: str) -> None:
        """Say something that is not a result."""
        self.err.print(text, style="dim", markup=False)

    @contextlib.contextmanager
    def progress(self, label: str) -> Iterator[Callable[..., None]]:
        """Show a bar; the yielded function takes (done, total, what)."""
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[what]}", style="dim"),
        )
        with Progress(*columns, console=self.err, transient=False) as bar:
            task = bar.add_task(label, total=None, what="")

            def advance(done: int, total: int, what: str = "") -> None:
                bar.update(task, completed=done, total=total, what=what)

            yield advance


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    args = _parser().parse_args(argv)
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING, stream=sys.stderr, format="%(message)s"
    )
    terminal = Terminal(getattr(args, "json", False), args.quiet)
    try:
        return args.run(args, terminal)
    except KeyboardInterrupt:
        terminal.note("interrupted; nothing was left half-written")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (_BadUsage, ValueError, TypeError, OSError) as error:
        if args.traceback:
            raise
        terminal.problem(f"sequoia-kernels {args.command}: {error}")
        return 2
    except RuntimeError as error:
        if args.traceback:
            raise
        terminal.problem(f"sequoia-kernels {args.command}: {error}")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sequoia-kernels",
        description="Lossless tree speculative decoding with a tree chosen for this machine.",
        epilog="Start with `sequoia-kernels demo`. Every command explains itself with --help.",
    )
    parser.add_argument("--version", action="version", version=f"sequoia-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_generate(commands)
    _add_acceptance(commands)
    _add_profile(commands)
    _add_plan(commands)
    _add_doctor(commands)
    return parser


def _add_command(commands: Any, name: str, run: Callable[..., int], summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=summary, description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.set_defaults(run=run)
    general = parser.add_argument_group("general")
    general.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    general.add_argument("--quiet", action="store_true", help="no progress")
    general.add_argument("--verbose", action="store_true", help="log backend choices and measurements")
    general.add_argument("--traceback", action="store_true", help="show Python's traceback of an error")
    return parser


def _add_models(parser: argparse.ArgumentParser, draft_required: bool = False) -> None:
    models = parser.add_argument_group("models (the demo pair when none is given)")
    models.add_argument("--target", help="folder or hub id of the target", default=argparse.SUPPRESS)
    models.add_argument("--draft", help="folder or hub id of the draft", default=argparse.SUPPRESS)
    models.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    models.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes CUDA where there is one")
    models.add_argument("--threads", type=_count, help="CPU threads", default=argparse.SUPPRESS)
    models.add_argument(
        "--offload", action="store_true", help="stream the target's layers from host memory (see docs/offloading.md)"
    )
    models.add_argument(
        "--device-memory",
        metavar="SIZE",
        default=argparse.SUPPRESS,
        help="device memory for an offloaded target, such as 20GiB (default: 90%% of what is free)",
    )
    models.add_argument(
        "--host-memory",
        choices=("packed", "mapped"),
        default="packed",
        help="keep an offloaded target in memory, or stream it from its files",
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    sampling.add_argument("--top-k", type=int, default=argparse.SUPPRESS, help="keep the k most probable tokens")
    sampling.add_argument("--top-p", type=float, default=argparse.SUPPRESS, help="keep this much probability")
    sampling.add_argument("--seed", type=int, default=0)


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _load_pair(args: argparse.Namespace, terminal: Terminal) -> _Pair:
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
        raise _BadUsage(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
    dtype = getattr(torch, args.dtype)
    target, draft = getattr(args, "target", None), getattr(args, "draft", None)
    budget = getattr(args, "device_memory", None)
    if target is None and draft is not None:
        raise _BadUsage("--draft needs --target")
    if budget is not None and not args.offload:
        raise _BadUsage("--device-memory needs --offload")
    if target is None and args.offload:
        raise _BadUsage("--offload needs --target")
    if target is None:
        from sequoia_kernels.demo import load_demo_pair

        return _Pair(*load_demo_pair(dtype, device))
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
        return _Pair(target_model, None, tokenizer)
    check_pair(target_model, draft_model, tokenizer, transformers.AutoTokenizer.from_pretrained(draft))
    return _Pair(target_model, draft_model, tokenizer)


def _need_draft(pair: _Pair, command: str) -> None:
    if pair.draft is None:
        raise _BadUsage(f"{command} needs a draft model; give --draft")


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "temperature": args.temperature,
        "top_k": getattr(args, "top_k", None),
        "top_p": getattr(args, "top_p", None),
        "seed": args.seed,
    }


def _prompts(args: argparse.Namespace, pair: _Pair) -> list[Any]:
    """Read the prompts of --prompts-file, or take held-out files of the standard library for the demo pair."""
    path = getattr(args, "prompts_file", None)
    if path is not None:
        texts = [text.strip("\n") for text in Path(path).read_text(encoding="utf-8").split(args.separator)]
        texts = [text for text in texts if text.strip()][: args.num_prompts]
        if not texts:
            raise _BadUsage(f"--prompts-file {path} holds no prompt")
    elif getattr(args, "target", None) is None:
        from sequoia_kernels.demo import held_out_prompts

        texts = held_out_prompts(args.num_prompts)
    else:
        raise _BadUsage("--prompts-file must be given with --target: acceptance depends on the text")
    encoded = [pair.tokenizer(text, return_tensors="pt").input_ids for text in texts]
    return [ids[:, : args.prompt_tokens].to(pair.target.device) for ids in encoded]


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "--prompts-file",
        type=Path,
        default=argparse.SUPPRESS,
        help="text file with prompts (the demo pair's default: held-out files of the standard library)",
    )
    prompts.add_argument("--separator", default="\n\n\n", help="what separates the prompts of the file")
    prompts.add_argument("--num-prompts", type=_count, default=8)
    prompts.add_argument("--prompt-tokens", type=_count, default=128, help="longer prompts are cut")
    prompts.add_argument("--new-tokens", type=_count, default=96, help="tokens generated for each prompt")


def _measure(pair: _Pair, contexts: Sequence[int], batch_size: int, quick: bool, terminal: Terminal) -> Any:
    from sequoia_kernels import measure_profile
    from sequoia_kernels.decoding import measure_overhead

    with terminal.progress("measuring this machine") as advance:
        profile = measure_profile(
            pair.target, pair.draft, context_lens=contexts, batch_size=batch_size, quick=quick, progress=advance
        )
        return measure_overhead(pair.target, pair.draft, profile, context_len=min(contexts), batch_size=batch_size)


def _estimate(
    pair: _Pair, prompts: Sequence[Any], new_tokens: int, sampling: dict[str, Any], terminal: Terminal, tree: Any = None
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


# demo


def _add_demo(commands: Any) -> None:
    parser = _add_command(
        commands, "demo", _run_demo, "Measure this machine, choose a tree for it, and show generation with and without."
    )
    _add_models(parser)
    parser.add_argument(
        "--prompt", default=argparse.SUPPRESS, help="text to continue (default: the start of a Python function)"
    )
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0], metavar="T")
    parser.add_argument("--top-p", type=float, default=argparse.SUPPRESS)
    parser.add_argument("--new-tokens", type=_count, default=128)
    parser.add_argument("--num-prompts", type=_count, default=4, help="held-out prompts timed besides the shown one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--svg", type=Path, default=argparse.SUPPRESS, help="write a picture of the last tree here")


def _run_demo(args: argparse.Namespace, terminal: Terminal) -> int:
    from sequoia_kernels import plan_tree
    from sequoia_kernels.demo import held_out_prompts

    pair = _load_pair(args, terminal)
    _need_draft(pair, "demo")
    own_prompt = getattr(args, "prompt", None)
    shown = pair.tokenizer(own_prompt or DEMO_PROMPT, return_tensors="pt").input_ids.to(pair.target.device)
    texts = held_out_prompts(2 * args.num_prompts)
    ids = [pair.tokenizer(text, return_tensors="pt").input_ids[:, :128].to(pair.target.device) for text in texts]
    calibration, timed = ids[: args.num_prompts], [shown, *ids[args.num_prompts :]]
    longest = max(x.shape[1] for x in timed)
    profile = _measure(pair, (longest, longest + args.new_tokens), 1, True, terminal)
    rows = []
    plan = None
    for temperature in args.temperatures:
        sampling = {"temperature": temperature, "top_k": None, "top_p": getattr(args, "top_p", None), "seed": args.seed}
        acceptance = _estimate(pair, calibration, args.new_tokens, sampling, terminal)
        plan = plan_tree(acceptance, profile, context_len=longest + args.new_tokens / 2, temperature=temperature)
        rows.append(_demo_row(args, pair, timed, sampling, plan, terminal))
    assert plan is not None

    def show() -> None:
        table = Table(title="measured in this run, tokens per second of decoding")
        for column in ("T", "nodes", "levels", "plain", "tree", "speedup", "predicted", "tokens/step"):
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(
                f"{row['temperature']:g}",
                str(row["nodes"]),
                str(row["levels"]),
                f"{row['autoregressive_tokens_per_second']:.0f}",
                f"{row['speculative_tokens_per_second']:.0f}",
                f"{row['speedup']:.2f}x",
                f"{row['predicted_speedup']:.2f}x",
                f"{row['tokens_per_step']:.2f}",
            )
        terminal.out.print(plan.tree.draw(plan.acceptance), markup=False)
        terminal.out.print(table)
        for row in rows:
            if row["temperature"] == 0:
                same = "identical to" if row["greedy_output_identical"] else "NOT identical to"
                terminal.out.print(f"greedy output is {same} that of plain decoding, on all {len(timed)} prompts")

    if getattr(args, "svg", None):
        plan.tree.save_svg(args.svg, plan.acceptance)
    terminal.result({"version": __version__, "rows": rows, "plan": json.loads(plan.to_json())}, show)
    return 0


def _demo_row(
    args: argparse.Namespace, pair: _Pair, prompts: list[Any], sampling: dict[str, Any], plan: Any, terminal: Terminal
) -> dict[str, Any]:
    """Stream the first prompt's continuation, then time all prompts with and without speculation, in turn."""
    from sequoia_kernels import generate

    common = sampling | {"max_new_tokens": args.new_tokens, "eos_token_id": ()}
    if not terminal.as_json:
        terminal.out.rule(f"temperature {sampling['temperature']:g}")
        terminal.out.print(plan.describe(), markup=False)
        terminal.out.rule("the target's text, generated with the tree")
        generate(pair.target, pair.draft, prompts[0], tree=plan, streamer=_text_streamer(pair.tokenizer), **common)
        terminal.out.rule()
    plain, speculative, identical = [], [], True
    with terminal.progress("timing with and without") as advance:
        for index, ids in enumerate(prompts):
            advance(index, len(prompts), f"prompt {index + 1}")
            without = generate(pair.target, None, ids, **common)
            with_tree = generate(pair.target, pair.draft, ids, tree=plan, **common)
            identical &= without.new_tokens == with_tree.new_tokens
            plain.append(without.stats)
            speculative.append(with_tree.stats)
        advance(len(prompts), len(prompts))

    def rate(runs: list[Any]) -> float:
        return sum(sum(run.new_tokens) - 1 for run in runs) / sum(run.decode_seconds for run in runs)

    steps = sum(sum(run.request_steps) for run in speculative)
    accepted = sum(run.tokens_per_step * sum(run.request_steps) for run in speculative)
    return {
        "temperature": sampling["temperature"],
        "nodes": plan.tree.num_nodes,
        "levels": plan.tree.num_levels,
        "autoregressive_tokens_per_second": rate(plain),
        "speculative_tokens_per_second": rate(speculative),
        "speedup": rate(speculative) / rate(plain),
        "predicted_speedup": plan.speedup,
        "predicted_tokens_per_second": plan.tokens_per_second,
        "tokens_per_step": accepted / steps if steps else 1.0,
        "predicted_tokens_per_step": plan.tokens_per_step,
        "greedy_output_identical": identical if sampling["temperature"] == 0 else None,
    }


def _text_streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=False)


# generate


def _add_generate(commands: Any) -> None:
    parser = _add_command(commands, "generate", _run_generate, "Generate text from a prompt, streaming.")
    _add_models(parser)
    _add_sampling(parser)
    parser.add_argument("--prompt", default=argparse.SUPPRESS, help="text to continue; - reads standard input")
    parser.add_argument("--new-tokens", type=_count, default=128)
    parser.add_argument(
        "--tree",
        default="auto",
        help="auto, adaptive (switches between trees as acceptance drifts), none (no speculation), or a tree or plan "
        "JSON file",
    )
    parser.add_argument("--profile", type=Path, default=argparse.SUPPRESS, help="profile JSON for auto and adaptive")
    parser.add_argument("--acceptance", type=Path, default=argparse.SUPPRESS, help="acceptance JSON for them")
    parser.add_argument("--compile", action="store_true", help="run forwards of trees through torch.compile")
    parser.add_argument("--stop", action="append", default=[], help="string that ends the text; may be repeated")


def _run_generate(args: argparse.Namespace, terminal: Terminal) -> int:
    from sequoia_kernels import AcceptanceEstimate, HardwareProfile, generate

    words = {"auto": "auto", "adaptive": "adaptive", "none": None}
    tree: Any = words[args.tree] if args.tree in words else _load_tree(Path(args.tree))
    profile = HardwareProfile.load(args.profile) if hasattr(args, "profile") else None
    acceptance = AcceptanceEstimate.load(args.acceptance) if hasattr(args, "acceptance") else None
    text = getattr(args, "prompt", DEMO_PROMPT)
    text = sys.stdin.read() if text == "-" else text
    pair = _load_pair(args, terminal)
    if profile is not None:
        profile.check_device(pair.target.device)
    ids = pair.tokenizer(text, return_tensors="pt").input_ids.to(pair.target.device)
    if ids.shape[1] == 0:
        raise _BadUsage("--prompt must hold at least one token, got an empty text")
    output = generate(
        pair.target, None if tree is None else pair.draft, ids, tree="auto" if tree is None else tree,
        max_new_tokens=args.new_tokens, stop_strings=args.stop, tokenizer=pair.tokenizer, profile=profile,
        acceptance=acceptance, compile=args.compile,
        streamer=None if terminal.as_json else _text_streamer(pair.tokenizer), **_sampling(args),
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


def _load_tree(path: Path) -> Any:
    """Load a tree from a tree file or a plan file."""
    from sequoia_kernels import TokenTree, TreePlan

    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("format", "")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        kind = ""
    return TreePlan.load(path) if kind.endswith("tree-plan") else TokenTree.load(path)


# acceptance, profile, plan


def _add_acceptance(commands: Any) -> None:
    parser = _add_command(
        commands, "acceptance", _run_acceptance, "Estimate the acceptance vector of a pair from ordinary runs."
    )
    _add_models(parser)
    _add_sampling(parser)
    _add_prompts(parser)
    parser.add_argument(
        "--tree", type=Path, default=argparse.SUPPRESS, help="tree JSON to run with (default: a wide probe)"
    )
    parser.add_argument("--out", type=Path, default=argparse.SUPPRESS, help="write the estimate to this JSON file")


def _run_acceptance(args: argparse.Namespace, terminal: Terminal) -> int:
    tree = _load_tree(args.tree) if hasattr(args, "tree") else None
    pair = _load_pair(args, terminal)
    _need_draft(pair, "acceptance")
    estimate = _estimate(pair, _prompts(args, pair), args.new_tokens, _sampling(args), terminal, tree)
    if hasattr(args, "out"):
        estimate.save(args.out)

    def show() -> None:
        percent = f"{100 * estimate.confidence:g} %"
        table = Table(title=f"acceptance vector at temperature {args.temperature:g}")
        for column in ("child", "probability", f"{percent} interval", "visited", "accepted"):
            table.add_column(column, justify="right")
        for rank, value in enumerate(estimate.vector):
            table.add_row(
                str(rank),
                f"{value:.4f}",
                f"{estimate.lower[rank]:.4f} to {estimate.upper[rank]:.4f}",
                str(estimate.visited_by_rank[rank]),
                str(estimate.accepted_by_rank[rank]),
            )
        terminal.out.print(table)

    terminal.result(json.loads(estimate.to_json()), show)
    return 0


def _add_profile(commands: Any) -> None:
    parser = _add_command(commands, "profile", _run_profile, "Measure the models and ops on this machine.")
    _add_models(parser)
    parser.add_argument("--contexts", type=_counts, default="128,512", help="context lengths to measure at")
    parser.add_argument("--batch-size", type=_count, default=1)
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    parser.add_argument(
        "--microbenchmarks",
        action="store_true",
        help="also measure the parts of which forwards of other models can be composed (about a minute more)",
    )
    parser.add_argument(
        "--shapes",
        type=Path,
        nargs="+",
        metavar="CONFIG",
        default=argparse.SUPPRESS,
        help="with --microbenchmarks: the shapes of these models (config.json or folder), not a grid of common ones",
    )
    parser.add_argument("--out", type=Path, default=argparse.SUPPRESS, help="write the profile to this JSON file")


def _run_profile(args: argparse.Namespace, terminal: Terminal) -> int:
    from sequoia_kernels.planner import ModelFingerprint

    if hasattr(args, "shapes") and not args.microbenchmarks:
        raise _BadUsage("--shapes needs --microbenchmarks")
    shapes = [ModelFingerprint.from_config(path, args.dtype) for path in getattr(args, "shapes", ())]
    pair = _load_pair(args, terminal)
    profile = _measure(pair, args.contexts, args.batch_size, args.quick, terminal)
    if args.microbenchmarks:
        from sequoia_kernels.measure import measure_microbenchmarks

        with terminal.progress("measuring the parts of models") as advance:
            parts = measure_microbenchmarks(
                pair.target.device, pair.target.dtype, shapes=shapes, quick=args.quick, progress=advance
            )
        profile = profile.merged(parts)
    if hasattr(args, "out"):
        profile.save(args.out)

    def show() -> None:
        terminal.out.print(str(profile.device), markup=False)
        for key in profile.models:
            forwards = profile.forward_table(key, args.batch_size)
            table = Table(title=f"{key}: forward, ms")
            table.add_column("context", justify="right")
            for count in forwards.node_counts:
                table.add_column(f"{count} rows", justify="right")
            for context, row in zip(forwards.context_lens, forwards.p50_ms, strict=True):
                table.add_row(str(context), *(f"{value:.2f}" for value in row))
            terminal.out.print(table)
        if args.microbenchmarks:
            counts = ", ".join(f"{len(points)} of {op}" for op, points in parts.ops.items())
            terminal.out.print(f"parts in {args.dtype}: {counts}")

    terminal.result(json.loads(profile.to_json()), show)
    return 0


def _add_plan(commands: Any) -> None:
    parser = _add_command(commands, "plan", _run_plan, "Choose a tree from an acceptance file and a profile file.")
    parser.add_argument("--acceptance", type=Path, required=True, help="JSON written by `acceptance --out`")
    parser.add_argument("--profile", type=Path, required=True, help="JSON written by `profile --out`")
    parser.add_argument("--context", type=_count, default=argparse.SUPPRESS, help="committed tokens to plan for")
    parser.add_argument("--batch-size", type=_count, default=1)
    parser.add_argument("--max-budget", type=_count, default=argparse.SUPPRESS, help="largest number of nodes")
    parser.add_argument("--max-levels", type=_count, default=argparse.SUPPRESS, help="largest number of levels")
    parser.add_argument("--any-device", action="store_true", help="accept a profile of another device")
    models = parser.add_argument_group("models (those of the profile when none is given)")
    models.add_argument(
        "--target-config",
        type=Path,
        default=argparse.SUPPRESS,
        help="config.json or folder of the target: no weights are loaded; needs `profile --microbenchmarks`",
    )
    models.add_argument("--draft-config", type=Path, default=argparse.SUPPRESS, help="the same of the draft")
    models.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default=argparse.SUPPRESS,
        help="of models given by a config (default: as the config says)",
    )
    models.add_argument("--offload", action="store_true", help="plan for a target that streams from host memory")
    models.add_argument(
        "--device-memory", metavar="SIZE", default=argparse.SUPPRESS, help="device memory for it, such as 20GiB"
    )
    parser.add_argument("--out", type=Path, default=argparse.SUPPRESS, help="write the plan to this JSON file")
    parser.add_argument("--svg", type=Path, default=argparse.SUPPRESS, help="write a picture of the tree here")


_WORKSPACE_ROWS = 1024  # nodes of the largest tree


def _config_models(args: argparse.Namespace) -> tuple[Any, Any]:
    """Read the shapes of the models that the arguments name, (None, None) without any."""
    from sequoia_kernels.models.offload.memory import parse_bytes, plan_memory
    from sequoia_kernels.planner import ModelFingerprint

    has_target, has_draft = hasattr(args, "target_config"), hasattr(args, "draft_config")
    if has_target != has_draft:
        raise _BadUsage("--target-config and --draft-config must be given together")
    if args.offload and not (has_target and hasattr(args, "device_memory")):
        raise _BadUsage(
            "--offload needs --target-config, --draft-config and --device-memory; "
            "a profile measured with --offload needs none of them"
        )
    if hasattr(args, "device_memory") and not args.offload:
        raise _BadUsage("--device-memory needs --offload")
    if not has_target:
        return None, None
    dtype = getattr(args, "dtype", None)
    target = ModelFingerprint.from_config(args.target_config, dtype)
    draft = ModelFingerprint.from_config(args.draft_config, dtype)
    if args.offload:
        row_elements = 3 * target.vocab_size + 4 * target.hidden_size + 2 * (target.intermediate_size or 0)
        memory = plan_memory(
            [target.layer_bytes] * target.num_layers,
            target.weight_bytes - target.num_layers * target.layer_bytes,
            budget_bytes=parse_bytes("device_memory_budget", args.device_memory),
            kv_bytes=args.batch_size * (getattr(args, "context", 4096) + _WORKSPACE_ROWS) * target.cache_row_bytes,
            workspace_bytes=2 * args.batch_size * _WORKSPACE_ROWS * row_elements,
        )
        target = dataclasses.replace(target, streamed_bytes=memory.streamed_bytes)
    return target, draft


def _run_plan(args: argparse.Namespace, terminal: Terminal) -> int:
    from sequoia_kernels import AcceptanceEstimate, HardwareProfile, plan_tree

    acceptance = AcceptanceEstimate.load(args.acceptance)
    profile = HardwareProfile.load(args.profile)
    if not args.any_device:
        profile.check_device()
    target, draft = _config_models(args)
    plan = plan_tree(
        acceptance, profile, target=target, draft=draft,
        context_len=getattr(args, "context", None), batch_size=args.batch_size,
        max_budget=getattr(args, "max_budget", None), max_levels=getattr(args, "max_levels", None),
        temperature=acceptance.temperature,
    )  # fmt: skip
    if hasattr(args, "out"):
        plan.save(args.out)
    if hasattr(args, "svg"):
        plan.tree.save_svg(args.svg, plan.acceptance)

    def show() -> None:
        terminal.out.print(plan.describe(), markup=False)
        terminal.out.print(plan.tree.draw(plan.acceptance), markup=False)

    terminal.result(json.loads(plan.to_json()), show)
    return 0


# doctor


def _add_doctor(commands: Any) -> None:
    _add_command(
        commands, "doctor", _run_doctor, "Say what is installed, which backends work here, and why others do not."
    )


def _version_of(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _run_doctor(args: argparse.Namespace, terminal: Terminal) -> int:
    import torch

    from sequoia_kernels import ops  # noqa: F401  registers the backends
    from sequoia_kernels.backends import backend_report

    packages = {name: _version_of(name) for name in ("torch", "triton", "transformers", "numpy", "safetensors")}
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    modules: dict[str, str | None] = {}
    for module in ("_host", "_cuda"):
        try:
            __import__(f"sequoia_kernels.{module}")
            modules[module] = None
        except ImportError as error:
            modules[module] = str(error)
    report = backend_report()
    healthy = modules["_host"] is None and all(None in reasons.values() for reasons in report.values())
    document = {
        "version": __version__,
        "python": platform.python_version(),
        "packages": packages,
        "cuda_devices": devices,
        "modules": modules,
        "backends": report,
        "healthy": healthy,
    }

    def show() -> None:
        terminal.out.print(f"sequoia-kernels {__version__}, Python {platform.python_version()}, {platform.machine()}")
        terminal.out.print(", ".join(f"{name} {version or 'not installed'}" for name, version in packages.items()))
        terminal.out.print("CUDA devices: " + (", ".join(devices) if devices else "none"))
        for module, reason in modules.items():
            terminal.out.print(f"sequoia_kernels.{module}: " + ("built" if reason is None else f"missing ({reason})"))
        table = Table(title="backends", show_lines=False)
        for column in ("op", "backend", "works here"):
            table.add_column(column)
        for op, reasons in report.items():
            for name, reason in reasons.items():
                table.add_row(op, name, "yes" if reason is None else f"no: {reason}")
        terminal.out.print(table)
        if modules["_host"] is not None:
            terminal.out.print("Build the host module with `pip install .` from a checkout; it needs a C++17 compiler.")
        if modules["_cuda"] is not None:
            terminal.out.print("For the native CUDA kernels, install from source where nvcc is on the PATH.")

    terminal.result(document, show)
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
