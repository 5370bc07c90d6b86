"""Tables and plots of the robustness study."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.common.report import NO_PYPLOT, pyplot, table

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
GRID_PLOT, BUDGET_PLOT = "robustness_samplers.png", "robustness_budgets.png"
COLOURS = ("#1b7837", "#d95f02", "#7570b3", "#555555", "#e7298a", "#1f78b4")


def number(entry: Mapping[str, float]) -> str:
    """A mean and its standard error."""
    return f"{entry['mean']:.2f}" if math.isnan(entry["se"]) else f"{entry['mean']:.2f} ± {entry['se']:.2f}"


def markdown(document: Mapping[str, Any]) -> str:
    """All tables, with the plots' places between them."""
    facts = document["environment"]
    parts = [
        f"{document['pair']}, {document['dtype']}, {facts['device']['name']}; torch {facts['torch']}; "
        f"commit {document['commit'] or 'unknown'}, {facts['date']} UTC.\n"
        f"{document['texts']} texts, {document['starts']} positions each; trees from {document['calibration_texts']} "
        f"other texts.\n`{document['command']}`",
        "### Samplers on equal trees",
        _count_of_verdicts(document),
        f"![tokens per step over the temperature]({GRID_PLOT})",
        *_grid_tables(document),
        *_cut_draft_table(document),
        "### Trees over the budget",
        f"![tokens per step over the budget]({BUDGET_PLOT})",
        *_budget_tables(document),
        "### Replays against real loops",
        _loop_table(document),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _count_of_verdicts(document: Mapping[str, Any]) -> str:
    lines = []
    for rival in document["samplers"][1:]:
        found = [row["ours_against"][rival] for row in _distinct(document)]
        counts = {word: sum(entry["verdict"] == word for entry in found) for word in ("ahead", "level", "behind")}
        means = [{name: entry["mean"] for name, entry in row["tokens_per_step"].items()} for row in _distinct(document)]
        gains = [row[document["samplers"][0]] / row[rival] - 1 for row in means]
        lines.append(
            f"- Ours against {rival}: ahead in {counts['ahead']}, level in {counts['level']}, behind in "
            f"{counts['behind']} of {len(found)} comparisons, from {100 * min(gains):+.1f} % to "
            f"{100 * max(gains):+.1f} %."
        )
    return "\n".join(lines)


def _distinct(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The grid, temperature 0 once: top-p changes nothing there."""
    top_p = max(row["top_p"] for row in document["grid"])
    return [row for row in document["grid"] if row["temperature"] > 0 or row["top_p"] == top_p]


def _difference(entry: Mapping[str, Any]) -> str:
    return f"{entry['difference']:+.3f} ± {entry['se']:.3f}, {entry['verdict']}"


def _grid_tables(document: Mapping[str, Any]) -> list[str]:
    samplers = document["samplers"]
    parts = []
    for name in (*document["trees"], document["own_tree"]):
        rows = []
        for row in _distinct(document):
            if row["tree"] != name:
                continue
            cells = [f"{row['temperature']:g}", "any" if row["temperature"] == 0 else f"{row['top_p']:g}"]
            cells += [number(row["tokens_per_step"][sampler]) for sampler in samplers]
            for rival in samplers[1:]:
                cells.append(_difference(row["ours_against"][rival]).replace("behind", "**behind**"))
            rows.append(cells)
        header = ["T", "top-p", *samplers, *(f"ours - {rival}" for rival in samplers[1:])]
        parts += [f"**{name}**", table(header, rows, left=2)]
    return parts


def _cut_draft_table(document: Mapping[str, Any]) -> list[str]:
    rows = []
    for row in document["cut_drafts"]:
        cells = [f"{row['temperature']:g}", f"{row['top_p']:g}", row["tree"], number(row["measured"])]
        for name in (document["samplers"][0], document["samplers"][2]):
            cells.append(_difference(row[f"against {name}"]))
        rows.append(cells)
    header = ["T", "top-p", "tree", "ours with the draft cut", "minus ours as it is", "minus top-k"]
    return ["### If the draft were cut too", table(header, rows, left=3)] if rows else []


def _budget_tables(document: Mapping[str, Any]) -> list[str]:
    parts = []
    for temperature in dict.fromkeys(row["temperature"] for row in document["budgets"]):
        chosen = [row for row in document["budgets"] if row["temperature"] == temperature]
        families = list(dict.fromkeys(row["family"] for row in chosen))
        rows = []
        for budget in dict.fromkeys(row["budget"] for row in chosen):
            cells = [str(budget)]
            for family in families:
                row = next(row for row in chosen if (row["family"], row["budget"]) == (family, budget))
                cells.append(f"{row['predicted']:.2f} / {number(row['measured'])}")
            rows.append(cells)
        cut = max(row["cut"] for row in chosen)
        parts.append(f"**T = {temperature:g}**, predicted / measured")
        parts.append(table(["nodes", *families], rows))
        if cut > 0.001:
            parts.append(f"Up to {100 * cut:.1f} % of the steps of the longest chains were cut by the end of a text.")
    return parts


def _loop_table(document: Mapping[str, Any]) -> str:
    rows = []
    for row in document["loops"]:
        cells = [f"{row['temperature']:g}", f"{row['top_p']:g}", f"{row['family']}, {row['nodes']} nodes"]
        cells += [row["sampler"], number(row["loop"]), number(row["replay"]), f"{row['standard_errors_apart']:+.1f}"]
        rows.append(cells)
    return table(["T", "top-p", "tree", "sampler", "loop", "replay", "standard errors apart"], rows, left=4)


def write_page(path: Path, text: str, with_plots: bool) -> None:
    """Put the tables between the page's two marks, or begin a page that has only them."""
    if not with_plots:
        text = "\n".join(line for line in text.split("\n") if not line.startswith("!["))
    page = path.read_text(encoding="utf-8") if path.exists() else f"# Robustness\n\n{BEGIN}\n{END}\n"
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise SystemExit(f"{path} must hold the lines {BEGIN} and {END} once each")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")


def plots(document: Mapping[str, Any], folder: Path) -> str | None:
    """Draw both plots into a folder; return the reason why not, if not."""
    plt = pyplot()
    if plt is None:
        return NO_PYPLOT
    folder.mkdir(parents=True, exist_ok=True)
    for draw, name in ((_plot_grid, GRID_PLOT), (_plot_budgets, BUDGET_PLOT)):
        figure = draw(document, plt)
        figure.savefig(folder / name, dpi=90)
        plt.close(figure)
    return None


def _plot_grid(document: Mapping[str, Any], plt: Any) -> Any:
    """Temperature against tokens per step: a row of panels for top-p, one row for each of two trees."""
    trees = list(document["trees"])[1:]
    top_ps = sorted({row["top_p"] for row in document["grid"]})
    figure, panels = plt.subplots(
        len(trees), len(top_ps), figsize=(3.4 * len(top_ps), 2.7 * len(trees)), sharex=True, sharey="row",
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for panel_row, tree in zip(panels, trees):
        for axes, top_p in zip(panel_row, top_ps):
            chosen = [row for row in document["grid"] if (row["tree"], row["top_p"]) == (tree, top_p)]
            for sampler, colour in zip(document["samplers"], COLOURS):
                values = [row["tokens_per_step"][sampler] for row in chosen]
                _line(axes, [row["temperature"] for row in chosen], values, sampler, colour)
            axes.set_title(f"{tree}; top-p {top_p:g}", fontsize=9)
            axes.grid(alpha=0.3)
        panel_row[0].set_ylabel("tokens per step")
    for axes in panels[-1]:
        axes.set_xlabel("temperature")
    panels[0][0].legend(fontsize=7)
    return figure


def _plot_budgets(document: Mapping[str, Any], plt: Any) -> Any:
    """Budget against tokens per step: a panel for each temperature; predictions dashed."""
    temperatures = list(dict.fromkeys(row["temperature"] for row in document["budgets"]))
    figure, panels = plt.subplots(
        1, len(temperatures), figsize=(3.6 * len(temperatures), 3.6), sharey=True, layout="constrained", squeeze=False
    )
    for axes, temperature in zip(panels[0], temperatures):
        chosen = [row for row in document["budgets"] if row["temperature"] == temperature]
        for family, colour in zip(dict.fromkeys(row["family"] for row in chosen), COLOURS):
            rows = [row for row in chosen if row["family"] == family]
            sizes = [row["budget"] for row in rows]
            _line(axes, sizes, [row["measured"] for row in rows], family, colour)
            axes.plot(sizes, [row["predicted"] for row in rows], color=colour, linestyle="--", linewidth=1, alpha=0.7)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("nodes")
        axes.set_title(f"T = {temperature:g}; dashed: predicted", fontsize=9)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("tokens per step")
    panels[0][-1].legend(fontsize=7)
    return figure


def _line(axes: Any, places: Sequence[float], values: Sequence[Mapping[str, float]], label: str, colour: str) -> None:
    axes.errorbar(
        places, [value["mean"] for value in values], yerr=[value["se"] for value in values], color=colour,
        marker="o", markersize=3, linewidth=1.4, capsize=2, label=label,
    )  # fmt: skip
