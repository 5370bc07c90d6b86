"""What the package promises for an H200, checked against measured documents: target, measured, met.

Reads what the bench scripts wrote on a GPU; without that a target is "not measured"::

    python -m bench.common.targets results/nvidia-h200
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.common import report

__all__ = ["TARGETS", "Finding", "Target", "evaluate", "load_documents", "markdown"]

Documents = Mapping[str, Mapping[str, Any]]  # bench name -> document
Measured = tuple[str, bool]


class Target(NamedTuple):
    """One promise. `measure` gives the text of what was found and whether it is enough, or None where nothing was."""

    what: str
    wanted: str
    measure: Callable[[Documents], Measured | None]


class Finding(NamedTuple):
    what: str
    wanted: str
    measured: str
    met: bool | None  # None: not measured


NOT_MEASURED = "not measured"


def cases(documents: Documents, bench: str, **sizes: Any) -> Iterator[Mapping[str, Any]]:
    """Cases of a GPU document in which ours was timed. A size is given by its value or by a predicate."""
    document = documents.get(bench, {})
    if document.get("device_type") != "cuda":
        return
    for case in document["cases"]:
        fits = all(
            wanted(case["sizes"][key]) if callable(wanted) else case["sizes"][key] == wanted
            for key, wanted in sizes.items()
        )
        if fits and case["ours"] is not None:
            yield case


def ours(case: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entry of the provider that the package would choose."""
    entry: Mapping[str, Any] = case["providers"][case["ours"]]
    return entry


def median_ms(case: Mapping[str, Any]) -> float:
    """The median time of ours."""
    entry = ours(case)
    return float(entry["ms"][entry["headline"]]["p50"])


def ratios(found: Iterator[Mapping[str, Any]], *rivals: str) -> Iterator[tuple[float, str]]:
    """(how many times faster ours is, case): against the fastest of the rivals that were timed."""
    for case in found:
        known = [case["ratios"][case["ours"]][rival] for rival in rivals if rival in case["ratios"][case["ours"]]]
        if known:
            yield min(known), case["name"]


def at_least(values: Iterator[tuple[float, str]], bound: float, unit: str) -> Measured | None:
    """The smallest value must reach the bound."""
    found = list(values)
    if not found:
        return None
    value, where = min(found)
    return f"{value:.3g}{unit} ({_where(where, found)})", value >= bound


def at_most(values: Iterator[tuple[float, str]], bound: float, unit: str) -> Measured | None:
    """The largest value must stay within the bound."""
    found = list(values)
    if not found:
        return None
    value, where = max(found)
    return f"{value:.3g}{unit} ({_where(where, found)})", value <= bound


def _where(name: str, found: Sequence[object]) -> str:
    return name if len(found) == 1 else f"worst of {len(found)}: {name}"


# ---- the kernels on an H200

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def few_nodes(documents: Documents) -> Iterator[Mapping[str, Any]]:
    return cases(documents, "tree_attention", context_len=lambda n: n >= 8192, num_nodes=lambda n: n <= 64)


def many_nodes(documents: Documents) -> Iterator[Mapping[str, Any]]:
    return cases(documents, "tree_attention", context_len=lambda n: n >= 8192, num_nodes=lambda n: n >= 256)


def sampling(documents: Documents) -> Iterator[Mapping[str, Any]]:
    sizes = {"num_rows": 64, "vocab": 128256, "num_samples": 16}
    return cases(documents, "sample_without_replacement", temperature=lambda t: t > 0, **sizes)


def verification(documents: Documents) -> Iterator[Mapping[str, Any]]:
    sizes = {"num_nodes": (64, 128).__contains__, "vocab": 128256, "batch_size": 1}
    return cases(documents, "verify_tree", temperature=lambda t: t > 0, **sizes)


def compaction(documents: Documents) -> Iterator[Mapping[str, Any]]:
    return cases(documents, "compact_kv_cache_", num_accepted=8, batch_size=1, layers=32)


