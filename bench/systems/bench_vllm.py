"""In vLLM: trees that are chosen by load, beside plain vLLM and its own chains of a draft model, from 1 to 16 requests.

    python -m bench.systems.bench_vllm --python PATH/OF/VLLM/bin/python --json bench/results/cpu/vllm.json

Same weights, same prompts, same settings: the demo pair in float32, prompts of held-out source code, sampling by
temperature alone, prefix caching off (prompts come again), everything else vLLM's default. The engines are plain vLLM,
its method "draft_model" with chains of several lengths (above temperature 0 with draft tokens drawn, too), and trees.
Each is a process of its own, they run one after the other, and the whole is repeated `--rounds` times.

A load is a closed loop (bench/common/vllm_engine.py): so many requests are running all the time. All engines get the
same warm-up in each process, every load once at every temperature; what the trees' plan learns, it learns there and in
the loads themselves. Figures are medians of the rounds; ratios are medians of the rounds' own ratios, with the smallest
and the largest. The tuned chain is the fastest exact one of a load and temperature by these figures, to its advantage.

An engine is a bar only if it is exact. At temperature 0 every text is compared with plain vLLM's of the same round and
load. Above, its first three tokens behind a fixed prompt, sampled some hundred times, must pass a chi-square test
against the distribution that the weights give. Where one is not exact it is run in the first round only.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.common.demo import encode_prompts
from bench.common.report import table
from bench.common.runtimes.exactness import SIGNIFICANCE, chi_square, probable_sequences
from bench.common.script import Run, Script, option, shared
from bench.common.vllm_engine import COUNTERS, TREES, EngineFailedError, preloaded, run_engine
from sequoia_kernels.demo import demo_pair_folder, held_out_prompts, load_demo_pair

PLAIN, OURS, TUNED = "plain vLLM", "trees by load", "its tuned chain"
NEVER_BELOW, ALONE = 0.97, 1.6  # what trees are to be over plain vLLM: at any load, and for one request
TIMEOUT = 3600.0

SAMPLED_TOKENS = 3  # whose joint distribution is tested
DECODED_FOR_A_SAMPLE = 8  # so that a draft has something to propose behind them
SAMPLE_PROMPT_TOKENS = 16
SAMPLED_AT_ONCE = 4


class Engine(NamedTuple):
    """Settings of an engine beside those of all, and the temperatures that they make a difference at."""

    settings: dict[str, Any]
    sampled_only: bool = False


def engines_of(options: argparse.Namespace, draft: str) -> dict[str, Engine]:
    """All engines by name."""
    chain = {"method": "draft_model", "model": draft}
    engines = {PLAIN: Engine({})}
    for length in options.chains:
        config = chain | {"num_speculative_tokens": length}
        engines[f"chain of {length}"] = Engine({"speculative_config": config})
        drawn = config | {"draft_sample_method": "probabilistic"}
        engines[f"chain of {length}, drawn"] = Engine({"speculative_config": drawn}, sampled_only=True)
    engines[OURS] = Engine({TREES: {"draft": draft, "max_nodes": options.max_nodes, "rule": options.rule}})
    return engines


def loads_of(options: argparse.Namespace, temperatures: Sequence[float], each: int, least: int) -> list[list[Any]]:
    """Temperature, concurrency and requests of every load of an engine that runs at these temperatures."""
    return [[t, load, max(least, each * load)] for load in options.loads for t in temperatures]


def temperatures_of(
    temperatures: Sequence[float], name: str, engine: Engine, exactness: Mapping[str, Mapping[str, Any]]
) -> list[float]:
    """Where an engine is run: not where it would make no difference, and not again where it is known to be no bar."""
    wanted = [t for t in temperatures if t > 0 or not engine.sampled_only]
    return [t for t in wanted if name in (PLAIN, OURS) or name not in exactness or is_exact(exactness, name, t)]


def measure(bench: Run) -> int:
    options, document = bench.options, bench.document
    folder = demo_pair_folder()
    pair = load_demo_pair()
    count = max(options.least, options.each * max(options.loads)) + max(options.loads)
    prompts = encode_prompts(
        pair.tokenizer, held_out_prompts(count, 4 * options.prompt_tokens), options.prompt_tokens, bench.device
    )
    common = {
        "dtype": "float32",
        "max_model_len": options.prompt_tokens + options.new_tokens + 64,
        "max_num_seqs": max(options.loads),
        "enable_prefix_caching": False,
        "enforce_eager": options.eager,
        "disable_log_stats": False,
    }
    preload = preloaded(options.python, options.preload)
    variables = {"VLLM_CPU_KVCACHE_SPACE": str(options.cache_gib)}
    variables |= {"VLLM_CPU_OMP_THREADS_BIND": options.bind} if options.bind else {}
    document["command"] = without_places(document["command"])
    kept = (
        "loads",
        "temperatures",
        "prompt_tokens",
        "new_tokens",
        "rounds",
        "each",
        "least",
        "warmup_each",
        "max_nodes",
    )
    document |= {name: getattr(options, name) for name in (*kept, "rule")}
    document |= {"engine_settings": common, "environment_variables": variables}
    document |= {
        "preloaded": [path.name for path in preload],
        "packages": {},
        "engines": {},
        "failed": {},
        "results": [],
    }
    document |= {"samples": options.samples, "exactness": {}}
    rounds: dict[str, list[dict[tuple[float, int], dict[str, Any]]]] = {}
    sample_prompt = prompts[0][0, :SAMPLE_PROMPT_TOKENS].tolist()
    probabilities = {
        temperature: probable_sequences(pair.target, sample_prompt, SAMPLED_TOKENS, temperature, 5.0 / options.samples)
        for temperature in options.temperatures
        if temperature > 0
    }
    engines = engines_of(options, str(folder / "draft"))
    with tempfile.TemporaryDirectory() as logs:
        for turn in range(options.rounds):
            for name, engine in engines.items():
                temperatures = temperatures_of(options.temperatures, name, engine, document["exactness"])
                if not temperatures or name in document["failed"]:
                    continue
                task = {
                    "target": str(folder / "target"),
                    "settings": common | engine.settings,
                    "prompts": [ids[0].tolist() for ids in prompts],
                    "new_tokens": options.new_tokens,
                    "warmup": loads_of(options, temperatures, options.warmup_each, 2),
                    "loads": loads_of(options, temperatures, options.each, options.least),
                    "sampled": {
                        "prompt": sample_prompt,
                        "temperatures": list(probabilities) if turn == 0 else [],
                        "count": options.samples,
                        "length": DECODED_FOR_A_SAMPLE,
                        "at_once": min(SAMPLED_AT_ONCE, max(options.loads)),
                    },
                }
                bench.tell(f"round {turn + 1}: {name}")
                try:
                    found = run_task(bench, task, preload, variables, Path(logs) / "engine.log")
                except EngineFailedError as error:
                    document["failed"][name] = str(error).replace(str(folder), "demo/pair")
                    bench.tell(f"    failed: {error}")
                    continue
                document["packages"] = found.packages
                entry = document["engines"].setdefault(name, {"start_s": [], "warmup_s": []})
                entry["start_s"].append(found.start_s)
                entry["warmup_s"].append(found.warmup_s)
                rounds.setdefault(name, []).append(found.loads)
                for (temperature, expected), sampled in zip(probabilities.items(), found.sampled, strict=False):
                    check = sample_check(sampled, expected)
                    document["exactness"].setdefault(name, {})[f"{temperature:g}"] = check
                    bench.tell(f"    T={temperature:g}: {exactness_text(check)}")
                document["results"] = results_of(options, rounds, document["exactness"])
                bench.save()
    print(markdown(document))
    wrong = [name for name in (PLAIN, OURS) if name in document["failed"]]
    wrong += [name for name in (PLAIN, OURS) for t in probabilities if not is_exact(document["exactness"], name, t)]
    return 1 if wrong else 0


def sample_check(sampled: Sequence[Sequence[int]], probabilities: Mapping[Any, float]) -> dict[str, Any]:
    """Test the first tokens of what was sampled."""
    test = chi_square([tokens[:SAMPLED_TOKENS] for tokens in sampled], probabilities)
    tokens, expected, seen = test.worst
    worst = {"tokens": tokens, "expected": expected, "seen": seen}
    return {"exact": test.exact, "p_value": test.p_value, "cells": test.cells, "samples": test.samples, "worst": worst}


def is_exact(exactness: Mapping[str, Mapping[str, Any]], name: str, temperature: float) -> bool:
    """Whether samples are known to be the target's; at temperature 0 texts are compared."""
    return temperature == 0 or exactness.get(name, {}).get(f"{temperature:g}", {}).get("exact", False)


