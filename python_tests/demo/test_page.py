"""The demo's page: what it says is what the report says, it is well-formed, and a browser shows it on any screen."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support.processes import run_process

from sequoia_kernels.demo.page import demo_page
from sequoia_kernels.demo.page_style import DARK, LIGHT, MAX_TINT, NUM_SHADES, contrast, stylesheet
from sequoia_kernels.tree import TokenTree

VOID = {"meta", "br", "img", "input", "hr", "link"}
HOSTILE = "<script>alert('x')</script> & \"quoted\" </pre>\n"


SMALL = TokenTree.kary(2, 4)


def report(tree: TokenTree = SMALL, stages: bool = True, **changes: Any) -> dict[str, Any]:
    """What a demo reports, made up; `changes` replace fields of the first row."""
    accepted = [round(200 * share) for share in tree.node_values([0.6, 0.2, 0.1])]
    times = {"draft": 0.4, "sample": 0.01, "target": 2.1, "verify": 0.03, "commit": 0.004, "host": 0.02}
    row = {
        "temperature": 0.0,
        "nodes": tree.num_nodes,
        "levels": tree.num_levels,
        "autoregressive_tokens_per_second": 476.21,
        "speculative_tokens_per_second": 922.9,
        "speedup": 1.938,
        "predicted_speedup": 1.897,
        "predicted_speculative_tokens_per_second": 844.6,
        "tokens_per_step": sum(accepted) / 200,
        "predicted_tokens_per_step": 2.581,
        "step_ms": 2.764,
        "predicted_step_ms": 3.053,
        "autoregressive_step_ms": 2.1,
        "predicted_autoregressive_step_ms": 2.244,
        "greedy_output_identical": True,
        "rule": "sequoia",
        "parents": list(tree.parents),
        "steps": 200,
        "accepted_by_node": accepted,
        "stages_ms": times if stages else {},
        "autoregressive_stages_ms": {"target": 1.93, "verify": 0.03, "host": 0.02} if stages else {},
        "text": {
            "prompt": HOSTILE,
            "steps": [["first"], ["<b>", HOSTILE, " own"], ["\n    "], ["one ", "two\n"], []],
        },
    } | changes
    second = row | {"temperature": 1.0, "greedy_output_identical": None, "speculative_tokens_per_second": 790.4}
    return {
        "version": "0.0.0",
        "date": "2026-02-03T04:05:06+00:00",
        "device": "cpu: A <Processor> & more, 1 threads",
        "torch": "2.13.0",
        "target": "target<1>",
        "draft": "draft & co",
        "dtype": "float32",
        "new_tokens": 128,
        "num_prompts": 8,
        "top_p": 0.9,
        "seed": 0,
        "rows": [row, second],
        "plan": {},
    }


class Page(HTMLParser):
    """Reads a page, and finds tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.classes: list[list[str]] = []
        self.drafted: list[str] = []  # the texts that are marked so
        self.faults: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.classes.append((dict(attrs).get("class") or "").split())

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or (self.open.pop(), self.classes.pop())[0] != tag:
            self.faults.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append((tuple(self.open), data))
        if any("drafted" in names for names in self.classes):
            self.drafted.append(data)

    def text_in(self, tag: str) -> str:
        """All text within elements of a tag."""
        return "".join(text for inside, text in self.texts if tag in inside)


def with_temperatures(*temperatures: float) -> dict[str, Any]:
    """A report of other temperatures, the plain loop the faster one at the last."""
    document = report()
    rows = [document["rows"][0] | {"temperature": value, "greedy_output_identical": None} for value in temperatures]
    rows[-1]["autoregressive_tokens_per_second"] = 950.0
    return document | {"rows": rows}


REPORTS = {
    "one temperature": with_temperatures(0.7),
    "many temperatures": with_temperatures(1.0, 0.2, 0.4, 0.6, 0.8, 0.0, 0.2, 1.5),
    "tree": report(),
    "chain": report(TokenTree.chain(5)),
    "large tree": report(TokenTree.kary(3, 5)),
    "no speculation": report(TokenTree.single(), speedup=1.0),
    "slower": report(speedup=0.93),
    "not identical": report(greedy_output_identical=False),
    "no stages": report(stages=False),
}


@pytest.mark.parametrize("document", REPORTS.values(), ids=REPORTS.keys())
def test_it_is_well_formed_and_loads_nothing(document):
    text = demo_page(document)
    page = Page(text)
    assert page.faults == [] and page.open == []
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) == 1 + len(document["rows"])
    for _, attributes in page.tags:
        assert attributes.get("aria-labelledby", ids[0]) in ids
        assert not {"src", "href", "srcset", "data", "onload"} & attributes.keys()
    assert not {"script", "link", "iframe", "object", "img", "image", "use"} & {tag for tag, _ in page.tags}
    assert not re.search(r"url\(|@import|@font-face", text)
    used = set(re.findall(r"var\(--([\w-]+)\)", text))
    assert used <= set(re.findall(r"--([\w-]+):", text))  # every colour has a value


