"""tree="auto" from sixteen different first prompts on the demo pair: what the first call costs, and what it leads to.

Each first prompt meets a process that knows nothing: its call measures the pair and learns from its own text, as often
as there are rounds. Then all prompts are decoded in turn: without speculation, with the tree planned from every
prompt's counts, with each tree that a first call led to (held fast; equal trees are timed as one), and with the plans
that it led to (the loop goes on moving between their trees). A pick from one prompt should be nowhere slower than plain
decoding, and nearly as fast as the pick from all.
"""

from __future__ import annotations

import logging
import statistics
import sys
import time

from bench.common.demo import Demo, decoding_rate, take_turns
from bench.common.script import Run, Script, option, shared
from sequoia_kernels import GenerateStats, estimate_acceptance, generate, plan_tree
from sequoia_kernels.decoding import auto


def forget() -> None:
    """Make this process one that knows nothing of the pair."""
    auto._profiles.clear()
    auto._pairs.clear()


def measure(bench: Run) -> None:
    options = bench.options
    logging.getLogger("sequoia_kernels").setLevel(logging.ERROR)
    demo = Demo(bench)
    target, draft = demo.target, demo.draft
    prompts = demo.encode(demo.texts(options.prompts))
    bench.document |= {"new_tokens": options.new_tokens, "rounds": options.rounds, "turns": options.turns}
    results = bench.document["results"] = []
    for temperature in options.temperatures:
        common = demo.decoding(temperature)
        generate(target, None, prompts[0], **common | {"max_new_tokens": 16})  # warm-up
        firsts, runs, plans = [], [], {}
        for index, prompt in enumerate(prompts):
            calls = []
            for _ in range(options.rounds):
                forget()
                begin = time.perf_counter()
                stats = generate(target, draft, prompt, seed=index, **common).stats
                seconds = time.perf_counter() - begin
                first_tree = next(iter(stats.steps_by_tree))
                again = generate(target, draft, prompt, seed=index, tree=first_tree, **common).stats
                plain = generate(target, None, prompt, seed=index, **common).stats
                calls.append(
                    {
                        "call_seconds": seconds,
                        "measuring_seconds": seconds - stats.decode_seconds - (plain.seconds - plain.decode_seconds),
                        "decode_seconds": stats.decode_seconds,
                        "first_tree_throughout_seconds": again.decode_seconds,
                        "plain_decode_seconds": plain.decode_seconds,
                    }
                )
            # The last of these calls is the one that counts below.
            runs.append(stats)
            (kept,) = auto._pairs.values()
            (profile,) = auto._profiles.values()
            visited, accepted = (sum(counts[:1]) for counts in (stats.visited_by_rank, stats.accepted_by_rank))
            levels = auto.LEAST_LEVELS + int(sum(kept.evidence.visited[:1]) / auto.VISITS_PER_LEVEL)
            where = {"context_len": demo.context_len, "temperature": temperature}
            plans[index] = auto.plan_from_evidence(kept.evidence, profile, **where, max_levels=levels)
            pick = plans[index].plans[plans[index].start]
            over_plain = [call["plain_decode_seconds"] / call["decode_seconds"] for call in calls]
            firsts.append(
                {
                    "first_child_accepted": accepted / max(visited, 1),  # a first plan may be not to speculate
                    "estimate": float(kept.evidence.vector[0]),
                    "pick": {"nodes": pick.tree.num_nodes, "levels": pick.tree.num_levels},
                    "calls": calls,
                    "first_call_over_plain": statistics.median(over_plain),
                    "measuring_seconds": max(call["measuring_seconds"] for call in calls),
                }
            )
        everything = plan_tree(estimate_acceptance(runs), profile, **where)
        picks = {everything.tree} | {plan.plans[plan.start].tree for plan in plans.values()}
        providers = {"plain": None} | {f"pick {hash(tree)}": tree for tree in sorted(picks, key=str)}
        if not options.picks_only:
            providers |= {f"plans of first prompt {index}": plan for index, plan in plans.items()}
        decoders = {name: demo.decoder(tree, **common) for name, tree in providers.items()}
        timed: dict[str, list[GenerateStats]] = {name: [] for name in decoders}
        for turn in range(options.turns):
            for name, found in take_turns(decoders, prompts, 100 * (turn + 1)).items():
                timed[name] += found
        rate = {name: decoding_rate(found) for name, found in timed.items()}
        rate["all prompts"] = rate[f"pick {hash(everything.tree)}"]
        for index, first in enumerate(firsts):
            pick = plans[index].plans[plans[index].start].tree
            speeds = {"pick": rate[f"pick {hash(pick)}"]}
            if not options.picks_only:
                speeds["plans"] = rate[f"plans of first prompt {index}"]
            for name, speed in speeds.items():
                first |= {f"{name}_over_plain": speed / rate["plain"], f"{name}_over_all": speed / rate["all prompts"]}
        keys = [key for key in firsts[0] if key.endswith(("_plain", "_all"))]
        row = {
            "temperature": temperature,
            "prompts": options.prompts,
            "plain_tokens_per_second": rate["plain"],
            "all_prompts_tokens_per_second": rate["all prompts"],
            "all_prompts_pick": {"nodes": everything.tree.num_nodes, "levels": everything.tree.num_levels},
            "worst": {key: min(first[key] for first in firsts) for key in keys},
            "largest_measuring_seconds": max(first["measuring_seconds"] for first in firsts),
            "first_prompts": firsts,
        }
        results.append(row)
        print(f"T={temperature:g}, {options.prompts} first prompts; plain {rate['plain']:.1f} tokens/s")
        size = f"{everything.tree.num_nodes} x {everything.tree.num_levels}"
        print(f"  the pick from all prompts ({size}) {rate['all prompts']:.1f}")
        accepted = [first["first_child_accepted"] for first in firsts]
        print(f"  first child accepted in {min(accepted):.2f} to {max(accepted):.2f} of its visits")
        for key, value in row["worst"].items():
            print(f"  worst {key.replace('_', ' ')}: {value:.2f}x")
        print(f"  measuring took at most {row['largest_measuring_seconds']:.1f} s", flush=True)


OPTIONS = [
    *shared(device="cpu", threads=None, quick=False, temperatures=[0.0, 0.6]),
    *shared(prompts=16, prompt_tokens=128, new_tokens=128, rounds=3),
    option("--turns", type=int, default=12, help="times that all prompts are decoded with each pick, in turn"),
    option("--picks-only", action="store_true", help="do not decode with the plans, whose trees change"),
]
QUICK = {"prompts": 3, "new_tokens": 24, "temperatures": [0.0], "rounds": 1, "turns": 1}
main = Script(__spec__, measure, __doc__, OPTIONS, quick=QUICK).main


if __name__ == "__main__":
    sys.exit(main())
