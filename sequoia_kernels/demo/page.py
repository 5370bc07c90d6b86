"""The page of `sequoia-kernels demo --html`: one HTML file made from the command's JSON document and nothing else.

It loads nothing and needs no script. Every text of models and prompts is escaped.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from sequoia_kernels.demo.page_style import MAX_TINT, NUM_SHADES, stylesheet
from sequoia_kernels.tree import TokenTree
from sequoia_kernels.tree.drawing import Look, make_picture, render_svg, shade

__all__ = ["demo_page"]

STAGES = {  # in the order in which they are drawn
    "target": "the target's forward",
    "draft": "the draft's forwards",
    "sample": "drawing the tree's tokens",
    "verify": "deciding which stay",
    "commit": "moving their keys and values",
    "host": "reading the tokens, printing",
    "other": "between the stages",
}
WIDE_TREE = 500  # pixels from which a tree gets a row of its own


def demo_page(report: Mapping[str, Any]) -> str:
    """Make the page of a demo.

    Args:
        report: what `sequoia-kernels demo --json` prints.

    Returns:
        An HTML document.

    Example:
        >>> import json, pathlib
        >>> report = json.loads(pathlib.Path("demo.json").read_text())  # doctest: +SKIP
        >>> pathlib.Path("demo.html").write_text(demo_page(report))  # doctest: +SKIP
    """
    rows = report["rows"]
    sections = [_head(report), _results(report), *(_temperature(row, index) for index, row in enumerate(rows))]
    title = f"sequoia-kernels demo: {_speedup(rows[0])} on {_machine(report)}"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{stylesheet()}</style>",
            "</head>",
            "<body>",
            "<main>",
            *sections,
            _foot(report),
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


# ---- what it says first


def _head(report: Mapping[str, Any]) -> str:
    row = report["rows"][0]
    at = _at(row)
    shape = "chain" if row["nodes"] == row["levels"] else "tree"
    if row["nodes"] == 1:
        heading = "Here plain decoding is the fastest"
        lead = f"The planner found no tree that would pay on this machine {at}, and says so."
    elif row["speedup"] >= 1:
        heading = f"<em>{_speedup(row)}</em> as fast as plain decoding"
        lead = (
            f"A step of the target gave {row['tokens_per_step']:.2f} tokens instead of one {at}: a small draft "
            f"proposes a {shape} of tokens, the target checks all of them in one forward."
        )
    else:
        heading = f"<em>{_speedup(row)}</em> the speed of plain decoding"
        lead = f"The tree did not pay on this machine {at}, though the planner had expected it to."
    sameness = {
        True: "The text is the same, token for token.",
        False: "The text is NOT the same as plain decoding's everywhere; near-ties of floating-point numbers can do "
        "that.",
        None: "Tokens are distributed exactly as the target alone would draw them.",
    }[row["greedy_output_identical"]]
    date = datetime.datetime.fromisoformat(report["date"])
    models = report["target"]
    if report["draft"] != report["target"]:
        models += f", draft {report['draft']}"
    facts = {
        "Machine": _machine(report),
        "Models": f"{models}, {report['dtype']}",
        "Date": f"{date.day} {date:%B %Y, %H:%M}",
    }
    told = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return (
        f'<header>\n<p class="name">sequoia-kernels demo</p>\n<h1>{heading}</h1>\n'
        f'<p class="lead">{lead} {sameness}</p>\n<dl class="meta">{told}</dl>\n</header>'
    )


def _results(report: Mapping[str, Any]) -> str:
    rows = report["rows"]
    row = rows[0]
    tiles = [
        (
            "with the tree", f"{row['speculative_tokens_per_second']:.0f}",
            f"tokens per second; predicted {row['predicted_speculative_tokens_per_second']:.0f}", "tile main",
        ),
        ("plain decoding", f"{row['autoregressive_tokens_per_second']:.0f}", "tokens per second", "tile"),
        (
            "a step gives", f"{row['tokens_per_step']:.2f}",
            f"tokens; predicted {row['predicted_tokens_per_step']:.2f}", "tile main",
        ),
        ("the tree", f"{row['nodes']}", f"{_nodes(row)} on {_count(row['levels'], 'level')}", "tile"),
    ]  # fmt: skip
    shown = "".join(
        f'<div class="{kind}"><dt>{name}</dt><dd class="figure">{figure}</dd><dd class="note">{note}</dd></div>'
        for name, figure, note, kind in tiles
    )
    prompts = _count(report["num_prompts"], "prompt")
    return (
        '<section aria-labelledby="results">\n<h2 id="results">Plain decoding and the tree</h2>\n'
        f'<div class="columns two">\n<div class="card"><h3>{_temperature_words(row)}</h3>\n'
        f'<p class="faint">{prompts} of {report["new_tokens"]} new tokens, timed with and without in turn</p>\n'
        f'<dl class="tiles">{shown}</dl></div>\n{_chart(rows)}\n'
        f'<div class="card across">{_table(rows)}</div>\n</div>\n</section>'
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = ("tokens_per_step", "step_ms", "autoregressive_step_ms", "speculative_tokens_per_second", "speedup")
    lines = []
    for row in rows:
        for label, prefix in (("predicted", "predicted_"), ("measured", "")):
            values = [row[prefix + name] for name in names]
            cells = [f"{value:.2f}" for value in values[:3]] + [f"{values[3]:.0f}", f"{values[4]:.2f}×"]
            first = prefix != ""
            temperature, size = (f"{row['temperature']:g}", f"{row['nodes']} × {row['levels']}") if first else ("", "")
            lines.append(
                f'<tr class="{"first" if first else "inner total"}"><td>{temperature}</td><td class="roomy">{size}</td>'
                f'<th scope="row" class="left">{label}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
            )
    head = '<th scope="col">T</th><th scope="col" class="roomy">nodes × levels</th><td></td>' + "".join(
        f'<th scope="col">{name}</th>' for name in ("tokens / step", "ms / step", "plain ms", "tokens / s", "speedup")
    )
    return _scrolling(
        "The predicted and the measured speed, a temperature in two rows",
        "<table><caption>Predicted by the planner from measured times and acceptance, and measured</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>",
    )


def _chart(rows: Sequence[Mapping[str, Any]]) -> str:
    """Speed over temperature: two lines, their values at the points, the prediction as rings."""
    ordered = sorted(rows, key=lambda row: row["temperature"])
    width, height, left, right, top, bottom = 400, 236, 8, 56, 30, 44
    series = {
        "tree": ("speculative_tokens_per_second", "accent", "tree"),
        "plain": ("autoregressive_tokens_per_second", "plain", "plain"),
    }
    predicted = "predicted_speculative_tokens_per_second"
    most = max(max(row[name] for name, _, _ in series.values()) for row in ordered)
    most = 1.08 * max(most, *(row[predicted] for row in ordered)) or 1.0
    lowest, highest = ordered[0]["temperature"], ordered[-1]["temperature"]

    def x_of(row: Mapping[str, Any]) -> float:
        share = 0.5 if highest == lowest else (row["temperature"] - lowest) / (highest - lowest)
        return left + 14 + share * (width - left - right - 28)

    def y_of(value: float) -> float:
        return height - bottom - value / most * (height - top - bottom)

    told = "; ".join(
        f"temperature {row['temperature']:g}: {row[series['tree'][0]]:.0f} with the tree, "
        f"{row[series['plain'][0]]:.0f} plain"
        for row in ordered
    )
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Tokens per second. {escape(told)}">',
        f'<line x1="{left}" x2="{width - right}" y1="{height - bottom}" y2="{height - bottom}" stroke="var(--rule)"/>',
    ]
    for row in ordered:
        parts.append(
            f'<text x="{x_of(row):.1f}" y="{height - bottom + 18}" font-size="13" text-anchor="middle" '
            f'fill="var(--faint)">{row["temperature"]:g}</text>'
        )
    parts.append(
        f'<text x="{left + (width - left - right) / 2:.1f}" y="{height - 6}" font-size="13" text-anchor="middle" '
        'fill="var(--faint)">temperature</text>'
    )
    few = len(ordered) <= 6
    for key, (name, colour, label) in series.items():
        other = series["plain" if key == "tree" else "tree"][0]
        points = [(x_of(row), y_of(row[name])) for row in ordered]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        dash = "" if key == "tree" else ' stroke-dasharray="5 4"'
        parts.append(f'<path d="M{path}" fill="none" stroke="var(--{colour})" stroke-width="2"{dash}/>')
        for row, (x, y) in zip(ordered, points):
            title = f"<title>{label}, temperature {row['temperature']:g}: {row[name]:.0f} tokens per second</title>"
            if key == "tree":
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="var(--{colour})">{title}</circle>')
            else:
                parts.append(
                    f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="var(--{colour})">{title}</rect>'
                )
            if few:
                above = row[name] > row[other] or (row[name] == row[other] and key == "tree")
                parts.append(
                    f'<text x="{x:.1f}" y="{y + (-12 if above else 21):.1f}" font-size="14" font-weight="600" '
                    f'text-anchor="middle" fill="var(--ink)">{row[name]:.0f}</text>'
                )
    for row in ordered:
        parts.append(
            f'<circle cx="{x_of(row):.1f}" cy="{y_of(row[predicted]):.1f}" r="7.5" fill="none" stroke="var(--ink)" '
            f'stroke-width="1.3"><title>predicted, temperature {row["temperature"]:g}: {row[predicted]:.0f} tokens per '
            "second</title></circle>"
        )
    ends = {key: y_of(ordered[-1][name]) for key, (name, _, _) in series.items()}
    upper = min(ends, key=lambda key: ends[key])
    lower = "plain" if upper == "tree" else "tree"
    ends[lower] = max(ends[lower], ends[upper] + 18)
    for key, y in ends.items():
        parts.append(
            f'<text x="{x_of(ordered[-1]) + 16:.1f}" y="{y + 4.5:.1f}" font-size="13" font-weight="600" '
            f'fill="var(--{"accent" if key == "tree" else "faint"})">{series[key][2]}</text>'
        )
    parts.append("</svg>")
    return (
        '<figure class="card chart"><h3>Speed over temperature</h3>\n'
        '<p class="faint">tokens per second; a ring is what the planner predicted</p>\n' + "".join(parts) + "</figure>"
    )


# ---- a temperature


def _temperature(row: Mapping[str, Any], index: int) -> str:
    tree, wide = _tree(row)
    text, stages = _text(row), _stages(row)
    across = " across" if wide else ""
    return (
        f'<section aria-labelledby="temperature-{index}">\n'
        f'<h2 id="temperature-{index}">{_temperature_words(row)}</h2>\n'
        f'<div class="columns text">\n<div class="card{across}">{text}</div>\n<figure class="card tree{across}">{tree}'
        f'</figure>\n<div class="card across">{stages}</div>\n</div>\n</section>'
    )


def _text(row: Mapping[str, Any]) -> str:
    steps = row["text"]["steps"]
    shown = [f'<span class="prompt">{_readable(row["text"]["prompt"])}</span>', _readable("".join(steps[0]))]
    counts: dict[int, int] = {}
    for number, texts in enumerate(steps[1:], start=1):
        if not texts:
            continue  # behind the last token that was asked for
        counts[len(texts)] = counts.get(len(texts), 0) + 1
        drafted, bonus = "".join(texts[:-1]), texts[-1]
        inside = (f'<span class="drafted">{_readable(drafted)}</span>' if drafted else "") + _readable(bonus)
        told = f"step {number}: {_count(len(texts), 'token')}, {len(texts) - 1} of them from the draft"
        shown.append(f'<span class="step n{min(len(texts), MAX_TINT)}" title="{told}">{inside}</span>')
    most = max(counts.values(), default=1)
    total = max(sum(counts.values()), 1)
    bars = "".join(
        f"<span>{_count(size, 'token')}</span>"
        f'<span class="bar n{min(size, MAX_TINT)}" style="width:{100 * counts[size] / most:.1f}%"></span>'
        f'<span class="share">{_count(counts[size], "step")}, {100 * counts[size] / total:.0f}%</span>'
        for size in sorted(counts)
    )
    return (
        "<h3>The text, step by step</h3>\n"
        '<p class="faint">Each box is one step of the target. The more tokens it gave, the deeper its colour.</p>\n'
        '<ul class="legend"><li><span class="prompt">grey</span> prompt</li>'
        '<li><span class="key step n2"><span class="drafted">underlined</span></span> '
        "guessed by the draft, and kept</li>"
        '<li><span class="key step n1">not underlined</span> the target’s own token</li></ul>\n'
        f'<pre class="text">{"".join(shown)}</pre>\n'
        f'<div class="counts"><span class="wide">How many tokens the steps of this text gave</span>{bars}</div>'
    )


def _tree(row: Mapping[str, Any]) -> tuple[str, bool]:
    """The tree's picture and numbers, and whether it is too wide to stand beside the text."""
    tree = TokenTree(row["parents"])
    steps = max(row["steps"], 1)
    counts = row["accepted_by_node"]
    shares = [count / steps for count in counts]
    titles = [
        f"node {node}: accepted in {counts[node]} of {row['steps']} steps, {_percent(share)}"
        for node, share in enumerate(shares)
    ]
    look = Look(
        ink="var(--ink)", faint_ink="var(--faint)", guide="var(--band)",
        colour=lambda value: f"var(--shade-{_shade_index(value)})",
        label_ink=lambda value: f"var(--on-{_shade_index(value)})",
        heading=f"{_count(tree.num_nodes, 'node')}, {_count(tree.num_levels, 'level')}, "
        f"{row['tokens_per_step']:.2f} tokens per step",
        legend="share of steps", labels=[_percent(share) for share in shares], titles=titles,
    )  # fmt: skip
    picture = make_picture(tree, shares, look)
    least = min(picture.width, max(300.0, 0.6 * picture.width))
    svg = render_svg(picture, paper="none").replace(
        "<svg ", f'<svg role="img" style="width:100%;min-width:{least:.0f}px;max-width:{picture.width:.0f}px" ', 1
    )
    svg = svg.replace("<title>", "<title>The tree: ", 1)
    lines = "".join(
        f"<tr><td>{node}</td><td>{'' if node == 0 else tree.parents[node]}</td><td>{tree.depths[node]}</td>"
        f"<td>{counts[node]}</td><td>{_percent(shares[node])}</td></tr>"
        for node in range(tree.num_nodes)
    )
    numbers = (
        '<table><thead><tr><th scope="col">node</th><th scope="col">below</th><th scope="col">level</th>'
        '<th scope="col">steps</th><th scope="col">share</th></tr></thead>'
        f"<tbody>{lines}</tbody></table>"
    )
    return (
        "<h3>How often each node of the tree was accepted</h3>\n"
        f'<p class="faint">In {row["steps"]} steps on all prompts. Node 0, the newest token, is in every step; what is '
        "accepted is one path from it, and the target’s own token comes on top.</p>\n"
        + _scrolling("The tree", svg)
        + f"<details><summary>The numbers, node by node</summary>{_scrolling('Acceptance by node', numbers)}</details>",
        picture.width > WIDE_TREE,
    )


