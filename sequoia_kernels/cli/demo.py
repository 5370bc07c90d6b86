"""`demo`: measure this machine, choose a tree for it, and show generation with and without."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sequoia_kernels.cli.arguments import add_command, add_models, positive
from sequoia_kernels.cli.pair import (
    DEMO_PROMPT,
    Pair,
    encode_prompts,
    estimate_pair,
    load_pair,
    measure_pair,
    need_draft,
    record_pair,
    text_streamer,
)
from sequoia_kernels.cli.terminal import Terminal
from sequoia_kernels.version import __version__


def add(commands: Any) -> None:
    parser = add_command(
        commands, "demo", run, "Measure this machine, choose a tree for it, and show generation with and without."
    )
    add_models(parser)
    parser.add_argument("--prompt", help="text to continue (default: the start of a Python function)")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0], metavar="T")
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--new-tokens", type=positive, default=128)
    parser.add_argument("--num-prompts", type=positive, default=7, help="held-out prompts timed besides the shown one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--svg", type=Path, help="write a picture of the last tree here")


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    from sequoia_kernels import plan_tree
    from sequoia_kernels.demo import held_out_prompts

    need_draft(args)
    pair = load_pair(args, terminal)
    timed = [
        *encode_prompts([args.prompt or DEMO_PROMPT], pair),
        *encode_prompts(held_out_prompts(args.num_prompts), pair, 128),
    ]
    longest = max(x.shape[1] for x in timed)
    profile = measure_pair(pair, (longest, longest + args.new_tokens), 1, True, terminal)
    rows = []
    plan = None
    for temperature in args.temperatures:
        sampling = {"temperature": temperature, "top_k": None, "top_p": args.top_p, "seed": args.seed}
        # On the very prompts that are timed, with another tree: texts differ from one another by more than what a
        # prediction is to be wrong by, and acceptance is known to be that of the text.
        evidence = (record_pair if temperature else estimate_pair)(pair, timed, args.new_tokens, sampling, terminal)
        plan = plan_tree(evidence, profile, context_len=longest + args.new_tokens / 2, temperature=temperature)
        rows.append(_demo_row(args, pair, timed, sampling, plan, terminal))
    assert plan is not None

    def show() -> None:
        terminal.out.print(plan.tree.draw(plan.acceptance))
        cells = []
        for row in rows:
            tree = (f"{row['temperature']:g}", f"{row['nodes']} x {row['levels']}")
            for label, name, first in (("predicted", "predicted_", tree), ("measured", "", ("", ""))):
                steps = (f"{row[name + what]:.2f}" for what in ("tokens_per_step", "step_ms", "autoregressive_step_ms"))
                rate = f"{row[name + 'speculative_tokens_per_second']:.0f}"
                cells.append((*first, label, *steps, rate, f"{row[name + 'speedup']:.2f}x"))
        columns = ("T", "tree", "", "tokens/step", "ms/step", "plain ms", "tokens/s", "speedup")
        title = f"predicted from the acceptance on {len(timed)} prompts, and measured on the same ones"
        terminal.table(columns, cells, title)
        for row in rows:
            if row["temperature"] == 0:
                same = "identical to" if row["greedy_output_identical"] else "NOT identical to"
                terminal.out.print(f"greedy output is {same} that of plain decoding, on all {len(timed)} prompts")

    if args.svg is not None:
        plan.tree.save_svg(args.svg, plan.acceptance)
    terminal.result({"version": __version__, "rows": rows, "plan": plan.to_document()}, show)
    return 0


def _demo_row(
    args: argparse.Namespace, pair: Pair, prompts: list[Any], sampling: dict[str, Any], plan: Any, terminal: Terminal
) -> dict[str, Any]:
    """Stream the first prompt's continuation, then time all prompts with and without speculation, in turn."""
    from sequoia_kernels import generate

    common = sampling | {"max_new_tokens": args.new_tokens, "eos_token_id": ()}
    if not terminal.as_json:
        terminal.out.rule(f"temperature {sampling['temperature']:g}")
        terminal.out.print(plan.describe())
        terminal.out.rule("the target's text, generated with the tree")
        generate(pair.target, pair.draft, prompts[0], tree=plan, streamer=text_streamer(pair.tokenizer), **common)
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

    def step_ms(runs: list[Any]) -> float:
        return 1e3 * sum(run.decode_seconds for run in runs) / max(sum(run.num_steps for run in runs), 1)

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
        "predicted_speculative_tokens_per_second": plan.tokens_per_second,
        "tokens_per_step": accepted / steps if steps else 1.0,
        "predicted_tokens_per_step": plan.tokens_per_step,
        "step_ms": step_ms(speculative),
        "predicted_step_ms": plan.step_ms,
        "autoregressive_step_ms": step_ms(plain),
        "predicted_autoregressive_step_ms": plan.no_speculation.step_ms,
        "greedy_output_identical": identical if sampling["temperature"] == 0 else None,
    }