def test_texts_are_escaped_and_whole():
    document = report()
    page = Page(demo_page(document))
    row = document["rows"][0]
    written = "".join(text for inside, text in page.texts if "pre" in inside)
    expected = row["text"]["prompt"] + "".join(piece for step in row["text"]["steps"] for piece in step)
    assert written == 2 * expected  # of both temperatures
    everything = "".join(text for _, text in page.texts)
    assert "A <Processor> & more, 1 thread" in everything and "1 threads" not in everything
    assert "target<1>, draft draft & co, float32" in everything
    assert "3 February 2026, 04:05" in everything


def test_steps_are_marked_by_what_they_gave():
    page = Page(demo_page(report()))
    steps = [attributes for tag, attributes in page.tags if "step" in (attributes.get("class") or "").split()]
    told = [attributes["title"] for attributes in steps if "title" in attributes]
    first = ["step 1: 3 tokens, 2 of them from the draft", "step 2: 1 token, 0 of them from the draft",
             "step 3: 2 tokens, 1 of them from the draft"]  # fmt: skip
    assert told == 2 * first
    assert [attributes["class"] for attributes in steps if "title" in attributes][:3] == [
        "step n3",
        "step n1",
        "step n2",
    ]
    many = report(text={"prompt": "", "steps": [["x"], ["y"] * 9]})
    assert f'class="step n{MAX_TINT}" title="step 1: 9 tokens' in demo_page(many)
    assert "".join(page.drafted) == 2 * ("underlined<b>" + HOSTILE + "one ")  # the legend, and the first two of three


@pytest.mark.parametrize("tree", [TokenTree.kary(2, 4), TokenTree.kary(3, 5), TokenTree.single()])
def test_every_node_is_there_with_its_counts(tree):
    document = report(tree)
    row = document["rows"][0]
    page = demo_page(document)
    titles = Counter(re.findall(r"<title>(node \d+: accepted in \d+ of \d+ steps, )", page))
    assert titles == {
        f"node {node}: accepted in {row['accepted_by_node'][node]} of 200 steps, ": 2 for node in range(tree.num_nodes)
    }
    assert page.count("<circle") == 2 * tree.num_nodes + 2 * 2  # in both trees, and the chart's points and rings


def test_the_numbers_are_those_of_the_report():
    document = report()
    first, second = document["rows"]
    text = demo_page(document)
    cells = [re.findall(r"<td>([^<]*)</td>", line) for line in re.findall(r"<tr class=\"(?:first|inner).*?</tr>", text)]
    names = ("tokens_per_step", "step_ms", "autoregressive_step_ms", "speculative_tokens_per_second", "speedup")
    expected = [
        [first["predicted_" + name] for name in names],
        [first[name] for name in names],
        [second["predicted_" + name] for name in names],
        [second[name] for name in names],
    ]
    shown = [[float(cell.rstrip("×")) for cell in row[-5:]] for row in cells]
    for got, wanted in zip(shown, expected, strict=True):
        assert got == pytest.approx(wanted, abs=0.5) and got[:3] == pytest.approx(wanted[:3], abs=0.0051)
        assert got[4] == pytest.approx(wanted[4], abs=0.0051)
    assert "<em>1.94×</em> as fast as plain decoding" in text
    assert "temperature 0: 923 with the tree, 476 plain; temperature 1: 790 with the tree, 476 plain" in text
    stages = dict(re.findall(r"</span>(\w+)<span class=\"faint\">.*?</th>((?:<td>[^<]*</td>)+)", text)[:7])
    assert stages["target"] == "<td>1.93</td><td>2.10</td>" and stages["draft"] == "<td>–</td><td>0.40</td>"
    assert stages["other"] == f"<td>{2.1 - 1.98:.2f}</td><td>{2.764 - 2.564:.2f}</td>"


def test_it_says_when_speculation_does_not_pay():
    assert "Here plain decoding is the fastest" in demo_page(REPORTS["no speculation"])
    assert "<em>0.93×</em> the speed of plain decoding" in demo_page(REPORTS["slower"])
    assert "NOT the same" in demo_page(REPORTS["not identical"]) and "NOT" not in demo_page(REPORTS["tree"])
    assert "Stages are timed on a CPU" in demo_page(REPORTS["no stages"])


