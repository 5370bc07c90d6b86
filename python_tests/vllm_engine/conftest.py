"""Tests against a real vLLM: `python python_tests/run.py --vllm`, in processes of a Python that has it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.engines.client import PAIR, Engine, engine
from transformers import AutoTokenizer

PROMPT_LENGTHS = (10, 37, 150, 300, 5, 64, 96, 129, 17)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engines", choices=("quick", "all"), help="start engines of vLLM: a few, or all")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "all_engines: left out of the quick part")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave these tests out where nobody asked for engines."""
    return True if config.getoption("engines", None) is None else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not in the quick part."""
    if config.getoption("engines", None) == "quick":
        dropped = [item for item in items if item.get_closest_marker("all_engines")]
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if not item.get_closest_marker("all_engines")]


@pytest.fixture(scope="session")
def quick(pytestconfig: pytest.Config) -> bool:
    """Whether fewer requests will do."""
    return pytestconfig.getoption("engines") == "quick"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where engines keep what they write."""
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="session")
def source() -> list[int]:
    """Tokens of code that the demo pair was not trained on."""
    text = Path(json.__file__).with_name("decoder.py").read_text() + Path(subprocess.__file__).read_text()
    return AutoTokenizer.from_pretrained(PAIR / "target")(text).input_ids


@pytest.fixture(scope="session")
def prompts(source: list[int]) -> list[list[int]]:
    """Nine prompts of 5 to 300 tokens."""
    return [source[400 * index : 400 * index + length] for index, length in enumerate(PROMPT_LENGTHS)]


class Plain:
    """What plain vLLM says; each question is asked once."""

    def __init__(self, plain_engine: Engine) -> None:
        self.engine = plain_engine
        self._known: dict[str, list[dict[str, Any]]] = {}

    def generate(self, prompts: list[list[int]], params: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Give the outputs of requests that run together."""
        question = json.dumps([prompts, params])
        if question not in self._known:
            self._known[question] = self.engine.call("generate", prompts, params)
        return self._known[question]


@pytest.fixture(scope="session")
def plain(folder: Path) -> Iterator[Plain]:
    """The demo pair's target in plain vLLM, without a prefix cache."""
    options = {"max_model_len": 1024, "max_num_seqs": 16, "enable_prefix_caching": False}
    with engine(folder, "plain", PAIR / "target", options) as plain_engine:
        yield Plain(plain_engine)
