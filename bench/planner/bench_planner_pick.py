"""The planner's pick against the best of a measured grid of trees, with the demo pair.

Profile and acceptance are measured, the planner picks; then the pick and every tree of the grid (optimal trees of
several budgets and levels, chains, no speculation) decode the same held-out prompts, taking turns in shuffled order.
The best of the grid is the best of many noisy measurements, so the pick looks a little worse than it is::

    python -m bench.planner.bench_planner_pick --threads 1 --json out.json
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from bench.common.harness import write_json
from bench.common.machine import command_line, commit, environment, pick_device
from bench.common.report import table
from sequoia_kernels import TokenTree, estimate_acceptance, generate, measure_profile, optimal_tree, plan_tree
from sequoia_kernels.decoding import PROBE_TREE, measure_overhead
from sequoia_kernels.demo import held_out_prompts, load_demo_pair
from sequoia_kernels.models import adapt

BUDGETS = (4, 8, 12, 16, 24, 32, 48)
LEVELS = (3, 5, 8)
CHAINS = (2, 3, 4, 6)
GOAL = 0.9


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results here, and a table beside them")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--prompts", type=int, default=4, help="timed prompts (default 4)")
    parser.add_argument("--calibration-prompts", type=int, default=8, help="other prompts, for the acceptance vector")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="times that every tree decodes every prompt (default 3)")
    parser.add_argument("--profile-seconds", type=float, default=20.0, help="time for the hardware profile")
    parser.add_argument("--quick", action="store_true", help="a grid of three trees, one prompt, one round")
    options = parser.parse_args(arguments)
    if options.quick:
        options.prompts = options.calibration_prompts = options.rounds = 1
        options.new_tokens, options.profile_seconds = 24, 2.0
    if options.threads:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    pair = load_demo_pair(torch.float32, device)
    target, draft = adapt(pair.target), adapt(pair.draft)
    texts = held_out_prompts(options.prompts + options.calibration_prompts, 4 * options.prompt_tokens)
    ids = [pair.tokenizer(text, return_tensors="pt").input_ids[:, : options.prompt_tokens].to(device) for text in texts]
    calibration, prompts = ids[: options.calibration_prompts], ids[options.calibration_prompts :]
    context_len = options.prompt_tokens + options.new_tokens // 2
    profile = measure_profile(
        target, draft, context_lens=(options.prompt_tokens, 2 * options.prompt_tokens),
        seconds=options.profile_seconds, quick=True,
    )  # fmt: skip
    profile = measure_overhead(target, draft, profile, context_len=options.prompt_tokens)
    common: dict[str, Any] = {
        "max_new_tokens": options.new_tokens, "temperature": options.temperature, "eos_token_id": (),
    }  # fmt: skip
    acceptance = estimate_acceptance(
        [generate(target, draft, x, tree=PROBE_TREE, seed=n, **common).stats for n, x in enumerate(calibration)],
        temperature=options.temperature,
    )
    plan = plan_tree(acceptance, profile, context_len=context_len)
    trees = grid(list(acceptance.vector), options.quick)
    trees.setdefault(plan.tree, "refined tree")
    seconds: dict[TokenTree, list[float]] = {tree: [0.0] * options.rounds for tree in trees}
    tokens: dict[TokenTree, list[int]] = {tree: [0] * options.rounds for tree in trees}
    for tree in trees:  # the first run of a tree builds its tensors
        decode(target, draft, prompts[0], tree, common, 0)
    for turn in range(options.rounds):
        runs = [(tree, index) for tree in trees for index in range(len(prompts))]
        random.Random(turn).shuffle(runs)
        for tree, index in runs:
            stats = decode(target, draft, prompts[index], tree, common, 1000 * turn + index)
            seconds[tree][turn] += stats.decode_seconds
            tokens[tree][turn] += sum(stats.new_tokens) - 1
    results = []
    for tree, name in trees.items():
        rates = [count / time for count, time in zip(tokens[tree], seconds[tree], strict=True)]
        results.append(
            {
                "tree": name,
                "nodes": tree.num_nodes,
                "levels": tree.num_levels,
                "parents": list(tree.parents),
                "tokens_per_second": sum(tokens[tree]) / sum(seconds[tree]),
                "tokens_per_second_by_round": rates,
                "is_pick": tree == plan.tree,
            }
        )
    results.sort(key=lambda entry: -entry["tokens_per_second"])
    picked = next(entry for entry in results if entry["is_pick"])
    share = picked["tokens_per_second"] / results[0]["tokens_per_second"]
    document = {
        "bench": "planner_pick",
        "command": command_line("bench.planner.bench_planner_pick", arguments),
        "commit": commit(),
        "environment": environment(device),
        "temperature": options.temperature,
        "prompts": options.prompts,
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "predicted_tokens_per_second": plan.tokens_per_second,
        "pick_over_best": share,
        "goal": GOAL,
        "median_spread": statistics.median(
            max(entry["tokens_per_second_by_round"]) / min(entry["tokens_per_second_by_round"]) for entry in results
        ),
        "results": results,
    }
    text = markdown(document, picked)
    print(text)
    if options.json:
        write_json(options.json, document)
        options.json.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    return 0


def grid(vector: list[float], quick: bool) -> dict[TokenTree, str]:
    """The trees to measure, by what they are."""
    found = {TokenTree.single(): "no speculation"}
    for length in CHAINS[:1] if quick else CHAINS:
        found.setdefault(TokenTree.chain(length), "chain")
    for budget in BUDGETS[1:2] if quick else BUDGETS:
        for levels in LEVELS:
            found.setdefault(optimal_tree(vector, budget, levels), "optimal tree")
    return found


def decode(target: Any, draft: Any, prompt: Any, tree: TokenTree, common: dict[str, Any], seed: int) -> Any:
    if tree.num_nodes == 1:
        return generate(target, None, prompt, seed=seed, **common).stats
    return generate(target, draft, prompt, tree=tree, seed=seed, **common).stats


def markdown(document: dict[str, Any], picked: dict[str, Any]) -> str:
    rows = [
        [
            f"**{entry['tree']}, the pick**" if entry["is_pick"] else entry["tree"],
            str(entry["nodes"]),
            str(entry["levels"]),
            f"{entry['tokens_per_second']:.1f}",
            f"{entry['tokens_per_second'] / document['results'][0]['tokens_per_second']:.3f}",
        ]
        for entry in document["results"]
    ]
    return "\n\n".join(
        [
            "## planner_pick",
            f"Demo pair, T = {document['temperature']:g}, {document['environment']['device']['name']}, "
            f"{document['environment']['threads']} threads.\n`{document['command']}`",
            f"The pick ({picked['nodes']} nodes x {picked['levels']} levels) reaches "
            f"{100 * document['pick_over_best']:.1f} % of the best of {len(rows)} trees; predicted "
            f"{document['predicted_tokens_per_second']:.0f} tokens/s, measured {picked['tokens_per_second']:.0f}.",
            table(["tree", "nodes", "levels", "tokens/s", "of the best"], rows),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
