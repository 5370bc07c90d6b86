"""The planner's picks against the best of a measured grid of trees, with the demo pair.

Profile and acceptance are measured, the planner picks, once from an acceptance vector and once from recorded steps;
then the picks and every tree of the grid (optimal trees of several budgets and levels, chains, no speculation) decode
the same held-out prompts, taking turns in shuffled order. The best of the grid is the best of many noisy measurements,
so a pick looks a little worse than it is.
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
from sequoia_kernels.decoding import record_steps

BUDGETS = (4, 8, 12, 16, 24, 32, 48)
LEVELS = (3, 5, 8)
CHAINS = (2, 3, 4, 6)
GOALS = {"a vector": 0.9, "recorded steps": 0.97}


def measure(bench: Run) -> None:
    options = bench.options
    demo = Demo(bench)
    calibration, prompts = demo.prompts(options)
    profile = demo.profile(2 * options.prompt_tokens, seconds=options.profile_seconds, quick=True)
    common = demo.decoding(options.temperature)
    acceptance = demo.acceptance(calibration, **common)
    settings = {"max_new_tokens": demo.new_tokens, "temperature": options.temperature}
    records = record_steps(demo.target, demo.draft, calibration, **settings)
    known = dict(zip(GOALS, (acceptance, records), strict=True))
    plans = {
        name: plan_tree(source, profile, context_len=demo.context_len, rule="sequoia", shaped=False)
        for name, source in known.items()
    }
    trees = grid(list(acceptance.vector), options.quick)
    for plan in plans.values():
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
        results.append(row | {"picked_from": [name for name, plan in plans.items() if tree == plan.tree]})
    results.sort(key=lambda entry: -entry["tokens_per_second"])
    bench.document |= {name: getattr(options, name) for name in ("temperature", "prompts", "new_tokens", "rounds")}
    by_round = [entry["tokens_per_second_by_round"] for entry in results]
    spread = statistics.median(max(rates) / min(rates) for rates in by_round)
    picks = []
    for name, plan in plans.items():
        measured = next(entry["tokens_per_second"] for entry in results if name in entry["picked_from"])
        over_best = measured / results[0]["tokens_per_second"]
        picks.append(
            {
                "from": name, "nodes": plan.tree.num_nodes, "levels": plan.tree.num_levels, "goal": GOALS[name],
                "predicted_tokens_per_second": plan.tokens_per_second, "tokens_per_second": measured,
                "over_best": over_best,
            }
        )  # fmt: skip
    bench.document |= {"picks": picks, "median_spread": spread, "results": results}
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
    rows, best = [], document["results"][0]["tokens_per_second"]
    for entry in document["results"]:
        name, rate = entry["tree"], entry["tokens_per_second"]
        if entry["picked_from"]:
            name = f"**{name}, the pick from {' and from '.join(entry['picked_from'])}**"
        rows.append([name, str(entry["nodes"]), str(entry["levels"]), f"{rate:.1f}", f"{rate / best:.3f}"])
    return "\n\n".join(
        [
            "## planner_pick",
            f"Demo pair, T = {document['temperature']:g}, {document['environment']['device']['name']}, "
            f"{document['environment']['threads']} threads.\n`{document['command']}`",
            *(
                f"The pick from {pick['from']} ({pick['nodes']} nodes x {pick['levels']} levels) reaches "
                f"{100 * pick['over_best']:.1f} % of the best of {len(rows)} trees; predicted "
                f"{pick['predicted_tokens_per_second']:.0f} tokens/s, measured {pick['tokens_per_second']:.0f}."
                for pick in document["picks"]
            ),
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
