"""Every kind of draft for one real target: SmolLM2, its trained heads, its own layers, lookup, and what others have.

    python -m bench.systems.train_draft                  # its first two layers; --kind eagle3, --kind dspark: heads
    python -m bench.systems.bench_drafts --threads 2 --json bench/results/cpu/drafts.json

Held-out requests and code are decoded by everybody in turns: this package without a draft, with each source, and with
lookup beside it; transformers' `generate`, its assisted generation with the small model, its prompt lookup; economize.
For each source and temperature an acceptance vector is counted on other requests, and `tree="auto"` plans with it and
with a profile of this run. Rivals choose among a few settings on one of those. Times are whole calls, prefill included.
At temperature 0 every text is compared with that of transformers' plain `generate`.

What a tree is worth to a source is told by the plan: how fast it expects the best tree to be, and the best chain.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.common import smollm2
from bench.common.machine import ROOT
from bench.common.report import table
from bench.common.script import Run, Script, option, shared
from bench.common.smollm2_prompts import CALIBRATION, HELD_OUT
from bench.systems.bench_side_by_side import (
    BASE,
    PACKAGES,
    Batch,
    Decoded,
    Provider,
    batches_of,
    economize_providers,
    greedy_texts,
    measure_case,
    saved,
    transformers_providers,
    untouched,
    version_of,
    without_settings,
)
from sequoia_kernels import (
    AcceptanceEstimate,
    HardwareProfile,
    adapt,
    estimate_acceptance,
    generate,
    measure_profile,
    plan_tree,
)
from sequoia_kernels.decoding import GenerateStats, measure_overhead, probe_tree
from sequoia_kernels.demo import DemoPair
from sequoia_kernels.drafts import DraftSource, draft_source
from sequoia_kernels.models import load_model

PLAIN = "no draft"
LOOKUP = "lookup"
KINDS = ("eagle3", "dspark")
# What others choose among: fewer than in bench_side_by_side.py, since a call takes seconds.
RIVAL_SETTINGS = {
    BASE: ("dynamic cache",),
    "transformers, assisted": ("constant, 2 tokens", "constant, 4 tokens", "confidence .4, at most 8 tokens"),
    "transformers, prompt lookup": ("3 tokens, n-grams up to 3", "10 tokens, n-grams up to 3"),
    "economize": (
        "second model, cycles of 3", "second model, confidence .4, cycles of 8", "lookup, cycles of 6",
        "lookup, else second model, cycles of 4",
    ),
}  # fmt: skip


class Source(NamedTuple):
    """One kind of draft, as it is called in the tables."""

    name: str
    draft: Any  # what `generate` takes
    lookup: bool


def sources_of(target: Any, small: Any, options: argparse.Namespace) -> list[Source]:
    """Every source, those that draw a second time with lookup beside them."""
    drafts = {
        f"a model of its first {small.config.num_hidden_layers} layers, distilled": small,
        f"its own first {options.layers} layers": f"layers:{options.layers}",
        "EAGLE-3 head": options.eagle3,
        "DSpark": options.dspark,
    }
    loaded = {name: draft_source(draft, target) for name, draft in drafts.items()}
    sources = [Source(LOOKUP, "lookup", False)]
    for name, draft in loaded.items():
        sources += [Source(name, draft, False), Source(f"{name}, and lookup", draft, True)]
    return sources


class Measured(NamedTuple):
    """What is known of a source before it is timed; None of lookup alone, which draws nothing."""

    profile: HardwareProfile
    acceptance: AcceptanceEstimate | None


class Drafts:
    """The target with all its sources, on requests."""

    def __init__(self, bench: Run) -> None:
        options = bench.options
        model, self.tokenizer = smollm2.load_target(torch.float32)
        small = load_model(options.draft, torch.float32)
        self.pair = DemoPair(model, small, self.tokenizer)
        self.rivals = [DemoPair(untouched(model), untouched(small), self.tokenizer) for _ in range(2)]
        without_settings(self.pair)
        self.target = adapt(model)
        self.sources = sources_of(self.target, small, options)
        self.new_tokens = options.new_tokens
        asked = CALIBRATION[: options.calibration_prompts] + HELD_OUT[: options.prompts]
        ids = [torch.tensor([row]) for row in smollm2.chat(self.tokenizer, asked)]
        self.calibration, self.prompts = ids[: options.calibration_prompts], ids[options.calibration_prompts :]
        self.stats: dict[str, list[GenerateStats]] = {}  # of the calls that are timed, by source
        self._profiles: dict[str, HardwareProfile] = {}

    def decode(self, name: str, draft: Any, ids: torch.Tensor, seed: int, **options: Any) -> Any:
        """Decode behind one prompt, as many tokens as everybody."""
        common = {"max_new_tokens": self.new_tokens, "eos_token_id": (), "attention_mask": torch.ones_like(ids)}
        output = generate(self.target, draft, ids, seed=seed, **common, **options)
        self.stats.setdefault(name, []).append(output.stats)
        return output

    def measured(self, source: Source, temperature: float, node_counts: Sequence[int]) -> Measured:
        """Measure a source's times, once, and count what is accepted of it."""
        drawing = source.draft if isinstance(source.draft, DraftSource) else None
        key = repr(drawing)
        if key not in self._profiles:
            counts = {"node_counts": node_counts, "draft_node_counts": [1, 2, 3, 4, 6, 8]}
            profile = measure_profile(self.target, drawing, context_lens=(64, 256), quick=True, **counts)
            self._profiles[key] = measure_overhead(self.target, drawing, profile)
        if drawing is None:
            return Measured(self._profiles[key], None)
        runs = [
            self.decode("", drawing, ids, n, tree=probe_tree(drawing), temperature=temperature, rule="sequoia").stats
            for n, ids in enumerate(self.calibration)
        ]
        return Measured(self._profiles[key], estimate_acceptance(runs, temperature=temperature))

    def provider(self, source: Source, measured: Measured, temperature: float) -> Provider:
        """The loop with a source and what it plans."""
        known = {"profile": measured.profile, "tree": "auto"}
        if measured.acceptance is not None:
            known["acceptance"] = measured.acceptance

        def decode(batch: Batch, seed: int) -> Decoded:
            output = self.decode(
                source.name, source.draft, batch.input_ids, seed, temperature=temperature, lookup=source.lookup, **known
            )
            tree = max(output.stats.steps_by_tree, key=output.stats.steps_by_tree.__getitem__)
            return Decoded(output.new_tokens, f"{tree.num_nodes} nodes, {tree.num_levels} levels")

        return Provider(source.name, {"planned": decode}, ours=True)

    def plain(self, temperature: float) -> Provider:
        """The loop without a draft."""

        def decode(batch: Batch, seed: int) -> Decoded:
            return Decoded(self.decode(PLAIN, None, batch.input_ids, seed, temperature=temperature).new_tokens)

        return Provider(PLAIN, {PLAIN: decode}, ours=True)