def _copy_ms(documents: Documents, bench: str, num_bytes: float) -> float:
    """How long so many bytes take at the copy bandwidth of the same run."""
    return num_bytes / (float(documents[bench]["peaks"]["copy_gb_per_s"]) * 1e6)


def _cache_bandwidth(documents: Documents) -> Iterator[tuple[float, str]]:
    """Percent of the copy bandwidth at which the committed keys and values are read; nothing else is counted."""
    for case in few_nodes(documents):
        sizes = case["sizes"]
        rows = 2 * sizes["batch_size"] * sizes["context_len"] * sizes["kv_heads"]
        num_bytes = rows * sizes["head_dim"] * ITEM_BYTES[sizes["dtype"]]
        yield 100 * _copy_ms(documents, "tree_attention", num_bytes) / median_ms(case), case["name"]


def _times_the_read(documents: Documents, found: Iterator[Mapping[str, Any]], bench: str) -> Iterator[Any]:
    """Time over what reading the logits once takes at the measured copy bandwidth."""
    for case in found:
        sizes = case["sizes"]
        # verify_tree reads two logit tensors of a row a node
        rows = sizes["num_rows"] if bench == "sample_without_replacement" else 2 * sizes["num_nodes"]
        num_bytes = rows * sizes["vocab"] * ITEM_BYTES[sizes["dtype"]]
        yield median_ms(case) / _copy_ms(documents, bench, num_bytes), case["name"]


def _microseconds(found: Iterator[Mapping[str, Any]]) -> Iterator[tuple[float, str]]:
    return ((1e3 * median_ms(case), case["name"]) for case in found)


def _all_captured(found: Iterator[Mapping[str, Any]]) -> Measured | None:
    entries = [ours(case).get("captured", False) for case in found]
    if not entries:
        return None
    return f"captured in a CUDA graph in {sum(entries)} of {len(entries)} cases", all(entries)


def _one_launch(found: Iterator[Mapping[str, Any]]) -> Measured | None:
    launches = [ours(case).get("launches") for case in found]
    if not launches or None in launches:
        return None
    return f"{max(launches)}", max(launches) == 1


def _host_share(documents: Documents) -> Measured | None:
    document = documents.get("captured_loop", {})
    if document.get("device_type") != "cuda":
        return None
    shares = ((100 * entry["host_share"], f"{entry['nodes']} nodes") for entry in document["results"])
    return at_most(shares, 3.0, " % of a step")


# ---- offloading, on any GPU with a host that holds the layers


def _offload(documents: Documents, part: str) -> Mapping[str, Any] | None:
    document = documents.get("offload", {})
    if document.get("device_type") != "cuda":
        return None
    found: Mapping[str, Any] | None = document["parts"].get(part)
    return found


def _streaming_rate(documents: Documents) -> Measured | None:
    part = _offload(documents, "stream")
    if part is None:
        return None
    share = 100 * part["share_of_bandwidth"]
    return f"{share:.1f} % of {documents['offload']['link']['host_to_device']:.1f} GB/s", share >= 90


def _hidden_compute(documents: Documents) -> Measured | None:
    part = _offload(documents, "stream")
    if part is None:
        return None
    hidden = [entry for entry in part["forwards"] if entry["compute_ms"] < part["stream_ms"]]
    return at_most(((entry["pass_ms"] / part["stream_ms"], f"{entry['nodes']} nodes") for entry in hidden), 1.05, "x")


def _offload_memory(documents: Documents) -> Measured | None:
    part = _offload(documents, "stream")
    if part is None:
        return None
    peak, budget = part["peak_bytes"], part["budget_bytes"]
    return f"{peak / 2**30:.2f} of {budget / 2**30:.2f} GiB", peak <= budget


