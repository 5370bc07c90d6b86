"""The paper's systems: a target, its draft, and what speculation gives over decoding token by token.

A row is a pair of models by shape, built with random weights and calibrated so that its measured acceptance gives the
tokens per step that the paper reports for the trained pair; what decodes is the unmodified loop. Columns of one row
take turns on the same prompts: our own loop without a draft (the baseline), with the best tree of the paper's size, and
with the planner's pick, above temperature 0 by either rule; transformers' `generate` and its assisted generation. More
in docs/benchmarks.md.

Times are those of steady decoding: a streamer notes when tokens arrive; the prefill, the first steps (graph capture)
and the last are left out::

    python -m bench.systems.bench_paper_systems --json out.json                      the rows that suit the device
    python -m bench.systems.bench_paper_systems --rows 7B 33B --device cuda --json out.json
    python -m bench.systems.bench_paper_systems --target PATH --draft PATH --json out.json
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.common import report
from bench.common.demo import encode_prompts, load_checkpoints, texts_of
from bench.common.machine import free_memory, measure_peaks
from bench.common.script import Run, Script, option, shared
from bench.common.synthetic_pair import (
    PAIRS,
    Goal,
    PairShape,
    Shape,
    measure_acceptance,
    meet_goal,
    random_texts,
    synthetic_pair,
)
from bench.common.synthetic_pair import teacher_forced_logits as logits_along
from sequoia_kernels import TokenTree, generate, measure_profile, optimal_tree, plan_tree, release_engines
from sequoia_kernels.decoding import measure_overhead
from sequoia_kernels.models import TreeModel, adapt, pack_linear_layers
from sequoia_kernels.planner import AcceptanceEstimate

AUTOREGRESSIVE = "autoregressive"
SIZED_TREE = "tree of given size"
PLANNED_TREE = "planned tree"
BY_TRAVERSAL = ", traversal"  # behind either: the same tree, verified by the other rule
TRANSFORMERS = "transformers generate"
ASSISTED = "transformers assisted"

# Where greedy outputs part, both tokens' logits must lie within this share of the target's largest one: a few units in
# the last place, since forwards of other shapes round elsewhere in every layer. In float32 outputs must be equal.
LOSSLESS_TOLERANCE = {"float32": 0.0, "float16": 2.0**-9, "bfloat16": 2.0**-6}

SAME_STEP_S = 5e-5  # tokens that arrive within this belong to one step
FIRST_STEPS = 3  # the prefill's token, and two steps: a graph is captured in the first one
CALIBRATION_ROWS = {"cpu": 640, "cuda": 1088}
GOAL_ROUNDS = 2  # times that the goal is corrected by what the loop then measured


class PaperEntry(NamedTuple):
    """What the paper reports at one temperature."""

    goal: Goal  # tokens per step on the best tree of a size, or the first child's acceptance
    speedup: float | None = None  # over its own autoregressive loop; None where the row is not the paper's
    earlier_speedup: float | None = None  # that of an earlier version of the paper, if it was larger


@dataclass(frozen=True)
class Row:
    """One pair."""

    pair: str  # name in `PAIRS`
    title: str  # in words
    device: str  # where the row runs when no rows are asked for
    entries: Mapping[float, PaperEntry]  # by temperature
    dtype: str = "bfloat16"  # unless told otherwise
    size: tuple[int, int | None] = (16, None)  # nodes and levels of the sized tree where the goal names none

    @property
    def shape(self) -> PairShape:
        return PAIRS[self.pair]


ROWS = {
    "7B": Row(
        "7B/68M", "Llama2-7B / 68M, C4", "cuda",
        {0.0: PaperEntry(Goal(5.08, 128, 10), 4.04), 0.6: PaperEntry(Goal(3.92, 128, 7), 3.18)},
    ),
    "13B": Row(
        "13B/68M", "Llama2-13B / 68M, C4", "cuda",
        {0.0: PaperEntry(Goal(4.20, 64, 9), 3.73, 3.84), 0.6: PaperEntry(Goal(3.57, 64, 7), 3.19)},
    ),
    "33B": Row(
        "33B/1.3B", "Vicuna-33B / 1.3B, C4", "cuda",
        {0.0: PaperEntry(Goal(4.28, 64, 6), 2.27, 2.37), 0.6: PaperEntry(Goal(4.16, 64, 6), 2.19)},
    ),
    "350M": Row("350M/8M", "350M / 8M, first child accepted with .51", "cpu", {0.0: PaperEntry(Goal(0.51))}),
    "tiny": Row(
        "tiny", "a scaled-down pair at the first row's acceptance, to exercise the script", "cpu",
        {0.0: PaperEntry(Goal(5.08, 128, 10)), 0.6: PaperEntry(Goal(3.92, 128, 7))}, dtype="float32",
    ),
}  # fmt: skip
QUICK_ROWS = ("tiny",)


@dataclass
class System:
    """Two models ready to decode, and what is known of them."""

    name: str
    title: str
    target: TreeModel
    draft: TreeModel
    prompts: list[torch.Tensor]
    dtype: str
    synthetic: bool
    compiled: tuple[TreeModel, TreeModel] | None = None  # what our own loop decodes with, where forwards are compiled
    packed: bool = False
    profile: Any = None  # times do not depend on the temperature's or the weights' values


# ---- memory


def memory_needed(shape: PairShape, dtype: torch.dtype, rows: int, nodes: int = 512) -> int:
    """Bytes that a pair takes: weights; keys and values, twice (`generate` keeps engines); logits; work space."""
    item = dtype.itemsize
    weights = item * (shape.target.parameters(shape.vocab) + shape.draft.parameters(shape.vocab))

    def cache(part: Shape) -> int:
        return 2 * 2 * item * part.layers * part.kv_heads * part.head_dim * (rows + nodes)

    logits = nodes * shape.vocab * (2 * item + 4)
    return weights + cache(shape.target) + cache(shape.draft) + logits + (1 << 30 if weights > 1 << 30 else 1 << 26)


def memory_there(device: torch.device) -> int:
    """Bytes that are free on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def why_not(row: Row, dtype: torch.dtype, device: torch.device, rows: int, asked: bool) -> str | None:
    """The reason why a row does not run here, or None; rows that were asked for run wherever they fit."""
    needed = memory_needed(row.shape, dtype, rows)
    if row.device != device.type and not asked:
        return "is meant for a CPU" if row.device == "cpu" else f"needs a GPU with {needed / 1e9:.1f} GB free"
    there = memory_there(device)
    if needed > there:
        return f"needs {needed / 1e9:.1f} GB, {there / 1e9:.1f} GB are free"
    return None


