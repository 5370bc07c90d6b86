"""Predicted tokens per step beside measured ones on the demo pair: both rules, trees of several sizes.

Steps are recorded on each half of the prompts. Trees are made from one half's steps and decode the prompts of the
other, then the two change places. A tree is valued in the steps of the half that it was made from, which differs from
what is measured by the texts, too; and in the steps that were recorded on the very prompts that it decodes, with other
seeds, which tells whether the prediction itself is off. Over both halves the two sides have seen the same prompts, so
the standard error of what a prediction is off by is taken from differences prompt by prompt. No times are taken.

    python -m bench.planner.bench_predictions --threads 1 --json bench/results/cpu/predictions.json

Above temperature 0 both sides may decode every prompt several times, with other seeds each (`--rounds`), and a second
run may take others than the first (`--seed 100000`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.common.demo import Demo
from bench.common.report import table
from bench.common.script import Run, Script, option, shared
from bench.planner.bench_rules import RULES, tokens_per_step
from sequoia_kernels import TokenTree
from sequoia_kernels.decoding import GenerateStats, record_steps
from sequoia_kernels.planner import OptimalTrees, StepRecords

CHAINS = (3, 5)
INTERVAL_ERRORS = 2 * 1.96  # standard errors that a 95 % interval spans
SIDES = ("made from", "same prompts")
WANTED = 0.03  # most that a prediction is to be off by
CERTAIN = 2.0  # standard errors beyond which a difference counts as one
BETWEEN = 10_000  # seeds from what is recorded to what is measured of a half, and on to the other's
Floats = NDArray[np.float64]


def trees_of(records: StepRecords, sizes: Sequence[int]) -> dict[str, TokenTree]:
    """Chains, and the optimal tree of each size by the acceptance vector of recorded steps."""
    trees = {f"chain of {length}": TokenTree.chain(length) for length in CHAINS}
    for nodes in sizes:
        levels = min(nodes, records.tree.num_levels)
        optimal = OptimalTrees(records.acceptance.vector, nodes, levels)
        for depth in np.argsort(-optimal.values[nodes, 2:], kind="stable") + 2:
            tree = optimal.tree(nodes, int(depth))
            if tree.num_nodes == nodes and records.holds(tree):
                trees[f"{nodes} nodes"] = tree
                break
    return trees


def measure(bench: Run) -> None:
    options = bench.options
    demo = Demo(bench)
    prompts = demo.encode(demo.texts(options.prompts))
    names = ("new_tokens", "prompt_tokens", "prompts", "nodes", "rules", "rounds", "seed")
    bench.document |= {name: getattr(options, name) for name in names} | {"results": []}
    halves = [prompts[::2], prompts[1::2]]
    for temperature in options.temperatures:
        bench.document["results"] += at_temperature(demo, temperature, halves, options)
        bench.tell(f"T = {temperature:g}")
        bench.save()
    print(markdown(bench.document["results"]))


def at_temperature(
    demo: Demo, temperature: float, halves: Sequence[Sequence[Any]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Predict in both halves, measure on the one that a tree was not made from; a row for each tree and rule."""
    rules = options.rules if temperature else RULES[:1]
    rounds = options.rounds if temperature else 1  # greedily they are all alike
    halves = [list(half) * rounds for half in halves]
    predicted: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {}
    shares: dict[tuple[str, str], list[tuple[Floats, Floats]]] = {}  # tokens and steps by prompt, of each half
    measured: dict[tuple[str, str], list[list[GenerateStats]]] = {}  # of the other half
    settings = {"max_new_tokens": demo.new_tokens, "temperature": temperature, "seed": options.seed}
    recorded = [record_steps(demo.target, demo.draft, half, **settings) for half in halves]
    for half, records in enumerate(recorded):
        other = halves[1 - half]
        for name, tree in trees_of(records, options.nodes).items():
            for rule in rules:
                sides = predicted.setdefault((name, rule), {side: [] for side in SIDES})
                for side, steps in zip(SIDES, (records, recorded[1 - half])):
                    lower, upper = steps.tokens_per_step_interval(tree, rule)
                    sides[side].append((steps.tokens_per_step(tree, rule), (upper - lower) / INTERVAL_ERRORS))
                shares.setdefault((name, rule), []).append(records.by_request(records.values(tree, rule)))
                decode = demo.decoder(tree, rule=rule, **demo.decoding(temperature))
                first = options.seed + BETWEEN * (1 + half)
                measured.setdefault((name, rule), []).append([decode(ids, first + n) for n, ids in enumerate(other)])
    rows = []
    for (name, rule), sides in predicted.items():
        if len(measured[name, rule]) < len(halves):  # one half's steps hold no such tree
            continue
        runs = [run for half in reversed(measured[name, rule]) for run in half]  # first those of the first half
        mean, error = tokens_per_step(runs)
        row = {
            "temperature": temperature, "tree": name, "rule": rule, "measured": mean, "measured_error": error,
            "steps": sum(run.num_steps for run in runs),
        }  # fmt: skip
        row |= {side: together(entries) for side, entries in sides.items()}
        foretold = np.concatenate([by_prompt(part, rounds) for part in weighed(shares[name, rule])])
        counts = [sum(n * count for n, count in enumerate(run.accepted_histogram)) for run in runs]
        own = deviations(np.array(counts, dtype=np.float64), np.array([run.num_steps for run in runs]))
        decoded = np.concatenate([by_prompt(part, rounds) for part in np.split(own, [len(halves[0])])])
        ratio = row[SIDES[0]][0] / mean
        rows.append(row | {"off_by": [ratio - 1, ratio * float(np.sqrt(((foretold - decoded) ** 2).sum()))]})
    return rows


