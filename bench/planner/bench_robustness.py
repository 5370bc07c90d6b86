"""Robustness study: tokens per step of three samplers on equal trees, and of four families of trees over the budget.

Grid: temperature x top-p x tree, for drawing without replacement (ours), with replacement (SpecInfer) and top-k, all
verified without loss (samplers.py). Budgets: 1 to 512 nodes of optimal trees, chains, independent chains and k-ary
trees, predicted from the acceptance vector and measured. Measured is on texts that the target wrote itself, the same
for all samplers and trees (replay.py); real loops with each sampler swapped in check that. No times are taken::

    python -m bench.planner.bench_robustness --json bench/results/cpu/robustness.json --page docs/robustness.md
    python -m bench.planner.bench_robustness --target PATH --draft PATH --prompts-file FILE --json out.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.common.demo import encode_prompts, load_checkpoints, texts_of
from bench.common.replay import Estimate, acceptance_of_texts, as_row, difference, ratio, replay, write_texts
from bench.common.samplers import CUT_DRAFT, OURS, SAMPLERS, TOP_K, Sampler
from bench.common.script import Run, Script, option, shared
from bench.tools import robustness_page
from sequoia_kernels import TokenTree, generate
from sequoia_kernels.demo import load_demo_pair
from sequoia_kernels.models import TreeModel, adapt
from sequoia_kernels.planner import optimal_tree

VERSION = 1
TEMPERATURES = (0.0, 0.2, 0.6, 1.0, 1.2)
TOP_PS = (0.8, 0.9, 1.0)
BUDGETS = tuple(2**power for power in range(10))
BUDGET_TEMPERATURES = (0.0, 0.6, 1.0)
NUM_RANKS = 32
# The tree that is the same for everybody is optimal for our vector at this setting.
TREE_SETTING = (0.6, 1.0)
NOISE = 3.0  # standard errors; with about a hundred comparisons, two would be exceeded by chance


@dataclass(frozen=True)
class Size:
    """How much is run."""

    prompts: int = 32  # texts that are measured
    calibration_prompts: int = 12  # other texts, for the acceptance vectors that trees are built from
    prompt_tokens: int = 64  # tokens of each prompt, at most
    starts: int = 112  # positions of each text at which steps begin
    tail: int = 48  # positions behind them, for steps to end in
    temperatures: tuple[float, ...] = TEMPERATURES
    top_ps: tuple[float, ...] = TOP_PS
    budgets: tuple[int, ...] = BUDGETS
    budget_temperatures: tuple[float, ...] = BUDGET_TEMPERATURES
    # (temperature, top-p) at which real loops are run on the small tree, with each sampler
    loops: tuple[tuple[float, float], ...] = ((0.2, 1.0), (0.6, 1.0), (1.0, 0.9), (1.2, 0.8))
    # (family, budget) of real loops at `TREE_SETTING`, with ours
    loop_trees: tuple[tuple[str, int], ...] = (("optimal", 8), ("optimal", 128), ("chain", 8), ("8 chains", 32))
    loop_prompts: int = 32
    loop_tokens: int = 96


QUICK = Size(
    prompts=4, calibration_prompts=4, prompt_tokens=32, starts=16, tail=16, temperatures=(0.0, 0.6), top_ps=(0.9, 1.0),
    budgets=(1, 8, 64), budget_temperatures=(0.6,), loops=((0.6, 1.0),), loop_trees=(("optimal", 8),), loop_prompts=4,
    loop_tokens=16,
)  # fmt: skip


def first_nodes(tree: TokenTree, budget: int) -> TokenTree:
    """The first nodes of a tree in breadth-first order."""
    return TokenTree(tree.parents[:budget])


def k_chains(num_chains: int, budget: int) -> TokenTree:
    """Independent chains below the root, as equal in length as the budget lets them be."""
    return first_nodes(TokenTree.k_chains(num_chains, max(1, -(-(budget - 1) // num_chains))), budget)


def k_ary(branching: int, budget: int) -> TokenTree:
    """The full k-ary tree, cut to the budget on its last level."""
    num_levels = 1
    while (branching**num_levels - 1) // (branching - 1) < budget:
        num_levels += 1
    return first_nodes(TokenTree.kary(branching, num_levels), budget)


# name -> tree of a budget, given the acceptance vector
FAMILIES: dict[str, Callable[[Sequence[float], int], TokenTree]] = {
    "optimal": lambda vector, budget: optimal_tree(vector, budget),
    "chain": lambda vector, budget: TokenTree.chain(budget),
    "4 chains": lambda vector, budget: k_chains(4, budget),
    "8 chains": lambda vector, budget: k_chains(8, budget),
    "binary": lambda vector, budget: k_ary(2, budget),
    "4-ary": lambda vector, budget: k_ary(4, budget),
}


class Study:
    """The models, the prompts, and what was measured on the texts of each setting."""

    def __init__(self, target: TreeModel, draft: TreeModel, prompts: torch.Tensor, size: Size, seed: int) -> None:
        self.target, self.draft, self.prompts, self.size, self.seed = target, draft, prompts, size, seed
        self._acceptance: dict[tuple[float, float], list[torch.Tensor]] = {}

    def acceptance(self, temperature: float, top_p: float, sampler: Sampler = OURS) -> torch.Tensor:
        """Acceptance of the emitted tokens on all texts of a setting. [prompts, positions, NUM_RANKS]."""
        key = (temperature, 1.0 if temperature == 0 else top_p)  # top-p changes nothing at temperature 0
        if key not in self._acceptance:
            texts = write_texts(self.target, self.prompts, self.size.starts + self.size.tail, *key, self.seed)
            samplers = (*SAMPLERS, CUT_DRAFT) if key[1] < 1 else SAMPLERS
            self._acceptance[key] = acceptance_of_texts(
                texts, self.target, self.draft, samplers, min(NUM_RANKS, self.target.vocab_size), self.seed
            )
            print(f"  T={key[0]:g}, top-p {key[1]:g}: {texts.sequences.shape[0]} texts", file=sys.stderr, flush=True)
        return self._acceptance[key][(*SAMPLERS, CUT_DRAFT).index(sampler)]

    def vector(self, temperature: float, top_p: float, sampler: Sampler = OURS) -> list[float]:
        """Acceptance vector on the calibration texts: the mean over their positions."""
        calibration = self.acceptance(temperature, top_p, sampler)[: self.size.calibration_prompts]
        return calibration[:, : self.size.starts].mean(dim=(0, 1)).tolist()

    def measure(
        self, tree: TokenTree, temperature: float, top_p: float, sampler: Sampler = OURS
    ) -> tuple[Estimate, float]:
        """Tokens per step on the measured texts, and the share of steps that the texts' end cut short."""
        acceptance = self.acceptance(temperature, top_p, sampler)[self.size.calibration_prompts :]
        counts = replay(tree, acceptance, self.size.starts)
        return ratio(counts.tokens, counts.steps), float(counts.cut.sum() / counts.steps.sum())

    def run_loop(self, tree: TokenTree, temperature: float, top_p: float, sampler: Sampler = OURS) -> Estimate:
        """Tokens per step of the real loop, with the sampler swapped in, behind the measured prompts."""
        first = self.size.calibration_prompts
        prompts = self.prompts[first : first + self.size.loop_prompts]
        with sampler.in_loop() as options:
            stats = generate(
                self.target, self.draft, prompts, tree=tree, max_new_tokens=self.size.loop_tokens,
                temperature=temperature, top_p=top_p, eos_token_id=(), seed=self.seed + 1, rule="sequoia", **options,
            ).stats  # fmt: skip
        tokens = torch.tensor(stats.new_tokens, dtype=torch.float64) - 1  # the prefill gives the first
        steps = torch.tensor(stats.request_steps, dtype=torch.float64)
        # The last step counts in full for the mean; the spread over requests is little changed by its being cut.
        return ratio(tokens, steps)._replace(mean=stats.tokens_per_step)