# ---- steady decoding


class Arrivals:
    """A streamer that notes when tokens arrive."""

    def __init__(self) -> None:
        self.prompt_seen = False
        self.steps: list[list[float]] = []  # [time of the last token, number of tokens]

    def put(self, tokens: torch.Tensor) -> None:
        now = time.perf_counter()
        if not self.prompt_seen:
            self.prompt_seen = True
        elif self.steps and now - self.steps[-1][0] < SAME_STEP_S:
            self.steps[-1] = [now, self.steps[-1][1] + tokens.numel()]
        else:
            self.steps.append([now, tokens.numel()])

    def end(self) -> None:
        """Nothing is left to do."""

    def steady(self) -> tuple[float, int, int]:
        """(milliseconds, tokens, steps) behind the first steps and before the last, which may have been cut."""
        kept = self.steps[FIRST_STEPS - 1 : -1]
        if len(kept) < 2:
            raise ValueError(f"Arrivals: there must be more than {FIRST_STEPS + 1} steps, got {len(self.steps)}")
        return 1e3 * (kept[-1][0] - kept[0][0]), sum(int(count) for _, count in kept[1:]), len(kept) - 1


class Outcome(NamedTuple):
    """One provider on one prompt. The histogram is that of our own loop; transformers has none."""

    ms: float
    tokens: int
    steps: int
    new_tokens: list[int]
    histogram: list[int]
    outside: float  # share of the time outside the forwards, where stages are timed