def few_settings(providers: Sequence[Provider]) -> list[Provider]:
    """Rivals with the settings that they choose among here."""
    for provider in providers:
        if provider.candidates:
            provider.candidates = {name: provider.candidates[name] for name in RIVAL_SETTINGS[provider.name]}
    return list(providers)


def summary(runs: Sequence[GenerateStats]) -> dict[str, Any]:
    """What several calls took by step, prefill aside."""
    steps, tokens = sum(run.num_steps for run in runs), sum(sum(run.new_tokens) for run in runs)
    drafting = sum(run.stage_seconds.get(stage, 0.0) for run in runs for stage in ("draft", "sample"))
    return {
        "tokens_per_step": (tokens - len(runs)) / steps,
        "draft_ms_a_step": 1e3 * drafting / steps,
        "step_ms": 1e3 * sum(run.decode_seconds for run in runs) / steps,
        "steps_with_proposals": sum(run.lookup_steps for run in runs) / steps,
        "copied_tokens": sum(run.copied_tokens for run in runs) / tokens,
    }


def expected(target: Any, source: Source, measured: Measured, temperature: float) -> dict[str, Any]:
    """What the plan says of a source: the best tree, and the best chain."""
    assert measured.acceptance is not None
    settings = {"target": target, "draft": source.draft.fingerprint, "temperature": temperature, "context_len": 128}
    vector = measured.acceptance.vector
    plans = {"tree": plan_tree(vector, measured.profile, **settings)}
    plans["chain"] = plan_tree(vector[:1], measured.profile, **settings)  # no second children: every tree is a chain
    return {
        kind: {"speedup": plan.speedup, "nodes": plan.tree.num_nodes, "levels": plan.tree.num_levels}
        for kind, plan in plans.items()
    }


