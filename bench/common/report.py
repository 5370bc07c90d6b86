"""Tables and plots of an op's bench document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MODE_TEXT = {
    "warm": "host clock, warm caches",
    "graph_cold": "graph replay, L2 replaced",
    "graph_warm": "graph replay, L2 warm",
    "eager_cold": "uncaptured, L2 replaced",
    "eager_warm": "uncaptured, L2 warm",
}


def duration(milliseconds: float) -> str:
    """Three digits and the unit that suits."""
    units = (("s", 1e-3), ("ms", 1.0), ("us", 1e3))
    unit, scale = next(((unit, scale) for unit, scale in units if milliseconds * scale >= 1), units[-1])
    value = milliseconds * scale
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns are text, the rest numbers."""
    ruler = ["---" if column < left else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(header), ruler, *rows])


def provenance(document: Mapping[str, Any]) -> str:
    """One paragraph: device, versions, ceilings, commit and command."""
    facts, peaks = document["environment"], document["peaks"]
    device = facts["device"]
    threads = f", {device['num_threads']} threads" if device["num_threads"] else ""
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "triton", "cuda", "driver") if facts.get(name))
    return (
        f"{device['name']}{threads}; Python {facts['python']}, {versions}; {facts['date']} UTC; "
        f"commit {document['commit'] or 'unknown'}.\n"
        f"Measured in the same run: copy {peaks['copy_gb_per_s']:.1f} GB/s, "
        f"{peaks['matmul_dtype']} matrix product {peaks['matmul_tflop_per_s']:.3g} TFLOP/s.\n"
        f"`{document['command']}`"
    )


def markdown(document: Mapping[str, Any]) -> str:
    """The whole document as Markdown."""
    on_cuda = document["device_type"] == "cuda"
    has_flops = any(case["flops"] for case in document["cases"])
    header = ["case", "provider", "time (p20 to p80)", "GB/s", "of copy"]
    header += ["of matmul", "of floor"] if has_flops else []
    header += ["ours is"]
    if on_cuda:
        header += ["L2 warm", "launches"]
    rows, remarks = [], []
    for case in document["cases"]:
        ours = case["ours"]
        for name, entry in case["providers"].items():
            if "ms" not in entry:
                remarks.append((case["name"], name, f"{entry['status']}: {entry.get('reason', '')}"))
                continue
            ms = entry["ms"][entry["headline"]]
            ratio = case["ratios"].get(ours, {}).get(name) if ours else None
            row = [
                case["name"],
                f"**{name}**" if name == ours else name,
                f"{duration(ms['p50'])} ({duration(ms['p20'])} to {duration(ms['p80'])})",
                f"{entry['gb_per_s']:.1f}",
                f"{entry['percent_of_copy']:.0f} %",
            ]
            if has_flops:
                row += [f"{entry['percent_of_matmul']:.0f} %", f"{entry['percent_of_floor']:.0f} %"]
            row.append(f"{ratio:.2f}x" if ratio else "")
            if on_cuda:
                warm = entry["ms"].get(entry["headline"].replace("cold", "warm"))
                row += [duration(warm["p50"]) if warm else "", str(entry.get("launches") or "")]
                if entry["headline"] != "graph_cold":
                    remarks.append((case["name"], name, f"uncaptured: {entry.get('not_captured', '')}"))
            rows.append(row)
    modes = "; ".join(f"{mode}: {MODE_TEXT[mode]}" for mode in document["modes"])
    parts = [f"## {document['bench']}", provenance(document), table(header, rows, left=2)]
    parts.append(
        "The time is the median of the first mode that a provider has; *ours is* compares medians of the same mode, "
        f'ours being what `backend="auto"` takes (bold). Modes: {modes}.'
    )
    if not on_cuda:
        parts.append("Beyond 100 %: the data were in the processor's caches, or the machine had other work meanwhile.")
    timed = [item for case in document["cases"] for item in case["providers"].items() if "ms" in item[1]]
    notes = {name: entry["note"] for name, entry in timed if entry["note"]}
    if notes:
        parts.append("\n".join(f"- {name}: {note}" for name, note in notes.items()))
    if remarks:
        parts.append("Not timed, or not as a graph:\n\n" + "\n".join(_merged(remarks)))
    if document["skipped_cases"]:
        parts.append("\n".join(f"- {case['name']}: skipped, {case['reason']}" for case in document["skipped_cases"]))
    return "\n\n".join(parts) + "\n"


def _merged(remarks: Sequence[tuple[str, str, str]]) -> list[str]:
    """One line for each provider and reason, with the number of cases where there are several."""
    cases: dict[tuple[str, str], list[str]] = {}
    for case, name, reason in remarks:
        cases.setdefault((name, reason), []).append(case)
    return [
        f"- {name} ({names[0] if len(names) == 1 else f'{len(names)} cases'}): {reason}"
        for (name, reason), names in cases.items()
    ]


def pyplot() -> Any:
    """matplotlib, drawing into files; None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


NO_PYPLOT = "matplotlib is not installed"


def plot(document: Mapping[str, Any], path: Path) -> str | None:
    """Draw the medians of all cases and providers; return the reason why not, if not."""
    plt = pyplot()
    if plt is None:
        return NO_PYPLOT
    cases = [case for case in document["cases"] if any("ms" in entry for entry in case["providers"].values())]
    if not cases:
        return "nothing was timed"
    names = list(dict.fromkeys(name for case in cases for name in case["providers"]))
    figure, axes = plt.subplots(figsize=(max(6.0, 0.45 * len(cases) + 4.0), 5.0), layout="constrained")
    places = range(len(cases))
    for name in names:
        entries = [case["providers"].get(name, {}) for case in cases]
        medians = [entry["ms"][entry["headline"]]["p50"] if "ms" in entry else float("nan") for entry in entries]
        if all(median != median for median in medians):
            continue
        is_ours = any(entry.get("ours") for entry in entries)
        axes.plot(places, medians, marker="o" if is_ours else "x", linestyle="-" if is_ours else ":", label=name)
    axes.plot(places, [case["floor_ms"] for case in cases], color="black", linewidth=1, label="floor")
    axes.set_yscale("log")
    axes.set_ylabel("milliseconds (median)")
    axes.set_xticks(places, [case["name"] for case in cases], rotation=60, ha="right", fontsize=8)
    axes.set_title(f"{document['bench']}, {document['environment']['device']['name']}", fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return None