def _stages(row: Mapping[str, Any]) -> str:
    runs = {
        "plain": (row["autoregressive_stages_ms"], row["autoregressive_step_ms"], "1 token"),
        "tree": (row["stages_ms"], row["step_ms"], f"{row['tokens_per_step']:.2f} tokens"),
    }
    times = {name: _with_rest(stages, step) for name, (stages, step, _) in runs.items()}
    longest = max(step for _, step, _ in runs.values()) or 1.0
    bars = []
    for name, (stages, step, tokens) in runs.items():
        parts = times[name] if stages else {"other": step}
        pieces = "".join(
            f'<i style="width:{100 * ms / step:.2f}%;background:var(--stage-{stage})" title="{stage}: {ms:.3f} ms"></i>'
            for stage, ms in parts.items()
            if ms > 0 and step > 0
        )
        bars.append(
            f"<div><strong>{name}</strong> {step:.2f} ms for {tokens}</div>"
            f'<div class="length" style="width:{100 * step / longest:.1f}%">{pieces}</div>'
        )
    heading = (
        "<h3>Where the time of a step goes</h3>\n"
        '<p class="faint">Milliseconds of one step, to the same scale; the tree’s step gives more tokens.</p>\n'
    )
    chart = f'<div class="bars">{"".join(bars)}</div>'
    if not row["stages_ms"]:  # an asynchronous device
        return heading + chart + '<p class="faint">Stages are timed on a CPU; a GPU’s step is captured as a whole.</p>'
    lines = "".join(
        f'<tr><th scope="row" class="left"><span class="swatch" style="background:var(--stage-{stage})"></span>{stage}'
        f'<span class="faint">, {meaning}</span></th><td>{_ms(times["plain"], stage)}</td>'
        f"<td>{_ms(times['tree'], stage)}</td></tr>"
        for stage, meaning in STAGES.items()
        if any(part.get(stage) for part in times.values())
    )
    whole = f"<td>{runs['plain'][1]:.2f}</td><td>{runs['tree'][1]:.2f}</td>"
    table = (
        '<table><thead><tr><th scope="col" class="left">stage</th><th scope="col">plain, ms</th>'
        '<th scope="col">tree, ms</th></tr></thead>'
        f'<tbody>{lines}<tr class="total"><th scope="row" class="left">a step</th>{whole}</tr></tbody></table>'
    )
    return f'{heading}<div class="split">{chart}{_scrolling("Times by stage", table)}</div>'


