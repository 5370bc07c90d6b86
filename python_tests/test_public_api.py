"""The public names: complete, documented, lazy, and with examples that run."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import sys
from pathlib import Path

import pytest
from support.processes import run_process

import sequoia_kernels
from sequoia_kernels import ops
from sequoia_kernels.errors import BackendUnavailableError

NAMES = [name for name in sequoia_kernels.__all__ if name != "__version__"]
FUNCTIONS = [name for name in NAMES if name[0].islower()]
PACKAGE = Path(sequoia_kernels.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


@pytest.mark.parametrize("name", NAMES)
def test_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(sequoia_kernels, name)
    assert callable(value)
    assert value.__module__.startswith("sequoia_kernels.")
    assert inspect.getdoc(value)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_of_a_public_function_is_documented(name: str) -> None:
    function = getattr(sequoia_kernels, name)
    text = inspect.getdoc(function) or ""
    missing = [parameter for parameter in inspect.signature(function).parameters if f"{parameter}" not in text]
    assert not missing


@pytest.mark.parametrize(
    ("op", "outputs"),
    [
        ("sample_without_replacement", ops.SampledTokens),
        ("tree_attention", ops.TreeAttentionOutput),
        ("verify_tree", ops.VerifiedPath),
        ("warped_logsumexp", ops.WarpedNormaliser),
    ],
)
def test_every_field_that_an_op_returns_is_named_where_it_says_so(op: str, outputs: type) -> None:
    text = inspect.getdoc(getattr(sequoia_kernels, op)) or ""
    returns = text.partition("Returns:")[2].partition("Raises:")[0]
    assert f"{outputs.__name__}(" in returns
    assert [field for field in outputs._fields if f"{field} [" not in returns] == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_has_an_example(name: str) -> None:
    assert ">>> " in (inspect.getdoc(getattr(sequoia_kernels, name)) or "")


@pytest.mark.parametrize("module", [module for module, path in MODULES.items() if ">>> " in path.read_text("utf-8")])
def test_docstring_examples_run(module: str) -> None:
    """Those of every module of the package, whoever imports it, and none is overlooked."""
    runner = doctest.DebugRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    found = doctest.DocTestFinder().find(importlib.import_module(module))
    try:
        for example in found:
            runner.run(example)
    except doctest.DocTestFailure as failure:
        line = (failure.test.lineno or 0) + failure.example.lineno + 1
        pytest.fail(f"{failure.test.filename}:{line}: {failure.example.source}gives\n{failure.got}")
    except doctest.UnexpectedException as unexpected:
        error = unexpected.exc_info[1]
        if isinstance(error, BackendUnavailableError):
            pytest.skip(str(error))
        raise error from None
    assert sum(len(test.examples) for test in found) == MODULES[module].read_text("utf-8").count(">>> ")


def test_lazy_table_and_type_checker_imports_agree() -> None:
    tree = ast.parse(Path(sequoia_kernels.__file__).read_text(encoding="utf-8"))
    typed = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for statement in node.body:
                assert isinstance(statement, ast.ImportFrom)
                room = (statement.module or "").removeprefix("sequoia_kernels.").partition(".")[0]
                typed.update({alias.name: room for alias in statement.names})
    assert typed == sequoia_kernels._ROOM_OF
    assert sorted([*typed, "__version__"]) == sorted(sequoia_kernels.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"sequoia_kernels.*no attribute 'generat'"):
        _ = sequoia_kernels.generat


def test_dir_lists_the_public_names() -> None:
    assert set(sequoia_kernels.__all__) <= set(dir(sequoia_kernels))


def _loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; sys.stdout.write(' '.join(sys.modules))"
    return set(run_process([sys.executable, "-c", code]).stdout.split())


def test_import_loads_no_heavy_package() -> None:
    assert _loaded_after("import sequoia_kernels") & {"torch", "numpy", "transformers", "matplotlib", "triton"} == set()


def test_trees_and_planning_load_no_model_library() -> None:
    statement = "from sequoia_kernels import TokenTree, optimal_tree, plan_tree, estimate_acceptance"
    assert _loaded_after(statement) & {"transformers", "matplotlib", "triton"} == set()


def test_ops_load_no_model_library() -> None:
    assert _loaded_after("import sequoia_kernels.ops") & {"transformers", "matplotlib"} == set()