def _offload_speedup(documents: Documents, name: str, bound: float) -> Measured | None:
    part = _offload(documents, "speedup")
    if part is None:
        return None
    (entry,) = [entry for entry in part["trees"] if entry["name"] == name]
    text = f"{entry['speedup']:.2f}x ({entry['nodes']} nodes, {entry['tokens_per_step']:.2f} tokens per step)"
    return text, entry["speedup"] >= bound


def _offload_twin(documents: Documents) -> Measured | None:
    part = _offload(documents, "twin")
    if part is None:
        return None
    return f"{sum(run['tokens'] for run in part['runs'])} tokens", all(run["equal"] for run in part["runs"])


# ---- the paper's systems on an H200

# A pair counts where its measured tokens per step miss the paper's by no more than this.
GOAL_TOLERANCE = 0.05


def _paper_system(documents: Documents, row: str) -> Iterator[Mapping[str, Any]]:
    """Greedy results of a row on a GPU in bfloat16."""
    document = documents.get("paper_systems", {})
    if document.get("device_type") != "cuda":
        return
    for result in document["results"]:
        if result["row"] == row and result["dtype"] == "bfloat16" and result["temperature"] == 0:
            yield result


def _paper_speedup(documents: Documents, row: str, bound: float) -> Measured | None:
    """The faster of the tree of the paper's size and the planner's, on a pair that accepts as often as the paper's."""
    for result in _paper_system(documents, row):
        trees = {name: entry for name, entry in result["providers"].items() if "nodes" in entry}
        sized = next(entry for name, entry in trees.items() if name != "planned tree")
        name, best = max(trees.items(), key=lambda item: float(item[1]["speedup"]))
        close = abs(sized["tokens_per_step"] / result["paper"]["tokens_per_step"] - 1) <= GOAL_TOLERANCE
        text = f"{best['speedup']:.3g}x ({name}, {best['nodes']} x {best['levels']})"
        if not close:
            text += (
                f" at {sized['tokens_per_step']:.3g} tokens a step where {result['paper']['tokens_per_step']} are meant"
            )
        lossless = result["lossless"]["ok"]
        return text if lossless else f"{text}, not lossless", close and lossless and best["speedup"] >= bound
    return None


def _floor_ratio(documents: Documents, row: str) -> Iterator[tuple[float, str]]:
    return ((result["floor"]["ratio"], result["title"]) for result in _paper_system(documents, row))


