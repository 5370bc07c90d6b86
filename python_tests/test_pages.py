"""The pages: their code is code that runs, and their links lead somewhere."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
import textwrap
from pathlib import Path

import pytest
from support.examples import EXAMPLES

from bench.tools import cli_page
from sequoia_kernels.cli import command_parser

REPOSITORY = EXAMPLES.parent
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
OWN_LOOP = REPOSITORY / "docs" / "own_loop.md"


def code_blocks(page: Path) -> list[str]:
    """The Python of a page, block by block."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def stretches(source: str, num_lines: int) -> set[str]:
    """Every stretch of so many lines, as far to the left as it goes."""
    lines = source.splitlines(keepends=True)
    return {textwrap.dedent("".join(lines[start : start + num_lines])) for start in range(len(lines) - num_lines + 1)}


def test_the_code_of_own_loops_is_that_of_the_examples() -> None:
    sources = [path.read_text(encoding="utf-8") for path in sorted(EXAMPLES.glob("*.py"))]
    blocks = code_blocks(OWN_LOOP)
    assert len(blocks) > 8
    strange = [block for block in blocks if not any(block in stretches(code, block.count("\n")) for code in sources)]
    assert strange == []


def test_every_example_is_on_the_page() -> None:
    text = OWN_LOOP.read_text(encoding="utf-8")
    assert [path.name for path in sorted(EXAMPLES.glob("*.py")) if path.name not in text] == []


def test_every_name_of_interop_is_on_the_page() -> None:
    interop = importlib.import_module("sequoia_kernels.interop")
    functions = [name for name in interop.__all__ if name[0].islower()]
    assert [name for name in functions if name not in OWN_LOOP.read_text(encoding="utf-8")] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_parses_and_imports_what_there_is(page: Path) -> None:
    for block in code_blocks(page):
        try:
            tree = ast.parse(block)
        except SyntaxError:  # the end of a function
            tree = ast.parse("def function():\n" + textwrap.indent(block, "    "))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def heading_anchors(page: Path) -> set[str]:
    """How links name the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in heading_anchors(target)):
            broken.append(link)
    assert broken == []


# ---- docs/cli.md ----


def test_the_reference_of_the_command_line_is_what_the_parser_says() -> None:
    page = (REPOSITORY / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == cli_page.markdown(), f"docs/cli.md is out of date: run {cli_page.COMMAND}"


def test_the_reference_has_every_option_with_words_and_every_example_parses() -> None:
    page = cli_page.markdown()
    parsers = cli_page.commands()
    assert len(parsers) > 7
    for name, parser in parsers.items():
        example = shlex.split(re.findall(rf"^## {name}\n.*?^```bash\nsequoia-kernels (.*?)\n```", page, re.M | re.S)[0])
        assert command_parser().parse_args(example).command == example[0] == name
        for action in parser._actions:
            if not isinstance(action, argparse._HelpAction):
                assert action.help, f"{name} {action.dest} has no help"
                assert f"| `{(action.option_strings or [action.dest])[0]}" in page
