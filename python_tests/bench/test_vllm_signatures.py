"""The script that compares vLLM's sources with the record: on a small package; its table against our own sources."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.bench_scripts import vllm_signatures

import sequoia_kernels
from sequoia_kernels.vllm import TESTED_VERSIONS

ROOM = Path(sequoia_kernels.__file__).parent / "vllm"

TABLE = {
    "vllm.runner": {"Runner": "__init__() sample() requests device slots batch", "": "make() LIMIT moved()"},
    "vllm.config": {"Config": "seed"},
}
FILES = {
    "__init__.py": "",
    "_version.py": "__version__ = version = '0.40.1'\n",
    "base.py": '''
import abc
class Base(abc.ABC):
    slots: int = 3
    def sample(self, logits: "Tensor | None", metadata=None, *, top: int = 5) -> "Output":
        """Sample."""
        # at random
        return logits
    @property
    def batch(self): return 1
''',
    "runner.py": """
import torch
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    LIMIT: int
try:
    from vllm.helpers import *
except ImportError:
    pass
from .base import Base as _Base
class Other: pass
class Runner(Other, _Base):
    def __init__(self, config, device="cpu"):
        self.requests, self.device = {}, device
def make(config, /, *names, **options): return Runner(config)
""",
    "helpers.py": "def moved(size): return size\n",
    "config/__init__.py": "from vllm.config.inner import Config\n",
    "config/inner.py": "class Config:\n    seed: int\n",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that is named like vLLM, and a table of what is touched of it."""
    monkeypatch.setattr(vllm_signatures, "TOUCHED", TABLE)
    for name, text in FILES.items():
        path = tmp_path / "site" / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "site"


def change(package: Path, name: str, old: str, new: str) -> None:
    path = package / "vllm" / name
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def run(package: Path, action: str, *more: str) -> int:
    return vllm_signatures.main([action, str(package), "--file", str(package.parent / "record.json"), *more])


def test_what_is_read_of_a_package(package):
    found = vllm_signatures.read_entries(package)
    assert all(entry is not None for entry in found.values())
    assert found["vllm.runner.Runner.sample"]["signature"] == "(self, logits, metadata=None, *, top=5) -> 'Output'"
    assert found["vllm.runner.Runner.__init__"]["signature"] == "(self, config, device='cpu')"
    assert found["vllm.runner.make"]["signature"] == "(config, /, *names, **options)"
    assert found["vllm.runner.moved"]["signature"] == "(size)"
    assert found["vllm.runner.Runner.slots"] == found["vllm.runner.LIMIT"] == {}