def equal_trees(study: Study) -> dict[str, TokenTree]:
    """The trees that all samplers share."""
    vector = study.vector(*TREE_SETTING)
    return {
        "optimal, 32 nodes": optimal_tree(vector, 32),
        "optimal, 128 nodes": optimal_tree(vector, 128),
        "4-ary, 85 nodes": TokenTree.kary(4, 4),
    }


OWN_TREE = "each its own optimal, 128 nodes"


def against(ours: Estimate, rival: Estimate) -> dict[str, Any]:
    """A paired difference, for the document."""
    change, se = difference(ours, rival)
    return {"difference": change, "se": se, "verdict": verdict(change, se)}


def verdict(change: float, se: float) -> str:
    """What a paired difference says."""
    if abs(change) <= NOISE * se or abs(change) < 1e-9:
        return "level"
    return "ahead" if change > 0 else "behind"


def grid(study: Study) -> Iterator[dict[str, Any]]:
    """All settings, trees and samplers."""
    trees = equal_trees(study)
    for temperature in study.size.temperatures:
        for top_p in study.size.top_ps:
            for name in (*trees, OWN_TREE):
                found, levels = {}, {}
                for sampler in SAMPLERS:
                    tree = trees.get(name) or optimal_tree(study.vector(temperature, top_p, sampler), 128)
                    found[sampler.name], _ = study.measure(tree, temperature, top_p, sampler)
                    levels[sampler.name] = tree.num_levels
                row = {"temperature": temperature, "top_p": top_p, "tree": name, "levels": levels}
                row["tokens_per_step"] = {sampler: as_row(estimate) for sampler, estimate in found.items()}
                rivals = (sampler.name for sampler in SAMPLERS[1:])
                yield row | {"ours_against": {rival: against(found[OURS.name], found[rival]) for rival in rivals}}