def exactness_text(check: Mapping[str, Any]) -> str:
    """What a check found, in words."""
    if check["exact"]:
        return f"p = {check['p_value']:.2g}"
    worst = check["worst"]
    seen, expected = (f"{100 * worst[name]:.1f} %" for name in ("seen", "expected"))
    return f"**not exact**: {worst['tokens']} in {seen} where {expected} is right"


class Answers(NamedTuple):
    """What a process found, by temperature and concurrency."""

    packages: dict[str, str]
    start_s: float
    warmup_s: float
    loads: dict[tuple[float, int], dict[str, Any]]
    sampled: list[list[list[int]]]


def run_task(
    bench: Run, task: Mapping[str, Any], preload: Sequence[Path], variables: Mapping[str, str], log: Path
) -> Answers:
    """Run one engine's process."""
    answers = run_engine(
        bench.options.python, task, preload=preload, variables=variables, log=log, timeout=TIMEOUT
    )  # fmt: skip
    start, warmup, *loads, samples = list(_told(bench, answers))
    found = {(load["load"][0], load["load"][1]): load for load in loads}
    return Answers(start["packages"], start["start_s"], warmup["warmup_s"], found, samples["sampled"])


def _told(bench: Run, answers: Any) -> Any:
    for answer in answers:
        if "load" in answer:
            temperature, concurrency, _ = answer["load"]
            rate = f"{answer['tokens_per_second']:.0f} tokens/s"
            bench.tell(f"    T={temperature:g}, {concurrency} requests: {rate} {answer.get('plan') or ''}".rstrip())
        yield answer