def _with_rest(stages: Mapping[str, float], step_ms: float) -> dict[str, float]:
    """The times of the stages in the order in which they are drawn, and what is left of the step."""
    known = {name: stages[name] for name in STAGES if name in stages}
    return known | {"other": max(step_ms - sum(known.values()), 0.0)}


def _ms(times: Mapping[str, float], stage: str) -> str:
    return f"{times[stage]:.2f}" if times.get(stage) else "–"


def _foot(report: Mapping[str, Any]) -> str:
    top_p = "" if report["top_p"] is None else f", top-p {report['top_p']:g}"
    return (
        '<footer class="faint"><p>Made by <code>sequoia-kernels demo --html</code>, sequoia-kernels '
        f"{escape(report['version'])}, torch {escape(report['torch'])}; seed {report['seed']}{top_p}. Texts and trees "
        "are of the run that was timed. Acceptance for the plan was measured on the same prompts with another tree. "
        "Method: Sequoia, arXiv 2402.12374.</p></footer>"
    )


# ---- words and numbers


def _scrolling(label: str, content: str) -> str:
    """What may be wider than a narrow page: it scrolls by itself."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{content}</div>'


def _readable(text: str) -> str:
    """Escape a text; line ends get a visible sign, which is no part of the text."""
    return escape(text).replace("\n", '<span class="break">\n</span>')


def _machine(report: Mapping[str, Any]) -> str:
    return re.sub(r"\b1 threads$", "1 thread", report["device"])


def _temperature_words(row: Mapping[str, Any]) -> str:
    return f"Temperature {row['temperature']:g}" + (", greedy" if row["temperature"] == 0 else "")


def _at(row: Mapping[str, Any]) -> str:
    return f"at temperature {row['temperature']:g}"


def _speedup(row: Mapping[str, Any]) -> str:
    return f"{row['speedup']:.2f}×"


def _nodes(row: Mapping[str, Any]) -> str:
    return "node" if row["nodes"] == 1 else "nodes"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _percent(share: float) -> str:
    if share == 0 or share >= 0.005:
        return f"{100 * share:.0f}%"
    return "<1%"


def _shade_index(value: float) -> int:
    return round(shade(value) * (NUM_SHADES - 1))
