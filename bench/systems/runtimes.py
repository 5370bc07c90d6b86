"""Against the runtimes that people use on CPUs, in one run: same machine, same weights, same prompts.

Our loop, plain and with the tree that the planner picks, beside transformers (`generate`, assisted generation),
OpenVINO GenAI, ONNX Runtime GenAI, llama.cpp and CTranslate2, each with a draft where it takes one; CTranslate2 takes
none, and transformers and ONNX Runtime GenAI take one for a single request only. A runtime that is not installed is
named with the reason; `pip install .[bench]` installs them, llama-cpp-python from source. Weights are converted from
the Hugging Face folders here. Every runtime is a process of its own that may use as many processors as it has threads,
and they take turns, prompt by prompt and round by round. The number of tokens that a draft proposes is searched for
every runtime on the first prompt; our tree is planned on prompts that are not timed. Prompts are part of the times.

A runtime is a bar only if it is exact. At temperature 0 its text must be ours, token by token, up to near-ties of the
logits. Above, its first three tokens behind a fixed prompt, sampled some hundred times, must pass a chi-square test
against the distribution that its own weights give, with and without its draft::

    python -m bench.systems.runtimes --json bench/results/cpu/runtimes.json
    python -m bench.systems.runtimes --pairs demo --threads 1 --batches 1 --runtimes llama.cpp openvino-genai

How each runs is told in its module in `bench/common/runtimes/`. Not tried: ONNX Runtime GenAI's and OpenVINO GenAI's
lookup of n-grams in the prompt, and quantised weights, which are other weights.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.common import report, smollm2
from bench.common.demo import encode_prompts
from bench.common.runtimes import OURS, RUNTIMES
from bench.common.runtimes.base import DRAFT, PLAIN, Pair, Request
from bench.common.runtimes.exactness import NEAR_TIE, SIGNIFICANCE, chi_square, parts_at, probable_sequences
from bench.common.runtimes.process import RuntimeFailedError, RuntimeProcess
from bench.common.script import Run, Script, option, shared
from bench.common.synthetic_pair import PAIRS, random_texts, synthetic_pair
from sequoia_kernels.demo import held_out_prompts, load_demo_pair
from sequoia_kernels.errors import BackendUnavailableError

DIVERGENCE = 0.3195636240768832  # of the 350M/8M pair: its first child is accepted with .51 at temperature 0
SMOLLM = "models--HuggingFaceTB--SmolLM2-135M"  # in the Hugging Face cache
PAIR_NAMES = ("demo", "350M/8M", "smollm2-135m")
TWO_THREADS_ONLY = ("350M/8M",)  # unless threads are asked for

SAMPLED_TOKENS = 3  # whose joint distribution is tested
DECODED_FOR_A_SAMPLE = 8  # so that a draft has something to propose behind them
SAMPLE_PROMPT_TOKENS = 16
SETTLE_S = 0.05  # behind a runtime's turn: its threads may spin for a while
TUNING_RUNS = 2
ATTEMPTS, NEXT_SEED = 4, 1_000_000  # at a text that ended early


class Weights(NamedTuple):
    """A pair on the disk, and prompts for it."""

    pair: Pair
    prompts: list[list[int]]  # timed
    calibration: list[list[int]]  # others, for plans


# ---- pairs


def demo_weights(folder: Path, options: argparse.Namespace) -> Weights:
    """The demo pair, in float32."""
    demo = load_demo_pair(torch.float32)
    save(folder, {"target": demo.target, "draft": demo.draft}, demo.tokenizer)
    count = options.prompts + options.calibration_prompts
    texts = held_out_prompts(4 * count, 8 * options.prompt_tokens)
    ids = encode_prompts(demo.tokenizer, texts, options.prompt_tokens, torch.device("cpu"))
    return weights_of(Pair("demo", folder / "target", folder / "draft", "float32"), ids, options)


def synthetic_weights(name: str, folder: Path, options: argparse.Namespace) -> Weights:
    """A pair of random weights with real acceptance, in bfloat16."""
    pair = synthetic_pair(PAIRS[name], torch.bfloat16, "cpu")
    pair.set_divergence(options.divergence)
    save(folder, {"target": pair.target, "draft": pair.draft}, load_demo_pair().tokenizer)
    count = options.prompts + options.calibration_prompts
    ids = random_texts(pair.shape, options.prompt_tokens, count, torch.device("cpu"), seed=1)
    return weights_of(Pair(name, folder / "target", folder / "draft", "bfloat16"), [row[None] for row in ids], options)


def checkpoint_weights(name: str, target: Path, draft: Path | None, options: argparse.Namespace) -> Weights:
    """Models from their folders, in the dtype they are stored in."""
    from transformers import AutoConfig, AutoTokenizer

    stored = AutoConfig.from_pretrained(target, trust_remote_code=False).dtype or torch.float32
    tokenizer = AutoTokenizer.from_pretrained(target, trust_remote_code=False)
    texts = held_out_prompts(4 * (options.prompts + options.calibration_prompts), 8 * options.prompt_tokens)
    ids = encode_prompts(tokenizer, texts, options.prompt_tokens, torch.device("cpu"))
    return weights_of(Pair(name, target, draft, str(stored).removeprefix("torch.")), ids, options)


def weights_of(pair: Pair, ids: Sequence[torch.Tensor], options: argparse.Namespace) -> Weights:
    """Part prompts of full length into those that are timed and others."""
    whole = [row[0].tolist() for row in ids if row.shape[1] == options.prompt_tokens]
    needed = options.prompts + options.calibration_prompts
    if len(whole) < needed:
        raise SystemExit(
            f"--prompt-tokens: there are {len(whole)} texts of {options.prompt_tokens} tokens, not {needed}"
        )
    return Weights(pair, whole[: options.prompts], whole[options.prompts : needed])


def save(folder: Path, models: Mapping[str, Any], tokenizer: Any) -> None:
    """Write models as Hugging Face folders, each with a tokenizer, which converters want."""
    for role, model in models.items():
        if not (folder / role / "config.json").exists():
            model.save_pretrained(folder / role)
            tokenizer.save_pretrained(folder / role)


def cached_smollm() -> Path | None:
    """SmolLM2-135M in the Hugging Face cache, if it is there."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    found = sorted(home.glob(f"hub/{SMOLLM}/snapshots/*/config.json"))
    return found[-1].parent if found else None


def build_weights(name: str, folder: Path, options: argparse.Namespace) -> Weights | str:
    """A pair by name, or the reason why not."""
    if name == "demo":
        return demo_weights(folder, options)
    if name == "checkpoints":
        target, *draft = options.checkpoints
        return checkpoint_weights(target.name, target, draft[0] if draft else None, options)
    if name == "smollm2-135m":
        found = cached_smollm()
        if found is not None:
            return checkpoint_weights(name, found, None, options)
        missing = smollm2.why_missing()
        if missing is not None:
            return f"its weights are not in the Hugging Face cache; {missing}"
        target, tokenizer = smollm2.load_target(torch.bfloat16)
        save(folder, {"target": target}, tokenizer)
        return checkpoint_weights(name, folder / "target", None, options)
    return synthetic_weights(name, folder, options)


# ---- systems


class System(NamedTuple):
    """A runtime in one mode."""

    runtime: str
    mode: str

    @property
    def ours(self) -> bool:
        return self.runtime == OURS

    def __str__(self) -> str:
        return f"{self.runtime}, {'planned tree' if self.ours and self.mode == DRAFT else self.mode}"


def open_runtimes(
    names: Sequence[str], pair: Pair, threads: int, folder: Path, stack: ExitStack
) -> tuple[dict[str, RuntimeProcess], dict[str, str]]:
    """Start every runtime; also give the reasons why some are not there."""
    opened, missing = {}, {}
    for name in names:
        try:
            opened[name] = RuntimeProcess(name, pair, threads, folder)
            stack.callback(opened[name].close)
        except (BackendUnavailableError, RuntimeFailedError) as error:
            if name == OURS:
                raise
            missing[name] = str(error).removeprefix(f"{name}: ")
            print(f"  {name}: left out, {missing[name]}", flush=True)
    return opened, missing


def tune(process: RuntimeProcess, request: Request, choices: Sequence[int]) -> tuple[int, dict[int, float]]:
    """The number of draft tokens at which a request takes least time; and tokens a second of all."""
    rates = {}
    for draft_tokens in choices:
        asked = request._replace(mode=DRAFT, draft_tokens=draft_tokens)
        seconds = min(process.decode(asked)[0] for _ in range(TUNING_RUNS))
        rates[draft_tokens] = len(request.prompts) * request.num_tokens / seconds
    return max(rates, key=lambda draft_tokens: rates[draft_tokens]), rates


def groups(prompts: Sequence[list[int]], batch_size: int) -> Iterator[list[list[int]]]:
    """Prompts, so many at a time."""
    for start in range(0, len(prompts) - batch_size + 1, batch_size):
        yield list(prompts[start : start + batch_size])


class Timed(NamedTuple):
    """What one system did: tokens a second of each round, texts of the last."""

    rates: list[float]
    texts: list[list[int]]


def decode_whole(process: RuntimeProcess, request: Request) -> tuple[float, list[list[int]]]:
    """Decode; what ended early is sampled again: ONNX Runtime GenAI takes padding for an end where there is none."""
    for attempt in range(ATTEMPTS if request.temperature > 0 else 1):
        took, tokens = process.decode(request._replace(seed=request.seed + attempt * NEXT_SEED))
        wrong = [len(text) for text in tokens if len(text) != request.num_tokens]
        if not wrong:
            return took, tokens
    raise RuntimeFailedError(f"decoded {wrong[0]} tokens in place of {request.num_tokens}")


def take_turns(
    processes: Mapping[str, RuntimeProcess],
    systems: Mapping[System, int],
    batches: Sequence[list[list[int]]],
    template: Request,
    rounds: int,
) -> tuple[dict[System, Timed], dict[System, str]]:
    """Decode everything with everybody, one after the other, round by round; who fails is out, with the reason."""
    timed = {system: Timed([], []) for system in systems}
    failed: dict[System, str] = {}
    for turn in range(rounds + 1):  # the first one warms up
        seconds = dict.fromkeys(systems, 0.0)
        for text in timed.values():
            text.texts.clear()
        for index, prompts in enumerate(batches):
            for system, draft_tokens in systems.items():
                if system in failed:
                    continue
                request = template._replace(prompts=prompts, mode=system.mode, draft_tokens=draft_tokens)
                time.sleep(SETTLE_S)
                try:
                    took, tokens = decode_whole(processes[system.runtime], request._replace(seed=1000 * turn + index))
                except RuntimeFailedError as error:
                    failed[system] = str(error)
                    continue
                seconds[system] += took
                timed[system].texts.extend(tokens)
        if turn:
            number = template.num_tokens * sum(map(len, batches))
            for system in systems.keys() - failed.keys():
                timed[system].rates.append(number / seconds[system])
    return {system: entry for system, entry in timed.items() if system not in failed}, failed


# ---- exactness


def greedy_check(
    pair: Pair, model: Any, prompts: Sequence[list[int]], ours: Sequence[list[int]], theirs: Sequence[list[int]]
) -> dict[str, Any]:
    """Compare greedy texts with our plain loop's; they may part at near-ties."""
    parted = [parts_at(model, *texts) for texts in zip(prompts, ours, theirs)]
    gaps = [part[1] for part in parted if part is not None]
    facts = {"equal": len(parted) - len(gaps), "compared": len(parted), "largest_gap": max(gaps, default=0.0)}
    return {"exact": facts["largest_gap"] <= NEAR_TIE[pair.dtype], **facts}


def sample_check(
    process: RuntimeProcess, system: System, request: Request, count: int, probabilities: Mapping[Any, float]
) -> dict[str, Any]:
    """Test the first tokens that a system samples."""
    sampled = process.sample(request._replace(mode=system.mode), count)
    test = chi_square([tokens[:SAMPLED_TOKENS] for tokens in sampled], probabilities)
    tokens, expected, seen = test.worst
    worst = {"tokens": tokens, "expected": expected, "seen": seen}
    return {"exact": test.exact, "p_value": test.p_value, "cells": test.cells, "samples": count, "worst": worst}


# ---- a run


def measure_case(
    bench: Run,
    weights: Weights,
    processes: Mapping[str, RuntimeProcess],
    model: Any,
    checked: dict[Any, dict[str, Any]],
    case: dict[str, Any],
) -> dict[str, Any]:
    """One pair, number of threads, temperature and batch size: everybody's speed and exactness."""
    options, pair = bench.options, weights.pair
    temperature, batch_size = case["temperature"], case["batch_size"]
    samples = options.samples if pair.dtype == "float32" else max(options.samples // 4, 1)
    batches = list(groups(weights.prompts, batch_size))
    calibration = next(groups(weights.calibration * batch_size, batch_size))
    template = Request(calibration, options.new_tokens, temperature=temperature, calibration=weights.calibration)
    entries: dict[System, dict[str, Any]] = {}
    failed: dict[System, str] = {}
    systems: dict[System, int] = {}
    for name, process in processes.items():
        prepared: dict[str, Any] = {}
        try:
            prepared = process.prepare(template, options.profile_seconds)
        except RuntimeFailedError as error:
            failed[System(name, PLAIN)] = str(error)
            continue
        for mode in process.modes(batch_size):
            system, draft_tokens = System(name, mode), 0
            facts: dict[str, Any] = {"chosen": prepared}
            if mode == DRAFT and process.tuned:
                try:
                    first = template._replace(prompts=batches[0])
                    draft_tokens, rates = tune(process, first, options.draft_tokens)
                except RuntimeFailedError as error:
                    failed[system] = str(error)
                    continue
                facts |= {"draft_tokens": draft_tokens, "tuning": {str(key): rate for key, rate in rates.items()}}
            systems[system], entries[system] = draft_tokens, facts
    timed, failures = take_turns(processes, systems, batches, template, options.rounds)
    failed |= failures
    flat = [prompt for batch in batches for prompt in batch]
    for system, (rates, texts) in timed.items():
        entry = entries[system]
        entry |= {"best": max(rates), "median": statistics.median(rates), "rounds": rates}
        key = (system, temperature)
        if temperature == 0:
            ours = timed[System(OURS, PLAIN)].texts
            entry["exactness"] = greedy_check(pair, model, flat, ours, texts)
        elif key not in checked:  # does not depend on the batch, nor on threads
            prompt = flat[0][:SAMPLE_PROMPT_TOKENS]
            least = 5.0 / samples
            probabilities = probable_sequences(model, prompt, SAMPLED_TOKENS, temperature, least)
            request = Request([prompt], DECODED_FOR_A_SAMPLE, temperature=temperature, seed=12345)
            request = request._replace(draft_tokens=systems[system])
            try:
                found = sample_check(processes[system.runtime], system, request, samples, probabilities)
            except RuntimeFailedError as error:
                found = {"exact": False, "failed": str(error)}
            checked[key] = found
            print(f"    {system}: {exactness_text(found)}", flush=True)
        if temperature > 0:
            entry["exactness"] = checked[key]
    return case | {"systems": rows_of(timed, entries), "failed": {str(system): why for system, why in failed.items()}}


def rows_of(timed: Mapping[System, Any], entries: Mapping[System, dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries with their ratios to the best exact runtime that is not ours."""
    rivals = [entries[system] for system in timed if not system.ours and entries[system]["exactness"]["exact"]]
    rows = []
    for system in timed:
        row = {"system": str(system), "runtime": system.runtime, "mode": system.mode, **entries[system]}
        for name in ("best", "median"):
            bar = max((rival[name] for rival in rivals), default=None)
            row[f"{name}_ratio"] = row[name] / bar if bar else None
        rows.append(row)
    return sorted(rows, key=lambda row: -row["median"])


def run(bench: Run) -> int:
    options, document = bench.options, bench.document
    names = [OURS, *(name for name in options.runtimes if name != OURS)]
    kept = ("dtype", "prompts", "prompt_tokens", "new_tokens", "rounds", "samples", "quick", "divergence")
    document |= {name: getattr(options, name) for name in kept if hasattr(options, name)}
    document |= {"runtimes": {}, "missing": {}, "skipped": {}, "results": []}
    pairs = [*options.pairs, *(["checkpoints"] if options.checkpoints else [])]
    with ExitStack() as folders:
        root = options.folder or Path(folders.enter_context(tempfile.TemporaryDirectory()))
        for name in pairs:
            folder = root.resolve() / name.replace("/", "-")
            weights = build_weights(name, folder, options)
            if isinstance(weights, str):
                document["skipped"][name] = weights
                print(f"{name}: skipped, {weights}")
                continue
            model = weights.pair.load("target", "float32")
            checked: dict[Any, dict[str, Any]] = {}
            for threads in options.thread_counts or ([2] if name in TWO_THREADS_ONLY else [1, 2]):
                print(f"{weights.pair.name}, {threads} threads", flush=True)
                with ExitStack() as stack:
                    processes, missing = open_runtimes(names, weights.pair, threads, folder, stack)
                    document["missing"] |= missing
                    document["runtimes"] |= {name: process.facts for name, process in processes.items()}
                    for temperature in options.temperatures:
                        for batch_size in options.batches:
                            case: dict[str, Any] = {"pair": weights.pair.name, "dtype": weights.pair.dtype}
                            case |= {"threads": threads, "temperature": temperature, "batch_size": batch_size}
                            result = measure_case(bench, weights, processes, model, checked, case)
                            document["results"].append(result)
                            print(case_table(result), flush=True)
                            bench.save()
            del model
    ours = [row for result in document["results"] for row in result["systems"] if row["runtime"] == OURS]
    return 0 if ours and all(row["exactness"]["exact"] for row in ours) else 1


# ---- tables


def exactness_text(found: Mapping[str, Any]) -> str:
    """What a check found, in words."""
    mark = "" if found["exact"] else "**not exact**: "
    if "failed" in found:
        return mark + str(found["failed"])
    if "p_value" in found:
        worst = found["worst"]
        text = f"p = {found['p_value']:.2g}"
        if not found["exact"]:
            text += f", {worst['tokens']} in {100 * worst['seen']:.1f} % where {100 * worst['expected']:.1f} % is right"
        return mark + text
    text = f"{found['equal']} of {found['compared']} texts equal"
    return mark + (text + f", gap {found['largest_gap']:.1g}" if found["equal"] < found["compared"] else text)


def case_title(result: Mapping[str, Any]) -> str:
    """What was measured."""
    threads = f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}"
    return f"{result['pair']} {result['dtype']}, {threads}, T={result['temperature']:g}, batch {result['batch_size']}"


def case_table(result: Mapping[str, Any]) -> str:
    """One case as a table."""
    rows = []
    for row in result["systems"]:
        tree = row["chosen"].get("tree")
        how = f"{tree['nodes']} nodes x {tree['levels']} levels" if tree and row["mode"] == DRAFT else ""
        how = f"{row['draft_tokens']} tokens" if "draft_tokens" in row else how
        ratios = [f"{row[name]:.2f}x" if row[name] else "" for name in ("median_ratio", "best_ratio")]
        name = f"**{row['system']}**" if row["runtime"] == OURS else row["system"]
        rates = [f"{row['median']:.1f}", f"{row['best']:.1f}"]
        rows.append([name, how, exactness_text(row["exactness"]), *rates, *ratios])
    header = ["system", "draft", "exactness", "tokens/s, median", "best", "of the best exact rival", "by best rounds"]
    parts = [f"### {case_title(result)}", report.table(header, rows, left=3)]
    if result["failed"]:
        parts.append("\n".join(f"- {name}: failed, {why}" for name, why in result["failed"].items()))
    return "\n\n".join(parts)


def markdown(document: Mapping[str, Any]) -> str:
    """The tables."""
    facts = document["environment"]
    versions = {
        package: version for entry in document["runtimes"].values() for package, version in entry["versions"].items()
    }
    parts = [
        "# Against the runtimes",
        f"{facts['processor']}; {facts['date']} UTC; commit {document['commit'] or 'unknown'}.",
    ]
    parts[-1] += f"\n{', '.join(f'{package} {version}' for package, version in sorted(versions.items()))}."
    parts[-1] += f"\n`{document['command']}`"
    parts.append(
        f"Tokens a second of whole calls, prompts of {document['prompt_tokens']} tokens included, "
        f"{document['new_tokens']} new ones each. *Exact*: at T=0 text equal to our plain loop's up to near-ties, "
        f"above a chi-square test of the first {SAMPLED_TOKENS} tokens with p >= {SIGNIFICANCE:g}."
    )
    parts += [case_table(result) for result in document["results"]]
    left_out = document["missing"] | document["skipped"]
    if left_out:
        parts.append("\n".join(f"- {name}: left out, {why}" for name, why in left_out.items()))
    return "\n\n".join(parts) + "\n"


OPTIONS = [
    option("--pairs", nargs="*", choices=(*PAIR_NAMES, "tiny"), default=list(PAIR_NAMES), help="default %(default)s"),
    option("--checkpoints", type=Path, nargs="+", metavar="FOLDER", help="a target and, if any, its draft"),
    option("--runtimes", nargs="*", choices=tuple(RUNTIMES), default=list(RUNTIMES), help="beside ours (default: all)"),
    option(
        "--threads",
        dest="thread_counts",
        type=int,
        nargs="+",
        help="of each runtime (default: 1 and 2; 2 for the large pair)",
    ),
    option("--batches", type=int, nargs="+", default=[1, 4], help="requests at a time (default %(default)s)"),
    option("--draft-tokens", type=int, nargs="+", default=[2, 3, 4, 5, 6, 8], help="searched for each rival"),
    option("--samples", type=int, default=400, help="for the test of exactness; a quarter in bfloat16"),
    option("--divergence", type=float, default=DIVERGENCE, help="of synthetic pairs (default %(default)s)"),
    option("--folder", type=Path, help="where converted weights are kept (default: nowhere)"),
    *shared(quick=False, temperatures=[0.0, 1.0], prompts=8, calibration_prompts=8, prompt_tokens=128),
    *shared(new_tokens=128, rounds=5, profile_seconds=10.0),
]
QUICK = {"pairs": ["demo"], "thread_counts": [1], "batches": [1], "prompts": 1, "calibration_prompts": 1, "rounds": 2}
QUICK |= {"prompt_tokens": 32, "new_tokens": 32, "samples": 60, "draft_tokens": [3, 5], "profile_seconds": 1.0}


def check(options: argparse.Namespace) -> str | None:
    """What is wrong with the options."""
    if options.checkpoints and len(options.checkpoints) > 2:
        return "--checkpoints: a target and a draft at most"
    if max(options.batches) > options.prompts:
        return f"--prompts: a batch of {max(options.batches)} needs as many"
    return None


main = Script(__spec__, run, __doc__, OPTIONS, quick=QUICK, markdown=markdown, check=check).main


if __name__ == "__main__":
    sys.exit(main())