def measure(bench: Run) -> int:
    options, document = bench.options, bench.document
    drafts = Drafts(bench)
    document |= {name: getattr(options, name) for name in ("new_tokens", "rounds", "calibration_rounds")}
    document |= {
        "dtype": "float32",
        "num_prompts": len(drafts.prompts),
        "packages": {n: version_of(n) for n in PACKAGES},
    }
    document["drafts"] = {name: _shown(getattr(options, name)) for name in ("draft", *KINDS)}
    document["rival_settings"] = RIVAL_SETTINGS
    results = document["results"] = []
    wanted = greedy_texts(drafts.rivals[0], drafts.prompts, options.new_tokens)
    failed = False
    with saved(drafts.rivals[0].draft, drafts.tokenizer) as folder:
        for temperature in options.temperatures:
            bench.tell(f"temperature {temperature:g}")
            known = {source.name: drafts.measured(source, temperature, options.nodes) for source in drafts.sources}
            own = [drafts.plain(temperature)]
            own += [drafts.provider(source, known[source.name], temperature) for source in drafts.sources]
            others = few_settings(
                [
                    *transformers_providers(drafts.rivals[0], temperature, options.new_tokens),
                    *economize_providers(drafts.rivals[1], folder, temperature, options.new_tokens),
                ]
            )
            calibration, batches = batches_of(drafts.calibration[:1], 1), batches_of(drafts.prompts, 1)
            drafts.stats.clear()
            entries = measure_case([*own, *others], calibration, batches, options, None if temperature else wanted, {})
            plain = entries[PLAIN]
            for entry in entries.values():
                failed |= entry["ours"] and entry["status"] != "ok"
                if entry["status"] == "ok":
                    entry["over_plain"] = _median_ratio(entry["rates"], plain["rates"])
            for source in drafts.sources:
                measured, entry = known[source.name], entries[source.name]
                timed = drafts.stats[source.name][-len(batches) * options.rounds :]
                entry |= summary(timed)
                if measured.acceptance is not None:
                    entry["acceptance"] = [round(float(share), 4) for share in measured.acceptance.vector]
                    entry["expected"] = expected(drafts.target, source, measured, temperature)
            results.append({"temperature": temperature, "providers": entries})
            bench.save()
    print(markdown(document))
    return 1 if failed else 0


def _shown(folder: Path) -> str:
    return str(folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder.name)


def _median_ratio(rates: Sequence[float], others: Sequence[float]) -> float:
    ratios = sorted(one / other for one, other in zip(rates, others, strict=True))
    middle = len(ratios) // 2
    return ratios[middle] if len(ratios) % 2 else (ratios[middle - 1] + ratios[middle]) / 2


# ---- the tables