def cut_drafts(study: Study) -> Iterator[dict[str, Any]]:
    """What ours gains where the target is cut by top-p, if the draft's unlikely tokens are moved behind the others."""
    for temperature in study.size.temperatures:
        for top_p in study.size.top_ps:
            if temperature == 0 or top_p == 1:
                continue
            for name, tree in equal_trees(study).items():
                found = {s: study.measure(tree, temperature, top_p, s)[0] for s in (CUT_DRAFT, OURS, TOP_K)}
                row = {"temperature": temperature, "top_p": top_p, "tree": name, "measured": as_row(found[CUT_DRAFT])}
                yield row | {f"against {s.name}": against(found[CUT_DRAFT], found[s]) for s in (OURS, TOP_K)}


def budgets(study: Study) -> Iterator[dict[str, Any]]:
    """All families over the budget, ours, no top-p."""
    for temperature in study.size.budget_temperatures:
        vector = study.vector(temperature, 1.0)
        for family, build in FAMILIES.items():
            for budget in study.size.budgets:
                tree = build(vector, budget)
                measured, cut = study.measure(tree, temperature, 1.0)
                row = {"temperature": temperature, "family": family, "budget": budget, "levels": tree.num_levels}
                row |= {"predicted": tree.expected_tokens(vector), "measured": as_row(measured), "cut": cut}
                yield row


def loops(study: Study) -> Iterator[dict[str, Any]]:
    """Real loops beside the replays: each sampler on the small tree, then ours on other trees."""
    vector = study.vector(*TREE_SETTING)
    small = optimal_tree(vector, 32)
    runs = [(setting, "optimal", small, sampler) for setting in study.size.loops for sampler in SAMPLERS]
    for family, budget in study.size.loop_trees:
        runs.append((TREE_SETTING, family, FAMILIES[family](vector, budget), OURS))
    for (temperature, top_p), family, tree, sampler in runs:
        loop = study.run_loop(tree, temperature, top_p, sampler)
        replayed, _ = study.measure(tree, temperature, top_p, sampler)
        apart = (loop.mean - replayed.mean) / max((loop.se**2 + replayed.se**2) ** 0.5, 1e-12)
        row = {"temperature": temperature, "top_p": top_p, "sampler": sampler.name, "family": family}
        row |= {"nodes": tree.num_nodes, "loop": as_row(loop), "replay": as_row(replayed)}
        yield row | {"standard_errors_apart": apart}