def deviations(tokens: Floats, steps: Floats) -> Floats:
    """By what part of it each run moves the mean of all, tokens over steps. [runs]"""
    return np.asarray(tokens / tokens.sum() - steps / steps.sum())


def weighed(halves: Sequence[tuple[Floats, Floats]]) -> list[Floats]:
    """By what part of it each request moves what `together` gives of the halves. [requests] each."""
    slowness = np.array([steps.sum() / tokens.sum() for tokens, steps in halves])  # steps a token
    return [deviations(*half) * share for half, share in zip(halves, slowness / slowness.sum())]


def by_prompt(parts: Floats, rounds: int) -> Floats:
    """Sums over the rounds, in which the prompts come one after the other. [rounds * prompts] to [prompts]"""
    return np.asarray(parts.reshape(rounds, -1).sum(axis=0))


def together(entries: Sequence[tuple[float, float]]) -> list[float]:
    """Tokens per step over texts of which each half has as many tokens, and the standard error."""
    values, errors = (np.array(part) for part in zip(*entries))
    mean = 1 / (1 / values).mean()
    return [float(mean), float(mean**2 * np.sqrt(((errors / values**2) ** 2).sum()) / len(values))]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each tree and temperature, the rules beside one another; then which predictions are off."""
    lines: dict[Any, list[str]] = {}
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    for row in rows:
        line = lines.setdefault((row["temperature"], row["tree"]), [f"{row['temperature']:g}", row["tree"]])
        foretold, error = row[SIDES[0]]
        off, off_error = (100 * part for part in row["off_by"])
        line += [
            f"{foretold:.2f} ± {error:.2f}", f"{row['measured']:.2f} ± {row['measured_error']:.2f}",
            f"{off:+.1f} ± {off_error:.1f} %",
        ]  # fmt: skip
    header = ["T", "tree", *(f"{rule}: {part}" for rule in rules for part in ("foretold", "measured", "off by"))]
    shown = table(header, [line + [""] * (len(header) - len(line)) for line in lines.values()])
    return f"{shown}\n\n{verdict(rows)}"


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Say which predictions are off by more than wanted, and which of them by more than chance alone explains."""
    off = [row for row in rows if abs(row["off_by"][0]) > WANTED]
    text = f"{len(rows) - len(off)} of {len(rows)} within {100 * WANTED:g} %"
    for row in off:
        difference, error = row["off_by"]
        known = "" if abs(difference) > CERTAIN * error else f", less than {CERTAIN:g} standard errors"
        text += f"; {row['tree']}, {row['rule']}, T = {row['temperature']:g}: {100 * difference:+.1f} %{known}"
    return text


OPTIONS = [
    *shared(device="cpu", threads=None, quick=False, temperatures=[0.0, 0.6, 1.0], prompts=56),
    *shared(prompt_tokens=128, new_tokens=128),
    option("--rules", nargs="+", choices=RULES, default=list(RULES), help="verification rules (default: all)"),
    option("--rounds", type=int, default=1, help="times that a prompt is decoded (default %(default)s)"),
    option("--seed", type=int, default=0, help="first seed (default %(default)s)"),
    option("--nodes", type=int, nargs="+", default=[8, 16, 32, 64], help="sizes of the optimal trees"),
]
QUICK = {"temperatures": [1.0], "nodes": [8], "prompts": 2, "prompt_tokens": 48, "new_tokens": 24}
main = Script(__spec__, measure, __doc__, OPTIONS, quick=QUICK).main


if __name__ == "__main__":
    sys.exit(main())
