"""Make docs/cli.md, the reference of the command line, from its parser.

python -m bench.tools.cli_page           write the page
python -m bench.tools.cli_page --check   fail if the page is not what would be written
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from sequoia_kernels.cli import command_parser
from sequoia_kernels.documents import read_text, write_text

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
COMMAND = "python -m bench.tools.cli_page"

HEAD = f"""# The command line

Made from the parser by `{COMMAND}`; `sequoia-kernels COMMAND --help` says the same.

Results go to standard output, progress and logs to standard error, so `--json` can be piped. A file that is written
appears whole or not at all, and whether it can be written is checked before the work. Exit status: 0 done, 1 the work
failed, 2 a bad argument or file, 130 interrupted. [troubleshooting.md](troubleshooting.md) says what messages mean.

`T` and `D` are folders or hub ids of a target and a draft.
"""

TAIL = """## Environment

| variable | meaning |
|---|---|
| `SEQUOIA_CACHE` | `0` keeps no measurements on disk |
| `SEQUOIA_CACHE_DIR` | folder of the measurements, instead of `$XDG_CACHE_HOME/sequoia-kernels` |
| `SEQUOIA_HOST_ISA` | instruction set of native forwards, one of those that `doctor` lists |
| `SEQUOIA_SINGLE_LAUNCH` | `1` runs a forward of few rows as one launch of a GPU ([architecture.md](architecture.md)) |
| `HF_HUB_OFFLINE` | transformers' own: `1` asks no hub |

What the build reads stands in [CONTRIBUTING.md](../CONTRIBUTING.md#build).
"""


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parsers of the commands, in the order of --help."""
    (choices,) = (action for action in command_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(choices.choices)


def markdown() -> str:
    """The page."""
    parsers = commands()
    tables = {name: _groups(parser) for name, parser in parsers.items()}
    every = [table for groups in tables.values() for table in groups.items()]
    shared = {title: table for title, table in every if every.count((title, table)) > 1}
    parts = [HEAD, _index(parsers)]
    for name, parser in parsers.items():
        example = (parser.epilog or "").removeprefix("Example: ")
        parts.append(f"## {name}\n\n{parser.description}\n\n```bash\n{example}\n```\n")
        also = []
        for title, table in tables[name].items():
            if shared.get(title) == table:
                also.append(f"[{title}](#{_anchor(_heading(title))})")
            else:
                words = "" if title == "options" else f"{title[0].upper()}{title[1:]}:\n\n"
                parts.append(f"{words}{table}")
        parts.append(f"Also: {', '.join(also)}.\n")
    parts.append("## Options of several commands\n")
    for title, table in shared.items():
        names = ", ".join(f"`{name}`" for name in parsers if tables[name].get(title) == table)
        parts.append(f"### {_heading(title)}\n\nOf {names}.\n\n{table}")
    return "\n".join([*parts, TAIL])


def _index(parsers: dict[str, argparse.ArgumentParser]) -> str:
    lines = [f"| [`{name}`](#{name}) | {_cell(parser.description or '')} |" for name, parser in parsers.items()]
    return "\n".join(["| command | what it does |", "|---|---|", *lines, ""])


def _groups(parser: argparse.ArgumentParser) -> dict[str, str]:
    """The tables of a command's options by the title of their group."""
    found: dict[str, str] = {}
    alternatives = [
        action for group in parser._mutually_exclusive_groups if group.required for action in group._group_actions
    ]
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if not isinstance(action, argparse._HelpAction)]
        if actions:
            title = "options" if group.title in ("positional arguments", "options") else str(group.title)
            found[title] = found.get(title, "") + _table(actions, alternatives)
    return found


def _table(actions: Iterable[argparse.Action], alternatives: Iterable[argparse.Action]) -> str:
    lines = ["| option | meaning | default |", "|---|---|---|"]
    for action in actions:
        help_text = (action.help or "").replace("%%", "%")
        told = re.search(r" ?\(default: (.*?)\)", help_text)
        if told is not None:
            help_text = help_text.replace(told[0], "")
        default = "one of these is required" if action in alternatives else _default(action, told and told[1])
        lines.append(f"| {_option(action)} | {_cell(help_text)} | {default} |")
    return "\n".join([*lines, ""])


def _option(action: argparse.Action) -> str:
    value = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    if action.choices is not None:
        value = f"{{{','.join(map(str, action.choices))}}}"
    if not action.option_strings:
        return f"`{value}`, any number"
    words = "" if action.nargs == 0 else f" {value}" + (f" [{value} ...]" if action.nargs == "+" else "")
    return f"`{action.option_strings[0]}{words}`"


def _default(action: argparse.Action, told: str | None) -> str:
    if action.required and action.option_strings:
        return "required"
    if told is not None:
        return _cell(told)
    if action.nargs == 0:
        return "off"
    if action.default in (None, []):
        return "none"
    values = action.default if isinstance(action.default, list) else [action.default]
    return f"`{' '.join(str(value) if isinstance(value, str) else f'{value:g}' for value in values)}`"


def _cell(text: str) -> str:
    """A text for a cell: options and escapes that are not yet marked as code are."""
    pieces = text.split("`")
    pieces[::2] = (re.sub(r"(?<!\w)(--[a-z][a-z-]*|\\[nrt\\])", r"`\1`", piece) for piece in pieces[::2])
    return "`".join(pieces).replace("|", "\\|")


def _heading(title: str) -> str:
    """The heading of a group; what its title says in brackets goes with it."""
    return title[0].upper() + title[1:]


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def main() -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the page is out of date")
    args = parser.parse_args()
    if not args.check:
        write_text(PAGE, markdown())
        return 0
    if read_text(PAGE) == markdown():
        return 0
    print(f"{PAGE} is out of date: run {COMMAND}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