def read_prompts(options: Any, tokenizer: Any, size: Size, device: torch.device) -> torch.Tensor:
    """Prompts of one length, the calibration prompts first. [prompts, length] int64.

    The demo's measured prompts come from files of their own, one each, as long as there are enough; the calibration
    prompts from other places in them.
    """
    count = size.calibration_prompts + size.prompts
    texts = texts_of(options.prompts_file, count, 6 * size.prompt_tokens)
    if len(texts) < count:
        raise SystemExit(f"--prompts-file must hold {count} prompts, parted by two empty lines, got {len(texts)}")
    texts = texts[size.prompts : count] + texts[: size.prompts]
    ids = encode_prompts(tokenizer, texts, size.prompt_tokens, device)
    length = min(row.shape[1] for row in ids)
    return torch.cat([row[:, :length] for row in ids])


def run(bench: Run) -> None:
    """Run the study, print its tables, write what was asked for."""
    options, device, document = bench.options, bench.device, bench.document
    size = QUICK if options.quick else Size()
    dtype, paths = getattr(torch, options.dtype), (options.target, options.draft)
    pair = load_demo_pair(dtype, device) if options.target is None else load_checkpoints(*paths, dtype, device)
    prompts = read_prompts(options, pair.tokenizer, size, device)
    study = Study(adapt(pair.target), adapt(pair.draft), prompts, size, options.seed)
    name = "demo pair" if options.target is None else f"{options.target} and {options.draft}"
    document |= {"version": VERSION, "device_type": device.type, "quick": options.quick, "pair": name}
    document |= {"dtype": options.dtype, "texts": size.prompts, "calibration_texts": size.calibration_prompts}
    document |= {"prompt_tokens": prompts.shape[1], "starts": size.starts, "tail": size.tail, "noise": NOISE}
    document |= {
        "samplers": [sampler.name for sampler in SAMPLERS],
        "trees": {name: tree.parents for name, tree in equal_trees(study).items()},
        "own_tree": OWN_TREE,
        "grid": list(grid(study)),
        "cut_drafts": list(cut_drafts(study)),
        "budgets": list(budgets(study)),
    }
    document["vectors"] = [
        {"temperature": t, "top_p": p, "sampler": s.name, "vector": [round(a, 6) for a in study.vector(t, p, s)]}
        for t in size.temperatures
        for p in (size.top_ps if t > 0 else (1.0,))
        for s in SAMPLERS
    ]
    document["loops"] = list(loops(study))
    text = robustness_page.markdown(document)
    print(text)
    if options.json:
        robustness_page.plots(document, options.json.parent)
    if options.page:
        reason = robustness_page.plots(document, options.page.parent)
        robustness_page.write_page(options.page, text, with_plots=reason is None)
        if reason is not None:
            print(f"no plots: {reason}")


def titled_tables(document: Mapping[str, Any]) -> str:
    return f"## robustness\n\n{robustness_page.markdown(document)}"


def check(options: Any) -> str | None:
    if len({options.target is None, options.draft is None, options.prompts_file is None}) != 1:
        return "--target, --draft and --prompts-file must be given together: acceptance depends on the text"
    return None


OPTIONS = [
    *shared(device="auto", threads=None, quick=False, dtype="float32"),
    option("--page", type=Path, metavar="PATH", help="put tables into this page, and plots beside it"),
    option("--target", metavar="PATH", help="target model (default: the demo pair)"),
    option("--draft", metavar="PATH", help="draft model"),
    option("--prompts-file", help="prompts, parted by two empty lines; needed with --target"),
    option("--seed", type=int, default=0),
]
main = Script(__spec__, run, __doc__, OPTIONS, markdown=titled_tables, check=check).main


if __name__ == "__main__":
    sys.exit(main())