def test_colours_can_be_read():
    for colours in (LIGHT, DARK):
        for paper in ("page", "card"):
            for ink in ("ink", "faint", "accent"):
                assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)
        for count in range(1, MAX_TINT + 1):
            assert contrast(colours["ink"], colours[f"tint-{count}"]) >= 4.5, count
        assert contrast(colours["plain"], colours["card"]) >= 3  # a line
    for theme in stylesheet().split("prefers-color-scheme:dark"):
        shades, inks = (re.findall(rf"--{name}-\d+:(#\w+)", theme) for name in ("shade", "on"))
        assert len(shades) == NUM_SHADES
        assert min(map(contrast, shades, inks)) >= 4.3  # of labels in nodes; black and white cannot always give more
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#777777") == 1


# ---- in a browser ----

WIDTHS = (360, 390, 768, 1024, 1440, 1600)

# Shows the page in a frame of every width and tells what it looks like. The frame has the page's own origin.
MEASURE = """
const rgb = text => text.match(/[\\d.]+/g).map(Number);
const luminance = text => rgb(text).slice(0, 3).map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
function background(element) {
  for (let e = element; e; e = e.parentElement) {
    const colour = getComputedStyle(e).backgroundColor;
    if ((rgb(colour)[3] ?? 1) > 0) return colour;
  }
  return "rgb(255, 255, 255)";
}
function look(frame, width) {
  const page = frame.contentDocument, view = frame.contentWindow;
  let least = 99, where = "";
  for (const element of page.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (!own || element.closest("svg") || element.tagName === "STYLE") continue;
    const pair = [luminance(view.getComputedStyle(element).color), luminance(background(element))];
    const contrast = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (contrast < least) [least, where] = [contrast, element.outerHTML.slice(0, 120)];
  }
  return {width, inner: view.innerWidth, scroll: page.documentElement.scrollWidth, least, where,
    ink: view.getComputedStyle(page.body).color, paper: view.getComputedStyle(page.body).backgroundColor,
    loaded: view.performance.getEntriesByType("resource").map(entry => entry.name),
    textHeight: page.querySelector("pre.text").getBoundingClientRect().height};
}
addEventListener("load", () => {
  const looks = [...document.querySelectorAll("iframe")].map(frame => look(frame, frame.width | 0));
  document.body.innerHTML = "<output></output>";
  document.querySelector("output").textContent = JSON.stringify(looks);
});
"""


def dump_dom(browser: str, address: str, folder: Path, *options: str) -> str:
    """The document that a browser has after it ran a page."""
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
               f"--user-data-dir={folder / 'profile'}", *options, "--dump-dom", address]  # fmt: skip
    return run_process(command, check=False, timeout=120).stdout


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A Chromium that works here."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on the PATH")
    folder = tmp_path_factory.mktemp("browser")
    trial = folder / "trial.html"
    trial.write_text("<p>it works</p>", encoding="utf-8")
    if "it works" not in dump_dom(found, trial.as_uri(), folder):
        pytest.skip(f"{found} shows no page here")
    return found


def looks(browser: str, page: str, folder: Path, dark: bool) -> list[dict[str, Any]]:
    """How the page looks at every width."""
    frames = "".join(f'<iframe width="{width}" height="900" srcdoc="{escape(page)}"></iframe>' for width in WIDTHS)
    wrapper = folder / "wrapper.html"
    wrapper.write_text(
        '<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        f"<style>iframe{{border:0}}</style><body>{frames}<script>{MEASURE}</script>",
        encoding="utf-8",
    )
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    found = re.search(r"<output>(.*?)</output>", dump_dom(browser, wrapper.as_uri(), folder, scheme), re.DOTALL)
    assert found, "the page was not measured"
    return json.loads(Page(found[0]).text_in("output"))


BROWSED = ("tree", "large tree", "no speculation", "no stages", "many temperatures")


@pytest.mark.parametrize("name", BROWSED)
def test_a_browser_shows_it_on_every_screen(name, browser, tmp_path):
    page = demo_page(REPORTS[name])
    light, dark = (looks(browser, page, tmp_path, is_dark) for is_dark in (False, True))
    assert [entry["width"] for entry in light] == list(WIDTHS)
    for entry in (*light, *dark):
        assert entry["inner"] == entry["width"] and entry["scroll"] <= entry["inner"], entry
        assert entry["least"] >= 4.5, entry
        assert entry["loaded"] == [] and entry["textHeight"] > 40, entry
    for day, night in zip(light, dark, strict=True):
        assert day["ink"] != night["ink"] and day["paper"] != night["paper"]


def test_the_browsers_check_finds_what_is_wrong(browser, tmp_path):
    page = demo_page(report())
    wide = page.replace("<footer", '<div style="width:1700px">wide</div><footer')
    assert all(entry["scroll"] > entry["inner"] for entry in looks(browser, wide, tmp_path, False))
    pale = page.replace("<footer", '<p style="color:#bbbbbb">pale</p><footer')
    assert all(entry["least"] < 4.5 and "pale" in entry["where"] for entry in looks(browser, pale, tmp_path, False))
