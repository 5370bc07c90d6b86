"""The examples in the docstrings of the models room run."""

from __future__ import annotations

import doctest
import sys

import pytest

import sequoia_kernels.models


@pytest.mark.parametrize("name", ["adapt", "causal_step", "check_pair", "load_model", "prefill"])
def test_example_runs(name: str) -> None:
    function = getattr(sequoia_kernels.models, name)
    # functools.lru_cache hides the function from doctest
    function = getattr(function, "__wrapped__", function)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for example in doctest.DocTestFinder(recurse=False).find(function, name, sys.modules[function.__module__]):
        runner.run(example, out=report.append)
    assert runner.failures == 0, "".join(report)
    assert runner.tries > 0
