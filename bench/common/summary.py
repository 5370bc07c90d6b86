"""What a folder of documents says in short: ours beside the best other, a line a case."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from bench.common.report import duration, table

NO_RIVALS = ("reference", "one read of the logits")  # what a result is checked with, and a scale
Document = Mapping[str, Any]


class Row(NamedTuple):
    """One case. `ratio`: how many times better ours is."""

    bench: str
    case: str
    ours: str
    other: str
    ratio: float


class Comparison(NamedTuple):
    """Who was timed in one case: `ours` names the entries that are ours."""

    case: str
    values: Mapping[str, float]
    ours: tuple[str, ...]
    unit: str = "tokens/s"  # or tokens/step, of which more is better, or ms, of which less is


def compared(bench: str, comparison: Comparison) -> Iterator[Row]:
    """The row, where there are both; of several that are ours, the better one."""
    case, values, ours, unit = comparison
    best = min if unit == "ms" else max
    own = [name for name in ours if name in values]
    others = [name for name in values if name not in ours]
    if own and others:
        found = best(own, key=values.__getitem__), best(others, key=values.__getitem__)
        texts = {"ms": duration, "tokens/s": "{:.1f} tokens/s".format, "tokens/step": "{:.2f} tokens/step".format}
        one, other = (values[name] for name in found)
        ratio = other / one if unit == "ms" else one / other
        yield Row(bench, case, *(f"{name}: {texts[unit](values[name])}" for name in found), ratio)


def _op(document: Document) -> Iterator[Comparison]:
    for case in document["cases"]:
        ours = case["ours"]
        known = {} if ours is None else case["ratios"][ours]
        ms = {name: entry["ms"][entry["headline"]]["p50"] for name, entry in case["providers"].items() if "ms" in entry}
        # A loop that no graph holds is compared uncaptured: the ratio says by how much, whatever mode ours is shown in.
        ms = {name: ms[ours] * ratio for name, ratio in known.items() if name not in NO_RIVALS} | (
            {ours: ms[ours]} if ours else {}
        )
        ms = {name: value for name, value in ms.items() if name == ours or not case["providers"][name]["ours"]}
        yield Comparison(case["name"], ms, (ours,), "ms")


def _demo_pair(document: Document) -> Iterator[Comparison]:
    for result in document["results"]:
        yield Comparison(f"T = {result['temperature']:g}", result["tokens_per_second"], ("planned tree",))


def _paper_systems(document: Document) -> Iterator[Comparison]:
    for result in document["results"]:
        rates = {name: 1e3 / entry["ms_per_token"] for name, entry in result["providers"].items()}
        trees = tuple(name for name, entry in result["providers"].items() if "nodes" in entry)
        yield Comparison(f"{result['title']}, T = {result['temperature']:g}", rates, trees)


def _adaptive(document: Document) -> Iterator[Comparison]:
    for result in document["results"]:
        rates = {name: entry["tokens_per_second"] for name, entry in result["providers"].items()}
        ours = tuple(name for name in rates if name.startswith("adaptive"))
        yield Comparison(f"{result['workload']} text, T = {result['temperature']:g}", rates, ours)


def _auto(document: Document) -> Iterator[Comparison]:
    for result in document["results"]:
        plain = result["plain_tokens_per_second"]
        rates = {"worst pick": plain * result["worst"]["pick_over_plain"], "plain": plain}
        yield Comparison(f"{result['prompts']} first prompts, T = {result['temperature']:g}", rates, ("worst pick",))


def _tree_forward_cpu(document: Document) -> Iterator[Comparison]:
    for result in document["results"]:
        ms = {"adapted": result["tree_ms"], "transformers": result["plain_ms"]}
        yield Comparison(f"{result['rows']} rows", ms, ("adapted",), "ms")


def _forward_floors(document: Document) -> Iterator[Comparison]:
    for result in document["results"]:
        ms = {"native": result["best_ms"], "floor": result["floor_ms"]}
        name = f"{result['rows']} rows of {document['size']}, {document['dtype']}, {result['instruction_set']}"
        yield Comparison(name, ms, ("native",), "ms")


def _planner_pick(document: Document) -> Iterator[Comparison]:
    rates = {}
    for entry in document["results"]:
        name = f"{entry['tree']} {entry['nodes']} x {entry['levels']}"
        if entry["picked_from"]:
            name = f"the pick from {' and from '.join(entry['picked_from'])}"
        rates[name] = entry["tokens_per_second"]
    picks = tuple(name for name in rates if name.startswith("the pick"))
    yield Comparison(f"T = {document['temperature']:g}, {len(rates)} trees", rates, picks)


def _offload(document: Document) -> Iterator[Comparison]:
    part = document["parts"].get("speedup", {"trees": []})
    for tree in part["trees"]:
        rates = {tree["name"]: 1e3 * tree["tokens_per_step"] / tree["step_ms"], "plain": 1e3 / part["plain_step_ms"]}
        yield Comparison(f"{tree['nodes']} nodes, layers streamed", rates, (tree["name"],))


def _robustness(document: Document) -> Iterator[Comparison]:
    ours, tree = document["samplers"][0], next(iter(document["trees"]))
    for row in document["grid"]:
        if row["tree"] == tree and row["top_p"] == max(entry["top_p"] for entry in document["grid"]):
            means = {name: entry["mean"] for name, entry in row["tokens_per_step"].items()}
            yield Comparison(f"tree {tree}, T = {row['temperature']:g}", means, (ours,), "tokens/step")


def _rules(document: Document) -> Iterator[Comparison]:
    for row in document["results"]:
        rates = {
            f"{entry['rule']}, own plan": entry["tokens_per_second"]
            for entry in row["trees"]
            if entry["tree"] == f"plan for {entry['rule']}"
        }
        yield Comparison(f"T = {row['temperature']:g}", rates, ("traversal, own plan",))


READERS: dict[str, Callable[[Document], Iterator[Comparison]]] = {
    "demo_pair": _demo_pair,
    "paper_systems": _paper_systems,
    "adaptive": _adaptive,
    "auto": _auto,
    "tree_forward_cpu": _tree_forward_cpu,
    "forward_floors": _forward_floors,
    "planner_pick": _planner_pick,
    "offload": _offload,
    "robustness": _robustness,
    "rules": _rules,
}


def rows(documents: Mapping[str, Document]) -> list[Row]:
    """All cases of all documents in which somebody else was timed beside ours."""
    found: list[Row] = []
    for name, document in documents.items():
        reader = _op if "cases" in document else READERS.get(name)
        for comparison in reader(document) if reader else ():
            found += compared(name, comparison)
    return found


def markdown(documents: Mapping[str, Document]) -> str:
    """The table."""
    cells = [[*row[:4], f"{row.ratio:.2f}x"] for row in rows(documents)]
    return table(["bench", "case", "ours", "best other", "ours is"], cells, left=4)