def markdown(document: Mapping[str, Any]) -> str:
    """A table of speeds, and one of what is behind them for each temperature."""
    results = document["results"]
    names = list(dict.fromkeys(name for result in results for name in result["providers"]))
    rows = [[name, *(_speed(result["providers"].get(name)) for result in results)] for name in names]
    differing = [result["providers"] for result in results if result["temperature"] == 0]
    for row, name in zip(rows, names, strict=True):
        row += [f"{entries[name].get('differing_prompts', '-')} of {document['num_prompts']}" for entries in differing]
    header = ["tokens/s (over no draft)", *(f"T = {result['temperature']:g}" for result in results)]
    parts = [table(header + ["texts that differ"] * len(differing), rows)]
    for result in results:
        parts.append(_behind(result))
    versions = ", ".join(f"{name} {version}" for name, version in document["packages"].items() if version)
    parts.append(f"{versions}; commit {document['commit']}; `{document['command']}`")
    return "\n\n".join(parts) + "\n"


def _speed(entry: Mapping[str, Any] | None) -> str:
    if entry is None or entry["status"] != "ok":
        return "-"
    return f"{entry['tokens_per_second']:.1f} ({entry['over_plain']:.2f}x)"


def _behind(result: Mapping[str, Any]) -> str:
    header = [
        f"T = {result['temperature']:g}", "tokens a step", "draft ms a step", "step ms", "copied", "acceptance by rank",
        "most steps by", "expected: tree", "chain",
    ]  # fmt: skip
    rows = []
    for name, entry in result["providers"].items():
        if not entry["ours"] or "tokens_per_step" not in entry:
            continue
        vector, plans = entry.get("acceptance"), entry.get("expected")
        rows.append(
            [
                name,
                f"{entry['tokens_per_step']:.2f}",
                f"{entry['draft_ms_a_step']:.1f}",
                f"{entry['step_ms']:.1f}",
                f"{100 * entry['copied_tokens']:.0f} %",
                "-" if vector is None else " ".join(f"{share:.2f}" for share in vector[:4]),
                entry["note"],
                *("-" if plans is None else f"{plans[kind]['speedup']:.2f}x" for kind in ("tree", "chain")),
            ]
        )
    return table(header, rows)


def problem(options: argparse.Namespace) -> str | None:
    """What is wrong with the options."""
    reason = smollm2.why_not(options)
    if reason is not None:
        return reason
    for kind in KINDS:
        folder = getattr(options, kind)
        if not (folder / "config.json").is_file():
            return (
                f"--{kind} must be a folder with such a draft of SmolLM2, got {folder}; "
                f"python -m bench.systems.train_draft --kind {kind} writes one"
            )
    for name in ("rounds", "calibration_rounds", "layers"):
        if getattr(options, name) < 1:
            return f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}"
    return None


OPTIONS = [
    *shared(threads=2, quick=False, temperatures=[0.0, 0.6, 1.0], prompts=10, calibration_prompts=3),
    *shared(rounds=1, new_tokens=64),
    option("--calibration-rounds", type=int, default=1, help="times that settings are compared (default %(default)s)"),
    option("--draft", type=Path, default=smollm2.DRAFT, help="the small model (default build/drafts/smollm2)"),
    *(
        option(
            f"--{kind}",
            type=Path,
            default=smollm2.DRAFT.with_name(f"smollm2-{kind}"),
            help=f"default build/drafts/smollm2-{kind}",
        )
        for kind in KINDS
    ),
    option("--layers", type=int, default=8, help="own layers of the target that draft (default %(default)s)"),
    option(
        "--nodes",
        type=int,
        nargs="+",
        default=[1, 2, 3, 4, 6, 8, 12, 16, 24, 32],
        help="tree sizes to time (default 1 to 32)",
    ),
]
QUICK = {"temperatures": [0.0], "prompts": 1, "calibration_prompts": 1, "new_tokens": 12, "nodes": [1, 4, 8]}
main = Script(__spec__, measure, __doc__, OPTIONS, quick=QUICK, markdown=markdown, check=problem).main


if __name__ == "__main__":
    sys.exit(main())