def own_loop(
    system: System, tree: TokenTree | None, temperature: float, rule: str = "sequoia"
) -> Callable[[torch.Tensor, int, int], Outcome]:
    """Our loop; without a tree it decodes token by token."""
    target, draft = system.compiled or (system.target, system.draft)

    drafter, options = (None, {}) if tree is None else (draft, {"tree": tree})
    options |= {"temperature": temperature, "eos_token_id": (), "rule": rule}

    def run(prompt: torch.Tensor, num_tokens: int, seed: int) -> Outcome:
        arrivals = Arrivals()
        output = generate(target, drafter, prompt, max_new_tokens=num_tokens, seed=seed, streamer=arrivals, **options)
        histogram = list(output.stats.accepted_histogram)
        return Outcome(*arrivals.steady(), output.new_tokens[0], histogram, output.stats.overhead_fraction)

    return run


def transformers_loop(
    system: System, assisted: bool, temperature: float
) -> Callable[[torch.Tensor, int, int], Outcome]:
    """transformers' own loops."""
    options: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    if assisted:
        options["assistant_model"] = system.draft.model

    def run(prompt: torch.Tensor, num_tokens: int, seed: int) -> Outcome:
        torch.manual_seed(seed)
        arrivals = Arrivals()
        counts = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens}
        given = {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0, "streamer": arrivals}
        output = system.target.model.generate(prompt, **given, **counts, **options)
        return Outcome(*arrivals.steady(), output[0, prompt.shape[1] :].tolist(), [], 0.0)

    return run


def mean_count(histograms: Sequence[Sequence[int]]) -> float:
    """Mean accepted tokens per step of several runs."""
    steps = sum(sum(histogram) for histogram in histograms)
    return sum(count * n for histogram in histograms for count, n in enumerate(histogram)) / steps


# ---- losslessness


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Where two outputs part, None where one begins the other."""
    return next((index for index, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), None)


def check_lossless(
    system: System, plain: Sequence[Sequence[int]], others: Mapping[str, Sequence[Sequence[int]]]
) -> dict[str, Any]:
    """Compare greedy outputs with the autoregressive ones; a difference may begin at a near-tie only.

    Told are how many are equal, where the others part, by how much of the largest logit, and if that is tolerated.
    """
    tolerance = LOSSLESS_TOLERANCE[system.dtype]
    facts: dict[str, Any] = {"ok": True, "tolerance": tolerance, "equal": 0, "compared": 0, "ties": []}
    for name, outputs in others.items():
        for prompt, wanted, got in zip(system.prompts, plain, outputs):
            facts["compared"] += 1
            where = first_difference(wanted, got)
            if where is None:
                facts["equal"] += 1
                continue
            text = torch.cat((prompt[0], torch.tensor(wanted[:where], dtype=torch.int64, device=prompt.device)))
            logits = logits_along(system.target, text)[-1].float()
            largest = logits.max()
            gap = float((largest - logits[[wanted[where], got[where]]].min()) / largest.abs())
            facts["ties"].append({"provider": name, "token": where, "gap": gap})
            facts["ok"] = facts["ok"] and gap <= tolerance
    return facts


# ---- a row


def build_system(
    name: str, row: Row, dtype_name: str, device: torch.device, prompt_tokens: int, num_prompts: int
) -> tuple[System, Any]:
    """Build a row's synthetic pair."""
    pair = synthetic_pair(row.shape, getattr(torch, dtype_name), device)
    for model in (pair.target, pair.draft):
        model.generation_config.eos_token_id = None
    prompts = [ids[None] for ids in random_texts(row.shape, prompt_tokens, num_prompts, device, seed=1)]
    return System(name, row.title, adapt(pair.target), adapt(pair.draft), prompts, dtype_name, True), pair


def acceptance_of_row(
    system: System, pair: Any, row: Row, temperature: float, divergence: float | None, num_tokens: int
) -> AcceptanceEstimate:
    """Calibrate the pair to the row's goal, or take a divergence as it is."""
    device = system.target.device
    count = 2 if device.type == "cuda" else 1
    texts = random_texts(row.shape, CALIBRATION_ROWS[device.type], count, device, seed=2)
    if divergence is not None:
        pair.set_divergence(divergence)
        return measure_acceptance(system.target, system.draft, texts, temperature)

    def loop(tree: TokenTree) -> float:
        run = own_loop(system, tree, temperature)
        return mean_count([run(prompt, num_tokens, 77 + n).histogram for n, prompt in enumerate(system.prompts)])

    return meet_goal(pair, row.entries[temperature].goal, temperature, texts, loop, GOAL_ROUNDS)


