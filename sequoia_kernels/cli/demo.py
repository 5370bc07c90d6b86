"""`demo`: measure this machine, choose a tree for it, and show generation with and without."""

from __future__ import annotations

import argparse
import datetime
import os
from collections.abc import Sequence
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
from sequoia_kernels.documents import write_text
from sequoia_kernels.version import __version__


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "demo",
        run,
        "Measure this machine, choose a tree for it, and show generation with and without.",
        "sequoia-kernels demo --html demo.html",
    )
    add_models(parser)
    parser.add_argument("--prompt", help="text to continue (default: the start of a Python function)")
    parser.add_argument(
        "--temperatures", type=float, nargs="+", default=[0.0, 1.0], metavar="T", help="0 is greedy; each is measured"
    )
    parser.add_argument("--top-p", type=float, help="keep this much probability")
    parser.add_argument("--new-tokens", type=positive, default=128, help="tokens generated behind each prompt")
    parser.add_argument("--num-prompts", type=positive, default=7, help="held-out prompts timed besides the shown one")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal texts with equal trees")
    parser.add_argument("--svg", type=Path, help="write a picture of the last tree here")
    parser.add_argument(
        "--html", type=Path,
        help="write a page of the results here: one file that holds all it needs, with the text by steps, the tree and "
        "where the time goes",
    )  # fmt: skip


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
        plan = plan_tree(evidence, profile, context_len=longest + args.new_tokens / 2, temperature=temperature,
                         shaped=False)  # fmt: skip
        rows.append(_demo_row(args, pair, timed, sampling, plan, terminal))
    assert plan is not None

    def show() -> None:
        terminal.out.print(plan.token_tree.draw(plan.acceptance))
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
        plan.token_tree.save_svg(args.svg, plan.acceptance)
    document = {
        "version": __version__,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": str(profile.device),
        "torch": profile.device.torch_version,
        "target": _model_name(args.target),
        "draft": _model_name(args.draft),
        "dtype": str(pair.target.dtype).removeprefix("torch."),
        "new_tokens": args.new_tokens,
        "num_prompts": len(timed),
        "top_p": args.top_p,
        "seed": args.seed,
        "rows": rows,
        "plan": plan.to_document(),
    }
    if args.html is not None:
        from sequoia_kernels.demo.page import demo_page

        write_text(args.html, demo_page(document))
    terminal.result(document, show)
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
    shown_tokens: list[int] = []  # the first prompt's
    with terminal.progress("timing with and without") as advance:
        for index, ids in enumerate(prompts):
            advance(index, len(prompts), f"prompt {index + 1}")
            without = generate(pair.target, None, ids, **common)
            with_tree = generate(pair.target, pair.draft, ids, tree=plan, **common)
            identical &= without.new_tokens == with_tree.new_tokens
            shown_tokens = shown_tokens or with_tree.new_tokens[0]
            plain.append(without.stats)
            speculative.append(with_tree.stats)
        advance(len(prompts), len(prompts))

    def rate(runs: list[Any]) -> float:
        return sum(sum(run.new_tokens) - 1 for run in runs) / sum(run.decode_seconds for run in runs)

    def step_ms(runs: list[Any]) -> float:
        return 1e3 * sum(run.decode_seconds for run in runs) / max(sum(run.num_steps for run in runs), 1)

    def stages_ms(runs: list[Any]) -> dict[str, float]:
        steps = max(sum(run.num_steps for run in runs), 1)
        names = dict.fromkeys(name for run in runs for name in run.stage_seconds if name != "prefill")
        return {name: 1e3 * sum(run.stage_seconds.get(name, 0.0) for run in runs) / steps for name in names}

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
        "rule": plan.rule,
        "parents": list(plan.tree.parents),
        "steps": steps,
        "accepted_by_node": _accepted_by_node(plan.tree, [node for run in speculative for node in run.last_nodes[0]]),
        "stages_ms": stages_ms(speculative),
        "autoregressive_stages_ms": stages_ms(plain),
        "text": {
            "prompt": pair.tokenizer.decode(prompts[0][0]),
            "steps": _by_steps(
                token_texts(pair.tokenizer, prompts[0][0].tolist(), shown_tokens),
                [plan.tree.depths[node] + 1 for node in speculative[0].last_nodes[0]],
            ),
        },
    }


def _accepted_by_node(tree: Any, last_nodes: Sequence[int]) -> list[int]:
    """Count the steps whose accepted path came through each node; the root is in all of them."""
    counts = [0] * tree.num_nodes
    for node in last_nodes:
        counts[node] += 1
    for node in range(tree.num_nodes - 1, 0, -1):  # children have larger numbers than their parents
        counts[tree.parents[node]] += counts[node]
    return counts


def _by_steps(texts: list[str], counts: Sequence[int]) -> list[list[str]]:
    """Split the texts of a generation's tokens by steps: the prefill's one token, then as many as each step gave.

    The last step may have given more than were asked for.
    """
    steps, place = [texts[:1]], 1
    for count in counts:
        steps.append(texts[place : place + count])
        place += count
    return steps


def token_texts(tokenizer: Any, prompt: list[int], tokens: list[int]) -> list[str]:
    """Give the text that each token adds behind a prompt. A character of several tokens is the last one's."""
    ids = prompt[-8:] + tokens
    texts: list[str] = []
    context, shown = 0, len(ids) - len(tokens)  # ids[context:shown] are told already
    for end in range(shown + 1, len(ids) + 1):
        known, text = (
            tokenizer.decode(ids[context:place], clean_up_tokenization_spaces=False) for place in (shown, end)
        )
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            texts.append("")  # a part of a character
            continue
        texts.append(text[len(known) :])
        context, shown = shown, end
    return texts


def _model_name(name: str | None) -> str:
    """Name a model for a page that is shown to others: of a folder, only its own name."""
    if name is None:
        return "demo pair"
    return Path(os.path.abspath(os.path.expanduser(name))).name if Path(name).expanduser().is_dir() else name
