"""What the package promises for an H200, checked against measured documents: target, estimated, measured, met.

Reads what the bench scripts wrote on a GPU; without that a target is "not measured"::

    python -m bench.common.targets results/nvidia-h200
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.common import report

Documents = Mapping[str, Mapping[str, Any]]  # bench name -> document
Case = Mapping[str, Any]
Measured = tuple[str, bool] | None  # what was found and whether it is enough; None where nothing was


class Finding(NamedTuple):
    what: str
    wanted: str
    estimated: str  # by the kernel's own file, for an H200; empty where that has no estimate
    measured: str
    met: bool | None  # None: not measured


NOT_MEASURED = "not measured"


def cases(documents: Documents, bench: str, **sizes: Any) -> list[Case]:
    """Cases in which ours was timed. A size is given by its value or by a predicate."""

    def fits(case: Case) -> bool:
        found = [(case["sizes"].get(key), value) for key, value in sizes.items()]
        return all(value(size) if callable(value) else size == value for size, value in found)

    document = documents.get(bench, {"cases": []})
    return [case for case in document["cases"] if case["ours"] is not None and fits(case)]


def ours(case: Case) -> Mapping[str, Any]:
    """The entry of the provider that the package would choose."""
    return case["providers"][case["ours"]]


def median_ms(case: Case) -> float:
    """The median time of ours."""
    entry = ours(case)
    return float(entry["ms"][entry["headline"]]["p50"])


def ratios(found: Iterable[Case], *rivals: str) -> Iterator[tuple[float, str]]:
    """(how many times faster ours is, case): against the fastest of the rivals that were timed."""
    for case in found:
        known = [case["ratios"][case["ours"]][rival] for rival in rivals if rival in case["ratios"][case["ours"]]]
        if known:
            yield min(known), case["name"]


def at_least(values: Iterable[tuple[float, str]], bound: float, unit: str) -> Measured:
    """The smallest value must reach the bound."""
    found = sorted(values)
    return (_worst(found[0], len(found), unit), found[0][0] >= bound) if found else None


def at_most(values: Iterable[tuple[float, str]], bound: float, unit: str) -> Measured:
    """The largest value must stay within the bound."""
    found = sorted(values)
    return (_worst(found[-1], len(found), unit), found[-1][0] <= bound) if found else None


def _worst(entry: tuple[float, str], count: int, unit: str) -> str:
    return f"{entry[0]:.3g}{unit} ({'' if count == 1 else f'worst of {count}: '}{entry[1]})"


# ---- the kernels on an H200

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def _copy_ms(documents: Documents, bench: str, num_bytes: float) -> float:
    """How long so many bytes take at the copy bandwidth of the same run."""
    return num_bytes / (float(documents[bench]["peaks"]["copy_gb_per_s"]) * 1e6)


def _cache_bandwidth(documents: Documents, found: Iterable[Case]) -> Iterator[tuple[float, str]]:
    """Percent of the copy bandwidth at which the committed keys and values are read; nothing else is counted."""
    for case in found:
        sizes = case["sizes"]
        rows = 2 * sizes["batch_size"] * sizes["context_len"] * sizes["kv_heads"]
        num_bytes = rows * sizes["head_dim"] * ITEM_BYTES[sizes["dtype"]]
        yield 100 * _copy_ms(documents, "tree_attention", num_bytes) / median_ms(case), case["name"]


def _times_the_read(documents: Documents, found: Iterable[Case], bench: str) -> Iterator[tuple[float, str]]:
    """Time over what reading the logits once takes at the measured copy bandwidth."""
    for case in found:
        sizes = case["sizes"]
        # verify_tree reads two logit tensors of a row a node
        rows = sizes["num_rows"] if bench == "sample_without_replacement" else 2 * sizes["num_nodes"]
        num_bytes = rows * sizes["vocab"] * ITEM_BYTES[sizes["dtype"]]
        yield median_ms(case) / _copy_ms(documents, bench, num_bytes), case["name"]


def _all_captured(found: Sequence[Case]) -> Measured:
    entries = [ours(case).get("captured", False) for case in found]
    return (f"captured in a CUDA graph in {sum(entries)} of {len(entries)} cases", all(entries)) if entries else None


def _one_launch(found: Sequence[Case]) -> Measured:
    launches = [ours(case).get("launches") for case in found]
    return (f"{max(launches)}", max(launches) == 1) if launches and None not in launches else None


def kernel_targets(documents: Documents) -> list[tuple[str, str, str, Measured]]:
    """What the ops promise: (what, wanted, estimated in the docstring of the op's triton_launch.py, measured)."""
    few = cases(documents, "tree_attention", context_len=lambda n: n >= 8192, num_nodes=lambda n: n <= 64)
    many = cases(documents, "tree_attention", context_len=lambda n: n >= 8192, num_nodes=lambda n: n >= 256)
    sizes = {"num_rows": 64, "vocab": 128256, "num_samples": 16, "temperature": lambda t: t > 0}
    sampling = cases(documents, "sample_without_replacement", **sizes)
    sizes = {"num_nodes": (64, 128).__contains__, "vocab": 128256, "batch_size": 1, "temperature": lambda t: t > 0}
    # older documents name no rule: there was one
    verification = cases(documents, "verify_tree", **sizes, rule=(None, "sequoia").__contains__)
    compaction = cases(documents, "compact_kv_cache_", num_accepted=8, batch_size=1, layers=32)

    bandwidth = at_least(_cache_bandwidth(documents, few), 80, " %")
    over_sdpa = at_least(ratios(few, "torch SDPA", "torch SDPA, repeated heads"), 3, "x")
    over_flash = at_least(ratios(few, "FlashInfer"), 1.0, "x")
    matmul = at_least(((ours(case)["percent_of_matmul"], case["name"]) for case in many), 60, " %")
    one_read = at_most(_times_the_read(documents, sampling, "sample_without_replacement"), 2, "x")
    over_race = at_least(ratios(sampling, "softmax + race + topk"), 10, "x")
    both_reads = at_most(_times_the_read(documents, verification, "verify_tree"), 4, "x")
    over_loop = at_least(ratios(verification, "child by child"), 50, "x")
    microseconds = at_most(((1e3 * median_ms(case), case["name"]) for case in compaction), 10, " us")
    over_layers = at_least(ratios(compaction, "layer by layer", "layer by layer, known path"), 10, "x")
    attention = "tree_attention, Llama-3-8B heads, bf16, contexts >= 8k, up to 64 nodes"
    wide_trees = "tree_attention, 256 to 1024 nodes, contexts >= 8k, prefix part"
    return [
        (attention, ">= 80 % of the copy bandwidth over the K/V bytes", "61 % (16 nodes), 49 % (64 nodes)", bandwidth),
        ("the same against torch SDPA with a dense mask", ">= 3x", "", over_sdpa),
        ("the same against FlexAttention", "> 1x", "", at_least(ratios(few, "FlexAttention"), 1.0, "x")),
        ("the same against FlashInfer's custom-mask prefill, where installed", ">= 1x", "", over_flash),
        (wide_trees, ">= 60 % of the bf16 matrix rate", "", matmul),
        ("sample_without_replacement, 16 of 128256, 64 rows", "<= 2x one read of the logits", "2.9x", one_read),
        ("the same against softmax + exponential race + topk", ">= 10x", "", over_race),
        ("verify_tree, 64 and 128 nodes x 128256", "<= 4x one read of both logit tensors", "3.9x, 2.5x", both_reads),
        ("the same", "no host sync", "", _all_captured(verification)),
        ("the same against the child-by-child loop", ">= 50x", "", over_loop),
        ("compact_kv_cache_, 32 layers, 8 rows: launches", "1", "1", _one_launch(compaction)),
        ("compact_kv_cache_, 32 layers, 8 rows", "<= 10 us", "2 to 4 us", microseconds),
        ("the same against index_select and copy a layer", ">= 10x", "", over_layers),
    ]


# ---- whole systems: the captured loop, offloading on any GPU with a host that holds the layers, the paper's rows

# A pair counts where its measured tokens per step miss the paper's by no more than this.
GOAL_TOLERANCE = 0.05


def offload_targets(documents: Documents) -> list[tuple[str, str, Measured]]:
    """What offloaded decoding promises."""
    document = documents.get("offload", {"parts": {}})
    stream, speedup, twin = (document["parts"].get(name) for name in ("stream", "speedup", "twin"))
    rate = hidden = memory = same = None
    if stream is not None:
        share, peak, budget = (stream[name] for name in ("share_of_bandwidth", "peak_bytes", "budget_bytes"))
        rate = f"{100 * share:.1f} % of {document['link']['host_to_device']:.1f} GB/s", 100 * share >= 90
        memory = f"{peak / 2**30:.2f} of {budget / 2**30:.2f} GiB", peak <= budget
        short = [entry for entry in stream["forwards"] if entry["compute_ms"] < stream["stream_ms"]]
        passes = ((entry["pass_ms"] / stream["stream_ms"], f"{entry['nodes']} nodes") for entry in short)
        hidden = at_most(passes, 1.05, "x")

    def tree_speedup(name: str, bound: float) -> Measured:
        for entry in speedup["trees"] if speedup is not None else ():
            if entry["name"] == name:
                size = f"{entry['nodes']} nodes, {entry['tokens_per_step']:.2f} tokens per step"
                return f"{entry['speedup']:.2f}x ({size})", entry["speedup"] >= bound
        return None

    if twin is not None:
        same = f"{sum(run['tokens'] for run in twin['runs'])} tokens", all(run["equal"] for run in twin["runs"])
    sized = "offloaded 70B shape, (768, 18) at 10.30 tokens per step, over the own offloaded loop"
    return [
        ("offloaded: streaming against the pinned copy bandwidth", ">= 90 %", rate),
        ("offloaded: forwards that are shorter than the copies", "<= 1.05x the copies alone", hidden),
        ("offloaded: peak device memory", "<= its budget", memory),
        (sized, ">= 9.5x", tree_speedup("the paper's size", 9.5)),
        ("the same at the planner's own pick", ">= 10.33x", tree_speedup("planned", 10.33)),
        ("offloaded 13B shape, own weights in every layer", "the resident twin's tokens", same),
    ]


def paper_targets(documents: Documents) -> list[tuple[str, str, Measured]]:
    """What the paper's rows shall give, greedy and in bfloat16."""
    results = {
        result["row"]: result
        for result in documents.get("paper_systems", {"results": []})["results"]
        if result["dtype"] == "bfloat16" and result["temperature"] == 0
    }

    def speedup(row: str, bound: float) -> Measured:
        """The faster of the tree of the paper's size and the planner's, on a pair that accepts as the paper's."""
        if row not in results:
            return None
        result, meant = results[row], results[row]["paper"]["tokens_per_step"]
        trees = {name: entry for name, entry in result["providers"].items() if "nodes" in entry}
        sized = next(entry for name, entry in trees.items() if name != "planned tree")
        name, best = max(trees.items(), key=lambda item: float(item[1]["speedup"]))
        close = abs(sized["tokens_per_step"] / meant - 1) <= GOAL_TOLERANCE
        text = f"{best['speedup']:.3g}x ({name}, {best['nodes']} x {best['levels']})"
        text += "" if close else f" at {sized['tokens_per_step']:.3g} tokens a step where {meant} are meant"
        lossless = result["lossless"]["ok"]
        return text if lossless else f"{text}, not lossless", close and lossless and best["speedup"] >= bound

    floors = [(results["7B"]["floor"]["ratio"], results["7B"]["title"])] if "7B" in results else []
    first = "7B-shaped synthetic pair over the own loop, greedy, 5.08 tokens a step at (128, 10)"
    return [
        (first, ">= 4.04x", speedup("7B", 4.04)),
        ("the own loop's step over one read of its weights", "<= 1.25x", at_most(floors, 1.25, "x")),
        ("13B-shaped synthetic pair, 4.20 tokens a step at (64, 9)", ">= 3.84x", speedup("13B", 3.84)),
        ("33B-shaped synthetic pair, 4.28 tokens a step at (64, 6)", ">= 2.37x", speedup("33B", 2.37)),
    ]


def evaluate(documents: Documents) -> list[Finding]:
    """Check every target."""
    documents = {name: found for name, found in documents.items() if found.get("device_type") == "cuda"}
    steps = documents.get("captured_loop", {"results": []})["results"]
    shares = at_most(((100 * entry["host_share"], f"{entry['nodes']} nodes") for entry in steps), 3.0, " % of a step")
    whole = [
        ("captured loop: host time between steps", "none (<= 3 % of a step)", shares),
        *offload_targets(documents),
        *paper_targets(documents),
    ]
    found = [*kernel_targets(documents), *((what, wanted, "", measured) for what, wanted, measured in whole)]
    return [Finding(*promised, *(measured or (NOT_MEASURED, None))) for *promised, measured in found]


def markdown(findings: Sequence[Finding]) -> str:
    """The table."""
    words = {True: "yes", False: "**no**", None: "-"}
    rows = [[*finding[:4], words[finding.met]] for finding in findings]
    return report.table(["target (H200)", "wanted", "estimated", "measured", "met"], rows, left=5)


def load_documents(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the documents that lie in a folder, by the bench that wrote them; results of one bench are joined."""
    documents: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(document, dict) and "bench" in document:
            earlier = documents.get(document["bench"], {})
            if "results" in earlier and "results" in document:  # e.g. rows that were timed one by one
                document["results"] = [*earlier["results"], *document["results"]]
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