def measure_system(
    system: System,
    acceptance: AcceptanceEstimate,
    temperature: float,
    size: tuple[int, int | None],
    num_tokens: int,
    copy_gb_per_s: float,
    rivals: bool,
    tell: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Time all providers in turns and check the output."""
    sized = optimal_tree(acceptance.vector, *size)
    context_len = system.prompts[0].shape[1] + num_tokens // 2
    plan = plan_tree(acceptance, system.profile, context_len=context_len, temperature=temperature)
    trees = {SIZED_TREE: sized, PLANNED_TREE: plan.tree}
    rules = dict.fromkeys(trees, "sequoia")  # the paper's, which the pair is calibrated and the tree planned with
    if temperature > 0:  # greedily all rules are one
        trees |= {name + BY_TRAVERSAL: tree for name, tree in trees.items()}
        rules |= {name: "traversal" for name in trees if name not in rules}
    providers = {AUTOREGRESSIVE: own_loop(system, None, temperature)}
    providers |= {
        name: own_loop(system, tree, temperature, rules[name]) for name, tree in trees.items() if tree.num_nodes > 1
    }
    if rivals:
        providers[TRANSFORMERS] = transformers_loop(system, False, temperature)
        providers[ASSISTED] = transformers_loop(system, True, temperature)
    outcomes: dict[str, list[Outcome]] = {name: [] for name in providers}
    for name, run in providers.items():
        tell(f"{system.name}, T={temperature:g}: first run, {name}")
        run(system.prompts[0], min(num_tokens, 32 * (FIRST_STEPS + 2)), 0)
    for index, prompt in enumerate(system.prompts):
        tell(f"{system.name}, T={temperature:g}: prompt {index + 1} of {len(system.prompts)}")
        for name, run in providers.items():
            outcomes[name].append(run(prompt, num_tokens, 1000 + index))

    entries = {}
    for name, runs in outcomes.items():
        ms, tokens, steps = (sum(values) for values in zip(*((run.ms, run.tokens, run.steps) for run in runs)))
        entries[name] = {"ms_per_token": ms / tokens, "step_ms": ms / steps, "steps": steps}
        entries[name] |= {"by_prompt": [run.ms / run.tokens for run in runs]}
        if runs[0].histogram:
            entries[name]["tokens_per_step"] = mean_count([run.histogram for run in runs])
            entries[name]["step_ms"] = ms / tokens * entries[name]["tokens_per_step"]
            entries[name]["outside_the_forwards"] = sum(run.outside for run in runs) / len(runs)
        if name in trees:
            tree = trees[name]
            expected = Goal(0, tree.num_nodes, tree.num_levels).of(acceptance.vector)
            entries[name] |= {"nodes": tree.num_nodes, "levels": tree.num_levels, "parents": list(tree.parents)}
            entries[name] |= {"expected_tokens_per_step": expected, "rule": rules[name]}
    plain = entries[AUTOREGRESSIVE]["ms_per_token"]
    for entry in entries.values():
        entry["speedup"] = plain / entry["ms_per_token"]
    if PLANNED_TREE in entries:
        entries[PLANNED_TREE]["predicted"] = {"ms_per_token": plan.ms_per_token, "step_ms": plan.step_ms}
        entries[PLANNED_TREE]["predicted"] |= {"speedup": plan.speedup, "stages": dict(plan.stages)}
    weight_bytes = read_bytes(system.target)
    floor_ms = weight_bytes / (copy_gb_per_s * 1e6)
    lossless = None
    if temperature == 0:
        texts = {name: [run.new_tokens for run in runs] for name, runs in outcomes.items()}
        ours = {name: texts[name] for name in trees if name in texts}
        lossless = check_lossless(system, texts[AUTOREGRESSIVE], ours)
    return {
        "row": system.name,
        "title": system.title,
        "synthetic": system.synthetic,
        "temperature": temperature,
        "dtype": system.dtype,
        "compiled": system.compiled is not None,
        "packed": system.packed,
        "target_parameters": system.target.num_parameters,
        "draft_parameters": system.draft.num_parameters,
        "acceptance": [round(float(value), 4) for value in acceptance.vector],
        "providers": entries,
        "floor": {"weight_bytes": weight_bytes, "ms": floor_ms, "ratio": entries[AUTOREGRESSIVE]["step_ms"] / floor_ms},
        "lossless": lossless,
    }


def read_bytes(target: TreeModel) -> int:
    """Bytes of weights that one step reads: all but the table of embeddings, of which it takes a row."""
    embedding = target.model.get_input_embeddings().weight
    head = target.model.get_output_embeddings().weight
    weights = {id(weight): weight for weight in target.model.parameters() if weight is not embedding or weight is head}
    return sum(weight.numel() * weight.element_size() for weight in weights.values())


def profile_of(system: System, num_tokens: int, seconds: float | None, largest: int) -> Any:
    """Measure what the planner needs."""
    context = system.prompts[0].shape[1]
    counts = [count for count in (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512) if count <= largest]
    contexts = (context, context + num_tokens)
    sizes = {"context_lens": contexts, "node_counts": counts}
    profile = measure_profile(system.target, system.draft, **sizes, seconds=seconds, bandwidth=False)
    return measure_overhead(system.target, system.draft, profile, context_len=context)


def checkpoints(target: Path, draft: Path, options: argparse.Namespace, device: torch.device) -> System:
    """Load two real models, with prompts from a file or, without one, held-out source files."""
    dtype_name = options.dtype or "bfloat16"
    pair = load_checkpoints(target, draft, getattr(torch, dtype_name), device)
    for model in pair[:2]:
        model.generation_config.eos_token_id = None
    texts = texts_of(options.prompts_file, options.prompts, 8 * options.prompt_tokens)
    ids = encode_prompts(pair.tokenizer, texts, options.prompt_tokens, device)
    title = f"{Path(target).name} / {Path(draft).name}"
    return System("checkpoints", title, adapt(pair.target), adapt(pair.draft), ids, dtype_name, False)


def acceptance_of_checkpoints(system: System, temperature: float, num_tokens: int) -> AcceptanceEstimate:
    """Measure the acceptance along the target's own text."""
    texts = []
    for index, prompt in enumerate(system.prompts):
        options: dict[str, Any] = {"max_new_tokens": num_tokens, "temperature": temperature, "eos_token_id": ()}
        texts.append(generate(system.target, None, prompt, seed=500 + index, **options).sequences[0])
    skip = min(prompt.shape[1] for prompt in system.prompts)
    return measure_acceptance(system.target, system.draft, texts, temperature, skip=skip)


# ---- results


def describe(result: Mapping[str, Any]) -> str:
    """A row's title, and what is not as usual."""
    named = {"synthetic": "synthetic", "packed": "packed weights", "compiled": "compiled"}
    words = ", ".join(word for key, word in named.items() if result[key])
    return f"{result['title']} ({words})" if words else str(result["title"])


def markdown(document: Mapping[str, Any]) -> str:
    """The tables."""
    rows, plain = [], []
    for result in document["results"]:
        providers = result["providers"]
        paper = result.get("paper") or {}
        reported = ""
        if paper.get("speedup"):
            earlier = f", {paper['earlier_speedup']}x in an earlier version" if paper.get("earlier_speedup") else ""
            reported = f"{paper['speedup']}x ({paper['tokens_per_step']}){earlier}"
        for name in (name + rule for rule in ("", BY_TRAVERSAL) for name in (SIZED_TREE, PLANNED_TREE)):
            if name not in providers:
                continue
            entry = providers[name]
            others = [providers[rival]["ms_per_token"] for rival in (TRANSFORMERS, ASSISTED) if rival in providers]
            ratios = [f"{ms / entry['ms_per_token']:.2f}x" for ms in others] or ["", ""]
            rows.append(
                [
                    describe(result),
                    f"{result['temperature']:g}",
                    f"{name}: {entry['nodes']} x {entry['levels']}",
                    f"{entry['tokens_per_step']:.2f}",
                    f"{entry['ms_per_token']:.3g}",
                    f"{entry['speedup']:.2f}x",
                    *ratios,
                    reported if name == SIZED_TREE else "",
                ]
            )
        lossless = result["lossless"]
        checked = "" if lossless is None else f"{lossless['equal']} of {lossless['compared']} equal"
        if lossless is not None and lossless["ties"]:
            worst = max(tie["gap"] for tie in lossless["ties"])
            checked += f", others part at ties within {worst:.2g} (allowed {lossless['tolerance']:.2g})"
            checked += "" if lossless["ok"] else ": **not lossless**"
        plain.append(
            [
                describe(result),
                f"{result['temperature']:g}",
                result["dtype"],
                f"{result['target_parameters'] / 1e6:.0f}M / {result['draft_parameters'] / 1e6:.0f}M",
                f"{providers[AUTOREGRESSIVE]['step_ms']:.3g}",
                f"{result['floor']['ms']:.3g}",
                f"{result['floor']['ratio']:.2f}",
                checked,
            ]
        )
    header = ["pair", "T", "tree: nodes x levels", "tokens/step", "ms/token", "over own loop", "over transformers"]
    parts = ["# Paper systems", report.provenance(document)]
    if any(result["synthetic"] for result in document["results"]):
        made = "random weights in the shapes named, acceptance calibrated to a goal"
        parts.append(f"Synthetic pairs: {made}; see `bench/common/synthetic_pair.py`.")
    parts.append(report.table([*header, "over assisted", "paper: speedup (tokens/step)"], rows, left=3))
    header = ["pair", "T", "dtype", "parameters", "own step, ms", "weights once, ms", "ratio", "greedy output"]
    parts.append(report.table(header, plain, left=4))
    if document["skipped"]:
        reasons = "; ".join(f"{entry['row']} {entry['reason']}" for entry in document["skipped"])
        parts.append(f"Skipped: {reasons}.")
    return "\n\n".join(parts) + "\n"


def run(bench: Run) -> int:
    options, device, document = bench.options, bench.device, bench.document
    options.prompts = options.prompts or (4 if device.type == "cuda" else 3)
    options.new_tokens = options.new_tokens or (512 if device.type == "cuda" else 128)
    largest = 512 if device.type == "cuda" else 128
    started = time.perf_counter()
    peaks = measure_peaks(device)
    document |= {"device_type": device.type, "peaks": peaks}
    document |= {name: getattr(options, name) for name in ("quick", "prompt_tokens", "new_tokens")}
    document |= {"num_prompts": options.prompts, "results": [], "skipped": []}

    def measured(system: System, acceptance: AcceptanceEstimate, temperature: float, size: Any, extra: dict) -> None:
        if options.pack and not system.packed:
            for model in (system.target, system.draft):
                pack_linear_layers(model)
            system.packed = True
        if options.compile and system.compiled is None:  # the planner's times stay those of the others
            system.compiled = adapt(system.target, compile=True), adapt(system.draft, compile=True)
        if system.profile is None:
            bench.tell(f"{system.name}: the planner's measurements")
            system.profile = profile_of(system, options.new_tokens, options.profile_seconds, largest)
        what = (system, acceptance, temperature, size, options.new_tokens)
        result = measure_system(*what, peaks["copy_gb_per_s"], not options.no_rivals, bench.tell)
        document["results"].append(result | extra)
        print_result(document["results"][-1])
        bench.save()  # now, so that a later row that ends the process leaves this one

    if options.target is not None:
        system = checkpoints(options.target, options.draft, options, device)
        for temperature in options.temperatures or (0.0, 0.6):
            acceptance = acceptance_of_checkpoints(system, temperature, options.new_tokens)
            measured(system, acceptance, temperature, tuple(options.size or (128, 10)), {"paper": None})
    else:
        names = options.rows or (QUICK_ROWS if options.quick else ROWS)
        asked = bool(options.rows) or options.quick
        for name in names:
            row = ROWS[name]
            dtype_name = options.dtype or row.dtype
            reason = why_not(row, getattr(torch, dtype_name), device, options.prompt_tokens + options.new_tokens, asked)
            if reason is None and options.seconds is not None and time.perf_counter() - started > options.seconds:
                reason = "not begun, the time was over"
            if reason is not None:
                document["skipped"].append({"row": name, "reason": reason})
                print(f"{name}: skipped, {reason}")
                continue
            bench.tell(f"{name}: building the pair")
            system, pair = build_system(name, row, dtype_name, device, options.prompt_tokens, options.prompts)
            for temperature in options.temperatures or row.entries:
                if temperature not in row.entries:
                    raise SystemExit(f"--temperatures: row {name} has {', '.join(map(str, row.entries))}")
                entry = row.entries[temperature]
                bench.tell(f"{name}, T={temperature:g}: calibrating the pair")
                acceptance = acceptance_of_row(system, pair, row, temperature, options.divergence, options.new_tokens)
                size = (entry.goal.budget, entry.goal.levels) if entry.goal.budget else row.size
                extra = {"pair": row.pair, "divergence": pair.divergence, "goal": entry.goal._asdict(), "paper": None}
                if entry.speedup is not None:
                    extra["paper"] = {"speedup": entry.speedup, "earlier_speedup": entry.earlier_speedup}
                    extra["paper"]["tokens_per_step"] = entry.goal.value
                measured(system, acceptance, temperature, size, extra)
            del system, pair
            release_engines()
            free_memory(device)
    return 1 if any(result["lossless"] and not result["lossless"]["ok"] for result in document["results"]) else 0


def print_result(result: Mapping[str, Any]) -> None:
    """A row, on the terminal."""
    label = "synthetic pair" if result["synthetic"] else "checkpoints"
    print(f"{result['row']} ({label}), T={result['temperature']:g}, {result['dtype']}")
    print(f"  acceptance {result['acceptance'][:5]} ...")
    for name, entry in result["providers"].items():
        tree = f"{entry['nodes']} x {entry['levels']}" if "nodes" in entry else ""
        steps = f"{entry['tokens_per_step']:.2f} tokens/step" if "tokens_per_step" in entry else ""
        print(f"  {name:26s}{tree:10s}{entry['ms_per_token']:9.3f} ms/token  {entry['speedup']:5.2f}x  {steps}")
    print(f"  own step over one read of the weights: {result['floor']['ratio']:.2f}")
    if result["lossless"] is not None:
        lossless = result["lossless"]
        verdict = "" if not lossless["ties"] else ", others part at near-ties" if lossless["ok"] else ", NOT LOSSLESS"
        print(f"  greedy output: {lossless['equal']} of {lossless['compared']} equal{verdict}")
    sys.stdout.flush()


def check(options: argparse.Namespace) -> str | None:
    both = (options.target is None) == (options.draft is None)
    return None if both else "--target and --draft must be given together"


OPTIONS = [
    option("--rows", nargs="+", choices=tuple(ROWS), help="default: those that suit the device"),
    option("--temperatures", help="default: those of the row"),
    *shared(device="auto", prompt_tokens=128, profile_seconds=15.0),
    option("--dtype", help="default: the row's"),
    option("--target", type=Path, help="a real target instead of the rows, with --draft"),
    option("--draft", type=Path),
    option("--prompts-file", help="prompts for --target, two blank lines between them"),
    option("--size", type=int, nargs=2, metavar=("NODES", "LEVELS"), help="size of the tree of --target"),
    option("--prompts", help="default 4 on a GPU, 3 on a CPU"),
    option("--new-tokens", help="default 512 on a GPU, 128 on a CPU"),
    option("--divergence", type=float, help="take this instead of searching; see synthetic_pair.py"),
    option("--compile", action="store_true", help="our own loop's forwards through torch.compile"),
    option("--pack", action="store_true", help="half-precision weights in oneDNN's layout, for all loops (CPU)"),
    option("--seconds", help="begin no row after this time"),
    option("--no-rivals", action="store_true", help="leave transformers' loops out"),
    option("--quick", help=f"rows {' '.join(QUICK_ROWS)}, few tokens"),
]
QUICK = {"new_tokens": 64, "profile_seconds": 1.5, "prompts": 1, "temperatures": [0.0]}
main = Script(__spec__, run, __doc__, OPTIONS, quick=QUICK, markdown=markdown, check=check).main


if __name__ == "__main__":
    sys.exit(main())
