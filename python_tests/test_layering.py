"""The laws of the house: imports go one way, one stem names everything that belongs to an op, csrc knows no torch."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import sequoia_kernels

PACKAGE = Path(sequoia_kernels.__file__).parent
REPOSITORY = Path(__file__).resolve().parents[1]
OPS = [
    "compact_kv_cache_",
    "sample_without_replacement",
    "tree_attention",
    "verify_tree",
    "warped_logsumexp",
]

# What each room may import. A name with a dot allows that module only; every room may import itself.
SHARED = {
    "errors",
    "version",
    "documents",
    "checks",
    "cuda_graphs",
    "fingerprints",
    "guard",
    "parallel",
    "rng",
    "vocabularies",
}
NATIVE = {"_host", "_cuda"}
ALLOWED = {
    "errors": set(),
    "version": set(),
    "documents": set(),
    "checks": {"documents"},
    "guard": set(),
    "cuda_graphs": {"guard"},
    "fingerprints": set(),
    "host_module": {"_host"},
    "parallel": {"errors"},
    "rng": SHARED,
    "vocabularies": {"checks"},
    "tree": {"errors", "documents", "checks"},
    "ops": SHARED | NATIVE | {"tree"},
    "interop": SHARED | {"tree", "ops"},
    "planner": {"errors", "documents", "checks", "fingerprints", "tree", "host_module"},
    "models": SHARED | {"tree", "ops", "host_module", "_cuda"},
    "offload": SHARED | {"tree", "ops", "models"},
    # The planner reads profiles and measure writes them; the trees that are timed are optimal ones. What a layer takes
    # beyond its parts is found with the planner's own way of adding parts up.
    "measure": SHARED | {"tree", "ops", "models", "drafts", "planner.profile", "planner.search", "planner.compose"},
    "drafts": SHARED | {"tree", "ops", "models", "host_module"},
    "decoding": SHARED | {"tree", "ops", "models", "drafts", "offload", "planner", "measure", "host_module"},
}
# At the top of the house: they may import anything, and only one another may import them.
ENTRANCES = {"__init__", "__main__", "cli", "demo", "hf", "vllm"}


def imported_modules(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute dotted name) of every import in a module, those inside functions included.

    `from a import b` gives `a.b`: whether b is a module or a name in it makes no difference to the laws.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".") if is_package else module.split(".")[:-1]
                parents = parents[: len(parents) - (node.level - 1)]
                base = ".".join(parents + ([node.module] if node.module else []))
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def room_path(dotted: str) -> str | None:
    """Return where an imported name of the package is defined, as a path without `sequoia_kernels`; None for others."""
    parts = dotted.split(".")
    if parts[0] != "sequoia_kernels" or parts[1:] in ([], ["*"], ["__version__"]):
        return None
    room = sequoia_kernels._ROOM_OF.get(parts[1]) if len(parts) == 2 else None
    parts = [room, parts[1]] if room else parts[1:]
    if len(parts) == 2 and parts[1] in reexports(parts[0]):
        parts.insert(1, reexports(parts[0])[parts[1]])
    return ".".join(parts)


@functools.cache
def reexports(room: str) -> dict[str, str]:
    """Return name -> module of the room, for the names that a room's __init__ imports from its own modules."""
    path = PACKAGE / room / "__init__.py"
    if not path.is_file():
        return {}
    found = {}
    own = f"sequoia_kernels.{room}."
    for _, dotted in imported_modules(ast.parse(path.read_text(encoding="utf-8")), own[:-1], is_package=True):
        module, _, name = dotted.removeprefix(own).rpartition(".")
        if dotted.startswith(own) and module:
            found[name] = module
    return found


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Return the imports of one module that break the laws, as readable lines."""
    own = module.split(".")[1:] or ["__init__"]
    found = []
    for line, dotted in imported_modules(ast.parse(source), module, is_package):
        path = room_path(dotted)
        if path is None:
            continue
        room = path.split(".")[0]
        if own[0] in ENTRANCES:
            continue
        if room != own[0]:
            allowed = any(path == name or path.startswith(f"{name}.") for name in ALLOWED.get(own[0], set()))
            if not allowed:
                found.append(f"{module}:{line} ({own[0]}) must not import {path}")
        elif room == "ops" and len(own) > 1:
            target = f"{path}.".split(".")[1]
            if target in OPS and target != own[1]:
                found.append(f"{module}:{line} (ops/{own[1]}) must not import its neighbour {path}")
    return found


def private_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    """Return where a module takes what another room keeps to itself: underscore names, of modules or in them."""
    tree = ast.parse(source)
    taken = []
    modules = {}  # by the names that they are bound to here
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias, (line, dotted) in zip(node.names, imported_modules(node, module, is_package), strict=True):
                taken.append((line, dotted))
                if module_path(dotted):
                    modules[alias.asname or alias.name] = dotted
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            taken.append((node.lineno, f"{modules[node.value.id]}.{node.attr}"))
    found = []
    for line, dotted in taken:
        root, *parts = dotted.split(".")
        if root != "sequoia_kernels" or not parts or parts[0] in NATIVE or parts[:1] == module.split(".")[1:2]:
            continue
        if any(part.startswith("_") and not part.startswith("__") for part in parts):
            found.append(f"{module}:{line} must not take {dotted}, which another room keeps to itself")
    return found


def module_path(dotted: str) -> str | None:
    """Return the module of the package that a dotted name is, None for a name in a module and for everybody else's."""
    if dotted.split(".")[0] != PACKAGE.name:
        return None
    path = PACKAGE.parent / Path(*dotted.split("."))
    return dotted if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file() else None


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import one another, each as its sorted names (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    path: list[str] = []
    found = []

    def visit(module: str) -> None:
        index[module] = lowest[module] = len(index)
        path.append(module)
        for other in sorted(imports[module]):
            if other not in index:
                visit(other)
            if other in path:
                lowest[module] = min(lowest[module], lowest[other])
        if lowest[module] == index[module]:
            group = path[path.index(module) :]
            del path[path.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in sorted(imports):
        if module not in index:
            visit(module)
    return found


def package_modules() -> list[tuple[str, Path]]:
    modules = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        modules.append((".".join(["sequoia_kernels", *(parts[:-1] if parts[-1] == "__init__" else parts)]), path))
    return modules


def test_imports_go_one_way() -> None:
    found = []
    for module, path in package_modules():
        found += violations(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    assert not found, "\n".join(found)


def test_nobody_takes_what_another_room_keeps_to_itself() -> None:
    found = []
    for module, path in package_modules():
        found += private_imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    assert not found, "\n".join(found)


def test_no_files_import_one_another() -> None:
    """Imports inside functions and those for type checkers count as well."""
    imports = {}
    for module, path in package_modules():
        names = imported_modules(ast.parse(path.read_text(encoding="utf-8")), module, path.name == "__init__.py")
        found = {
            module_path(dotted) or module_path(dotted.rpartition(".")[0])
            for _, dotted in names
            if NATIVE.isdisjoint(dotted.split("."))
        }
        imports[module] = {other for other in found if other is not None and other != module}
    assert circles(imports) == []


def test_a_circle_is_found() -> None:
    imports = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": {"e"}, "e": set(), "f": {"g"}, "g": {"a", "f"}}
    assert circles(imports) == [["b", "c"], ["f", "g"]]


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("from sequoia_kernels.tree.token_tree import _check_parents", 1),
        ("from sequoia_kernels.tree import _private, TokenTree", 1),
        ("from sequoia_kernels import checks\n\nchecks._dtype_text(None)", 1),
        ("from sequoia_kernels.tree import token_tree as trees\n\ntrees._check_parents(trees.TokenTree)", 1),
        ("from sequoia_kernels.planner.plan import _Search\nfrom sequoia_kernels import _host, __version__", 0),
        ("from sequoia_kernels import _host\n\n_host._anything()", 0),
        ("from sequoia_kernels.tree import TokenTree\n\nTokenTree._private", 0),
    ],
)
def test_a_private_import_is_found(source: str, count: int) -> None:
    assert len(private_imports(source, "sequoia_kernels.planner.search")) == count


def test_every_room_has_a_law() -> None:
    rooms = {module.split(".")[1] for module, _ in package_modules() if "." in module}
    assert rooms <= set(ALLOWED) | ENTRANCES, "add the new room to ALLOWED in this file"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sequoia_kernels.planner.search", "from sequoia_kernels.ops import tree_attention"),
        ("sequoia_kernels.planner.search", "from sequoia_kernels import verify_tree"),
        ("sequoia_kernels.planner.plan", "def late():\n    import sequoia_kernels.decoding.loop"),
        ("sequoia_kernels.planner.plan", "from ..measure import measure_profile"),
        ("sequoia_kernels.tree.token_tree", "from sequoia_kernels.planner import optimal_tree"),
        ("sequoia_kernels.tree.token_tree", "from sequoia_kernels import rng"),
        ("sequoia_kernels.ops.verify_tree.op", "from sequoia_kernels.ops.warped_logsumexp import warped_logsumexp"),
        ("sequoia_kernels.ops.verify_tree.op", "from sequoia_kernels.ops import warped_logsumexp"),
        ("sequoia_kernels.ops.verify_tree.op", "from ..warped_logsumexp.reference import run"),
        ("sequoia_kernels.ops.verify_tree.op", "from sequoia_kernels.models import adapt"),
        ("sequoia_kernels.models.adapter", "from sequoia_kernels.decoding.generation import generate"),
        ("sequoia_kernels.models.loading", "from sequoia_kernels import load_offloaded"),
        ("sequoia_kernels.offload.model", "from sequoia_kernels.planner import plan_tree"),
        ("sequoia_kernels.measure.models", "from sequoia_kernels.planner.plan import plan_tree"),
        ("sequoia_kernels.decoding.loop", "from sequoia_kernels.demo import load_demo_pair"),
        ("sequoia_kernels.errors", "import sequoia_kernels.checks"),
    ],
)
def test_an_upward_import_is_found(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "sequoia_kernels.planner.search",
            "from sequoia_kernels.host_module import host\nfrom sequoia_kernels.tree import TokenTree",
        ),
        ("sequoia_kernels.planner.plan", "from .search import optimal_tree\nfrom sequoia_kernels import TokenTree"),
        (
            "sequoia_kernels.ops.verify_tree.op",
            "from .reference import run\nfrom sequoia_kernels import rng\nfrom .. import backends",
        ),
        ("sequoia_kernels.measure.models", "from sequoia_kernels.planner.profile import HardwareProfile"),
        ("sequoia_kernels.cli", "from sequoia_kernels import generate, __version__\nimport sequoia_kernels.demo"),
        ("sequoia_kernels.tree.token_tree", "import torch\nimport sequoia_kernels"),
    ],
)
def test_a_downward_import_passes(module: str, source: str) -> None:
    assert violations(source, module) == []


@pytest.mark.parametrize("op", OPS)
def test_one_stem_names_the_op_everywhere(op: str) -> None:
    import torch

    import sequoia_kernels.ops

    assert callable(getattr(sequoia_kernels.ops, op))
    assert (PACKAGE / "ops" / op / "op.py").is_file()
    assert (PACKAGE / "ops" / op / "reference.py").is_file()
    assert (REPOSITORY / "python_tests" / "ops" / f"test_{op}.py").is_file()
    assert (REPOSITORY / "bench" / "ops" / f"bench_{op}.py").is_file()
    assert hasattr(torch.ops.sequoia, op)


def test_every_op_folder_is_listed_here() -> None:
    assert sorted(path.parent.name for path in PACKAGE.glob("ops/*/op.py")) == OPS


def test_native_code_includes_no_torch() -> None:
    pattern = re.compile(r"^\s*#\s*include\s*[<\"](torch|ATen|c10)/", re.MULTILINE)
    sources = [path for path in (REPOSITORY / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert sources
    assert [str(path) for path in sources if pattern.search(path.read_text(encoding="utf-8"))] == []