CHANGES = {
    "an argument": ("base.py", ", metadata=None", ", metadata=None, seeds=None", "Runner.sample was (self, logits"),
    "a default": ("base.py", "top: int = 5", "top: int = 6", "Runner.sample was"),
    "what is returned": ("base.py", '-> "Output"', '-> "Tokens"', "Runner.sample was"),
    "a base": ("runner.py", "(Other, _Base)", "(Other)", "Runner.batch is gone"),
    "an attribute": ("runner.py", "self.requests, ", "self._requests, ", "Runner.requests is gone"),
    "a property": ("base.py", "def batch(", "def batches(", "Runner.batch is gone"),
    "a class": ("config/__init__.py", "import Config", "import Config as Settings", "Config.seed is gone"),
    "a function that is a value": (
        "helpers.py",
        "def moved(size): return size",
        "moved = len",
        "moved was (size), is no",
    ),
    "a function": ("helpers.py", "moved", "_moved", "vllm.runner.moved is gone"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_changed_is_named(case, package, capsys):
    assert run(package, "--record") == run(package, "--check") == 0
    name, old, new, message = CHANGES[case]
    change(package, name, old, new)
    capsys.readouterr()
    assert run(package, "--check") == 1
    assert message in capsys.readouterr().out


def test_what_does_not_change_what_is_taken_passes(package, capsys):
    assert run(package, "--record") == 0
    change(package, "base.py", '"Tensor | None"', '"Tensor"')
    change(package, "base.py", "# at random", "# greedily")
    change(package, "base.py", '"""Sample."""', '"""Draw."""')
    capsys.readouterr()
    assert run(package, "--check") == 0
    assert "to be read again" not in capsys.readouterr().out
    change(package, "base.py", "return logits", "return -logits")
    assert run(package, "--check") == 0
    assert "to be read again, its body changed: vllm.runner.Runner.sample" in capsys.readouterr().out


def test_a_version_is_compared_with_its_own_record_or_the_newest_one(package, capsys):
    assert run(package, "--record") == 0
    change(package, "_version.py", "0.40.1", "0.9.0")
    change(package, "helpers.py", "size)", "size, stride)")
    assert run(package, "--check") == 1
    assert "vLLM 0.9.0 against the record of 0.40.1: 1 of 10 names differ" in capsys.readouterr().out
    assert run(package, "--record") == run(package, "--check") == 0
    assert run(package, "--check", "--against", "0.40.1") == 1
    assert list(json.loads((package.parent / "record.json").read_text())) == ["0.9.0", "0.40.1"]
    with pytest.raises(SystemExit):
        run(package, "--check", "--against", "0.1.0")


def test_what_was_not_there_may_stay_away_and_what_is_new_must_be_recorded(package, capsys, monkeypatch):
    change(package, "helpers.py", "moved", "_moved")
    assert run(package, "--record") == run(package, "--check") == 0
    assert "not there: vllm.runner.moved" in capsys.readouterr().out
    monkeypatch.setattr(vllm_signatures, "TOUCHED", TABLE | {"vllm.base": {"Base": "slots"}})
    assert run(package, "--check") == 1
    assert "vllm.base.Base.slots is not in the record" in capsys.readouterr().out


def test_places(package, capsys):
    assert vllm_signatures.package_folder(package) == vllm_signatures.package_folder(package / "vllm") == package
    interpreter = package.parent / "python"
    interpreter.write_text(f'#!/bin/sh\nPYTHONPATH={package} exec {sys.executable} "$@"\n')
    interpreter.chmod(0o755)
    assert vllm_signatures.package_folder(interpreter) == package
    interpreter.write_text("#!/bin/sh\necho nobody here >&2\nexit 1\n")
    for place, message in (
        (interpreter, "must be an interpreter that has vLLM, got: nobody here"),
        (package.parent, "must be an interpreter or a folder with vllm/ in it"),
    ):
        with pytest.raises(SystemExit):
            run(place, "--check")
        assert message in capsys.readouterr().err
    (package / "vllm" / "_version.py").unlink()
    with pytest.raises(SystemExit):
        run(package, "--check")
    assert "must hold the version, got none" in capsys.readouterr().err


# ---- the table says what our sources touch


def trees() -> Iterator[ast.Module]:
    for path in sorted(ROOM.glob("*.py")):
        yield ast.parse(path.read_text(encoding="utf-8"))


def test_everything_that_is_imported_from_vllm_is_in_the_table():
    known = {(module, name) for module, scope, name, _ in vllm_signatures.touched() if not scope}
    known |= {(module, scope) for module, scopes in vllm_signatures.TOUCHED.items() for scope in scopes}
    found = {
        (node.module, alias.name)
        for tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
        for alias in node.names
    }
    assert len(found) > 10 and sorted(found - known) == []


def test_every_method_that_calls_what_it_overrides_is_in_the_table():
    known = {name for _, scope, name, is_function in vllm_signatures.touched() if scope and is_function}
    found = {
        node.func.attr
        for tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Call)
        and getattr(node.func.value.func, "id", None) == "super"
    }
    assert len(found) > 5 and sorted(found - known) == []


def test_everything_that_the_runner_reads_of_itself_is_its_own_or_in_the_table():
    known = {name for _, scope, name, _ in vllm_signatures.touched() if scope == "GPUModelRunner"}
    classes = (node for tree in trees() for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    mixins = [node for node in classes if node.name in ("TreeRunnerMixin", "DeviceTreesMixin")]
    assert len(mixins) == 2
    nodes = [node for mixin in mixins for node in ast.walk(mixin)]
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    read = set()
    for node in nodes:
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "self":
            (read if isinstance(node.ctx, ast.Load) else own).add(node.attr)
    assert len(read - own) > 10 and sorted(read - own - known) == []


def test_the_record_holds_every_tested_version_and_all_of_the_newest():
    record = json.loads(vllm_signatures.RECORD.read_text(encoding="utf-8"))
    recorded = [".".join(version.split(".")[:2]) for version in record]
    assert {*TESTED_VERSIONS} <= {*recorded} and recorded[-1] == TESTED_VERSIONS[-1]
    newest = record[list(record)[-1]]
    assert newest.keys() == {use.key for use in vllm_signatures.touched()}
    assert None not in newest.values()