TARGETS = [
    Target(
        "tree_attention, Llama-3-8B heads, bf16, contexts >= 8k, up to 64 nodes",
        ">= 80 % of the copy bandwidth over the K/V bytes",
        lambda d: at_least(_cache_bandwidth(d), 80, " %"),
    ),
    Target(
        "the same against torch SDPA with a dense mask",
        ">= 3x",
        lambda d: at_least(ratios(few_nodes(d), "torch SDPA", "torch SDPA, repeated heads"), 3, "x"),
    ),
    Target(
        "the same against FlexAttention", "> 1x", lambda d: at_least(ratios(few_nodes(d), "FlexAttention"), 1.0, "x")
    ),
    Target(
        "the same against FlashInfer's custom-mask prefill, where installed",
        ">= 1x",
        lambda d: at_least(ratios(few_nodes(d), "FlashInfer"), 1.0, "x"),
    ),
    Target(
        "tree_attention, 256 to 1024 nodes, contexts >= 8k, prefix part",
        ">= 60 % of the bf16 matrix rate",
        lambda d: at_least(((ours(c)["percent_of_matmul"], c["name"]) for c in many_nodes(d)), 60, " %"),
    ),
    Target(
        "sample_without_replacement, 16 of 128256, 64 rows",
        "<= 2x one read of the logits",
        lambda d: at_most(_times_the_read(d, sampling(d), "sample_without_replacement"), 2, "x"),
    ),
    Target(
        "the same against softmax + exponential race + topk",
        ">= 10x",
        lambda d: at_least(ratios(sampling(d), "softmax + race + topk"), 10, "x"),
    ),
    Target(
        "verify_tree, 64 and 128 nodes x 128256",
        "<= 4x one read of both logit tensors",
        lambda d: at_most(_times_the_read(d, verification(d), "verify_tree"), 4, "x"),
    ),
    Target("the same", "no host sync", lambda d: _all_captured(verification(d))),
    Target(
        "the same against the child-by-child loop",
        ">= 50x",
        lambda d: at_least(ratios(verification(d), "child by child"), 50, "x"),
    ),
    Target("compact_kv_cache_, 32 layers, 8 rows: launches", "1", lambda d: _one_launch(compaction(d))),
    Target(
        "compact_kv_cache_, 32 layers, 8 rows", "<= 10 us", lambda d: at_most(_microseconds(compaction(d)), 10, " us")
    ),
    Target(
        "the same against index_select and copy a layer",
        ">= 10x",
        lambda d: at_least(ratios(compaction(d), "layer by layer", "layer by layer, known path"), 10, "x"),
    ),
    Target("captured loop: host time between steps", "none (<= 3 % of a step)", _host_share),
    Target("offloaded: streaming against the pinned copy bandwidth", ">= 90 %", _streaming_rate),
    Target("offloaded: forwards that are shorter than the copies", "<= 1.05x the copies alone", _hidden_compute),
    Target("offloaded: peak device memory", "<= its budget", _offload_memory),
    Target(
        "offloaded 70B shape, (768, 18) at 10.30 tokens per step, over the own offloaded loop",
        ">= 9.5x",
        lambda d: _offload_speedup(d, "the paper's size", 9.5),
    ),
    Target("the same at the planner's own pick", ">= 10.33x", lambda d: _offload_speedup(d, "planned", 10.33)),
    Target("offloaded 13B shape, own weights in every layer", "the resident twin's tokens", _offload_twin),
    Target(
        "7B-shaped synthetic pair over the own loop, greedy, 5.08 tokens a step at (128, 10)",
        ">= 4.04x",
        lambda d: _paper_speedup(d, "7B", 4.04),
    ),
    Target(
        "the own loop's step over one read of its weights",
        "<= 1.25x",
        lambda d: at_most(_floor_ratio(d, "7B"), 1.25, "x"),
    ),
    Target(
        "13B-shaped synthetic pair, 4.20 tokens a step at (64, 9)", ">= 3.84x", lambda d: _paper_speedup(d, "13B", 3.84)
    ),
    Target(
        "33B-shaped synthetic pair, 4.28 tokens a step at (64, 6)", ">= 2.37x", lambda d: _paper_speedup(d, "33B", 2.37)
    ),
]


def evaluate(documents: Documents) -> list[Finding]:
    """Check every target."""
    findings = []
    for target in TARGETS:
        measured = target.measure(documents)
        text, met = (NOT_MEASURED, None) if measured is None else measured
        findings.append(Finding(target.what, target.wanted, text, met))
    return findings


def markdown(findings: Sequence[Finding]) -> str:
    """The table."""
    words = {True: "yes", False: "**no**", None: "-"}
    rows = [[finding.what, finding.wanted, finding.measured, words[finding.met]] for finding in findings]
    return report.table(["target (H200)", "wanted", "measured", "met"], rows, left=4)


def load_documents(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the documents that lie in a folder, by the bench that wrote them."""
    documents = {}
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(document, dict) and "bench" in document:
            documents[document["bench"]] = document
    return documents


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if something was measured and is not met, 0 otherwise."""
    parser = argparse.ArgumentParser(description="Check measured documents against the package's targets.")
    parser.add_argument("folder", type=Path, help="folder of one device's results")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error(f"folder must exist, got {options.folder}")
    findings = evaluate(load_documents(options.folder))
    print(markdown(findings))
    return 1 if any(finding.met is False for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
