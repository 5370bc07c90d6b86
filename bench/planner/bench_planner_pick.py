"""The planner's pick against the best of a measured grid of trees, with the demo pair.

Profile and acceptance are measured, the planner picks; then the pick and every tree of the grid (optimal trees of
several budgets and levels, chains, no speculation) decode the same held-out prompts, taking turns in shuffled order.
The best of the grid is the best of many noisy measurements, so the pick looks a little worse than it is.
"""

from __future__ import annotations

import random
import statistics
import sys
from typing import Any

from bench.common.demo import Demo
from bench.common.report import table
from bench.common.script import Run, Script, option, shared
from sequoia_kernels import TokenTree, optimal_tree, plan_tree

BUDGETS = (4, 8, 12, 16, 24, 32, 48)
LEVELS = (3, 5, 8)
CHAINS = (2, 3, 4, 6)
GOAL = 0.9


def measure(bench: Run) -> None:
    options = bench.options
    demo = Demo(bench)
    calibration, prompts = demo.prompts(options)
    profile = demo.profile(2 * options.prompt_tokens, seconds=options.profile_seconds, quick=True)
    common = demo.decoding(options.temperature)
    acceptance = demo.acceptance(calibration, **common)
    plan = plan_tree(acceptance, profile, context_len=demo.context_len)
    trees = grid(list(acceptance.vector), options.quick)
    trees.setdefault(plan.tree, "refined tree")
    seconds: dict[TokenTree, list[float]] = {tree: [0.0] * options.rounds for tree in trees}
    tokens: dict[TokenTree, list[int]] = {tree: [0] * options.rounds for tree in trees}
    decoders = {tree: demo.decoder(tree if tree.num_nodes > 1 else None, rule="sequoia", **common) for tree in trees}
    for decode in decoders.values():  # the first run of a tree builds its tensors
        decode(prompts[0], 0)
    for turn in range(options.rounds):
        runs = [(tree, index) for tree in trees for index in range(len(prompts))]
        random.Random(turn).shuffle(runs)
        for tree, index in runs:
            stats = decoders[tree](prompts[index], 1000 * turn + index)
            seconds[tree][turn] += stats.decode_seconds
            tokens[tree][turn] += sum(stats.new_tokens) - 1
    results = []
    for tree, name in trees.items():
        rates = [count / time for count, time in zip(tokens[tree], seconds[tree], strict=True)]
        row = {"tree": name, "nodes": tree.num_nodes, "levels": tree.num_levels, "parents": list(tree.parents)}
        row |= {"tokens_per_second": sum(tokens[tree]) / sum(seconds[tree]), "tokens_per_second_by_round": rates}
        results.append(row | {"is_pick": tree == plan.tree})
    results.sort(key=lambda entry: -entry["tokens_per_second"])
    picked = next(entry for entry in results if entry["is_pick"])
    share = picked["tokens_per_second"] / results[0]["tokens_per_second"]
    bench.document |= {name: getattr(options, name) for name in ("temperature", "prompts", "new_tokens", "rounds")}
    by_round = [entry["tokens_per_second_by_round"] for entry in results]
    spread = statistics.median(max(rates) / min(rates) for rates in by_round)
    bench.document |= {"predicted_tokens_per_second": plan.tokens_per_second, "pick_over_best": share, "goal": GOAL}
    bench.document |= {"median_spread": spread, "results": results}
    print(markdown(bench.document))


def grid(vector: list[float], quick: bool) -> dict[TokenTree, str]:
    """The trees to measure, by what they are."""
    found = {TokenTree.single(): "no speculation"}
    for length in CHAINS[:1] if quick else CHAINS:
        found.setdefault(TokenTree.chain(length), "chain")
    for budget in BUDGETS[1:2] if quick else BUDGETS:
        for levels in LEVELS:
            found.setdefault(optimal_tree(vector, budget, levels), "optimal tree")
    return found


def markdown(document: dict[str, Any]) -> str:
    picked = next(entry for entry in document["results"] if entry["is_pick"])
    rows, best = [], document["results"][0]["tokens_per_second"]
    for entry in document["results"]:
        name, rate = entry["tree"], entry["tokens_per_second"]
        cells = [f"**{name}, the pick**" if entry["is_pick"] else name, str(entry["nodes"]), str(entry["levels"])]
        rows.append([*cells, f"{rate:.1f}", f"{rate / best:.3f}"])
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


OPTIONS = [
    *shared(device="cpu", threads=None, quick=False, prompts=4, calibration_prompts=8, prompt_tokens=128),
    *shared(new_tokens=64, rounds=3, profile_seconds=20.0),
    option("--temperature", type=float, default=0.6),
]
QUICK = {"prompts": 1, "calibration_prompts": 1, "rounds": 1, "new_tokens": 24, "profile_seconds": 2.0}
main = Script(__spec__, measure, __doc__, OPTIONS, quick=QUICK, markdown=markdown).main


if __name__ == "__main__":
    sys.exit(main())