def without_places(command: str) -> str:
    """The command without the machine's own folders: of absolute paths the name."""
    words = (word.partition("=") for word in shlex.split(command))
    short = ((name, sign, Path(value).name if value.startswith("/") else value) for name, sign, value in words)
    return shlex.join((Path(name).name if name.startswith("/") else name) + sign + value for name, sign, value in short)


# ---- figures


def results_of(
    options: argparse.Namespace, rounds: Mapping[str, Sequence[Mapping[Any, Any]]], exactness: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Medians over the rounds that there are, for every load."""
    results = []
    for temperature in options.temperatures:
        for load in options.loads:
            case = (temperature, load)
            entries = {}
            for name, found in rounds.items():
                runs = [loads[case] for loads in found if case in loads]
                if runs:
                    base = [loads[case] for loads in rounds.get(PLAIN, ())]
                    entries[name] = entry_of(runs, base, compare_texts=temperature == 0)
            others = (name for name in entries if name not in (PLAIN, OURS))
            chains = {name: entries[name] for name in others if is_exact(exactness, name, temperature)}
            tuned = max(chains, key=lambda name: chains[name]["tokens_per_second"], default=None)
            results.append({"temperature": temperature, "concurrency": load, "tuned_chain": tuned, "engines": entries})
    return results


def entry_of(
    runs: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]], *, compare_texts: bool
) -> dict[str, Any]:
    """One engine under one load."""
    rates = [run["tokens_per_second"] for run in runs]
    entry: dict[str, Any] = {"tokens_per_second": statistics.median(rates), "rounds": rates}
    for percent in (50, 95):
        entry[f"tpot_ms_p{percent}"] = statistics.median(float(np.percentile(run["tpot_ms"], percent)) for run in runs)
    pairs = list(zip(runs, base, strict=False))  # a round that is not complete has no base yet
    if pairs:
        ratios = [run["tokens_per_second"] / plain["tokens_per_second"] for run, plain in pairs]
        entry |= {"over_plain": statistics.median(ratios), "over_plain_spread": [min(ratios), max(ratios)]}
    if compare_texts:
        compared = [
            (run["texts"][prompt], text)
            for run, plain in pairs
            for prompt, text in plain["texts"].items()
            if prompt in run["texts"]
        ]
        entry |= {"texts_compared": len(compared), "texts_differing": sum(one != other for one, other in compared)}
    entry |= {name: sum(run[name] for run in runs) for name in COUNTERS if all(name in run for run in runs)}
    plans = [run["plan"] for run in runs if run.get("plan")]
    return entry | ({"plans": plans} if plans else {})


# ---- tables


def markdown(document: Mapping[str, Any]) -> str:
    """Throughput, time per token, what was drafted, and what trees were to reach."""
    results, facts = document["results"], document["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in document["packages"].items())
    preload = ", ".join(document["preloaded"]) or "nothing"
    parts = [
        "# In vLLM",
        f"{facts['processor']}, {facts['cores']} cores; {versions}; {preload} preloaded; {facts['date']} UTC; commit "
        f"{document['commit'] or 'unknown'}.\n`{document['command']}`",
        f"The demo pair in float32; prompts of {document['prompt_tokens']} tokens, {document['new_tokens']} new ones; "
        f"{document['rounds']} rounds of {document['each']} requests for each that is running, at least "
        f"{document['least']}. Before, every engine's process ran every load with {document['warmup_each']} requests "
        "for each that is running. *Exact*: above temperature 0 a chi-square test of the first "
        f"{SAMPLED_TOKENS} tokens of {document['samples']} samples with p >= {SIGNIFICANCE:g}. What is not is no bar.",
    ]
    for temperature in document["temperatures"]:
        cases = [result for result in results if result["temperature"] == temperature]
        names = list(dict.fromkeys(name for case in cases for name in case["engines"]))
        heads = [f"{case['concurrency']} running" for case in cases]
        parts.append(f"## Temperature {temperature:g}")
        rates = [[name, *(_rate(case["engines"].get(name)) for case in cases)] for name in names]
        tuned = [_rate(case["engines"].get(case["tuned_chain"])) for case in cases]
        if any(case["tuned_chain"] for case in cases):
            rates.append([TUNED, *tuned])
        parts.append(table(["tokens/s (over plain)", *heads], rates, left=1))
        checks = {name: found.get(f"{temperature:g}") for name, found in document["exactness"].items()}
        if any(checks.values()):
            tested = [[name, exactness_text(check)] for name, check in checks.items() if check]
            parts.append(table(["samples against the weights' distribution", ""], tested, left=2))
        times = [[name, *(_times(case["engines"].get(name)) for case in cases)] for name in names]
        parts.append(table(["ms per token, p50 / p95", *heads], times, left=1))
        drafts = [[name, *(_drafts(case["engines"].get(name)) for case in cases)] for name in names if name != PLAIN]
        parts.append(table(["tokens per drafted step (drafted)", *heads], drafts, left=1))
        if any("texts_compared" in entry for case in cases for entry in case["engines"].values()):
            texts = [[name, *(_texts(case["engines"].get(name)) for case in cases)] for name in names if name != PLAIN]
            parts.append(table(["texts that are not plain vLLM's", *heads], texts, left=1))
    parts.append(_goals(results))
    if document["failed"]:
        parts.append("\n".join(f"- {name}: failed, {reason}" for name, reason in document["failed"].items()))
    return "\n\n".join(part for part in parts if part) + "\n"


def _rate(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "-"
    ratio = ""
    if "over_plain" in entry:
        low, high = entry["over_plain_spread"]
        ratio = f" ({entry['over_plain']:.2f}x" + (f", {low:.2f} to {high:.2f})" if low != high else ")")
    return f"{entry['tokens_per_second']:.0f}{ratio}"


def _times(entry: Mapping[str, Any] | None) -> str:
    return "-" if entry is None else f"{entry['tpot_ms_p50']:.1f} / {entry['tpot_ms_p95']:.1f}"


def _drafts(entry: Mapping[str, Any] | None) -> str:
    if entry is None or not entry.get("num_drafts"):
        return "-"
    accepted, drafted = (entry[name] / entry["num_drafts"] for name in ("num_accepted_tokens", "num_draft_tokens"))
    return f"{1 + accepted:.2f} ({drafted:.1f})"


def _texts(entry: Mapping[str, Any] | None) -> str:
    return "-" if entry is None else f"{entry['texts_differing']} of {entry['texts_compared']}"


def _goals(results: Sequence[Mapping[str, Any]]) -> str:
    """What trees were to reach, and whether they do."""
    rows = []
    for result in results:
        ours, tuned = (result["engines"].get(name, {}) for name in (OURS, result["tuned_chain"]))
        if "over_plain" not in ours:
            continue
        goal = ALONE if result["concurrency"] == 1 else NEVER_BELOW
        any_chain = result["engines"].keys() - {PLAIN, OURS}
        verdict = ["yes" if ours["over_plain"] >= goal else "no", "none is exact" if any_chain else "-"]
        if tuned:
            over = ours["tokens_per_second"] / tuned["tokens_per_second"]
            pays = max(ours["over_plain"], tuned["over_plain"]) > 1
            verdict[1] = f"{over:.2f}x of {result['tuned_chain']}" + ("" if pays else "; nothing pays")
        case = f"T = {result['temperature']:g}, {result['concurrency']} running"
        rows.append([case, f"{ours['over_plain']:.2f}x", f"{goal:g}x", *verdict])
    return (
        table(["trees by load", "over plain", "wanted", "reached", "over its tuned chain"], rows, left=1)
        if rows
        else ""
    )


def problem(options: argparse.Namespace) -> str | None:
    """What is wrong with the options."""
    if not options.python.is_file():
        return f"--python must be the interpreter of an environment with vLLM, got {options.python}"
    for name in ("loads", "chains"):
        if any(size < 1 for size in getattr(options, name)):
            return f"--{name} must be at least 1 each, got {getattr(options, name)}"
    for name in ("rounds", "each", "least", "warmup_each", "prompt_tokens", "samples"):
        if getattr(options, name) < 1:
            return f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}"
    if options.new_tokens < 2:
        return f"--new-tokens must be at least 2, got {options.new_tokens}"
    missing = [path for path in options.preload if not path.is_file()]
    return f"--preload must be files, got {missing[0]}" if missing else None


OPTIONS = [
    option("--python", type=Path, required=True, help="interpreter of the environment with vLLM"),
    option("--loads", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="requests running (default %(default)s)"),
    option("--chains", type=int, nargs="*", default=[2, 3, 5, 7], help="lengths of vLLM's own (default %(default)s)"),
    option("--each", type=int, default=4, help="requests for each that is running (default %(default)s)"),
    option("--least", type=int, default=8, help="requests of a load, at least (default %(default)s)"),
    option("--warmup-each", type=int, default=2, help="of the warm-up, for each that is running (default %(default)s)"),
    option("--samples", type=int, default=400, help="for the test of exactness (default %(default)s)"),
    option("--max-nodes", type=int, default=16, help="of the largest tree (default %(default)s)"),
    option("--rule", default="sequoia", help="of verification (default %(default)s)"),
    option("--eager", action="store_true", help="all engines without torch.compile, vLLM's enforce_eager"),
    option("--preload", type=Path, nargs="*", default=[], metavar="LIBRARY",
           help="beside the OpenMP of vLLM's environment, tcmalloc for instance"),
    option("--bind", metavar="CORES", help="VLLM_CPU_OMP_THREADS_BIND of all engines (default: vLLM's choice)"),
    option("--cache-gib", type=int, default=1, help="VLLM_CPU_KVCACHE_SPACE of all engines (default %(default)s)"),
    *shared(quick=False, temperatures=[0.0, 1.0], prompt_tokens=128, new_tokens=128, rounds=3),
]  # fmt: skip
QUICK = {
    "loads": [1, 4],
    "chains": [3],
    "each": 1,
    "least": 2,
    "warmup_each": 1,
    "rounds": 1,
    "new_tokens": 48,
    "samples": 60,
}

main = Script(__spec__, measure, __doc__, OPTIONS, quick=QUICK, markdown=markdown, check=problem).main


if __name__ == "__main__":
    sys.exit(main())
