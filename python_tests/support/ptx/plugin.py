"""A pytest plugin: the ops' Triton tests on compiled code. A finding fails the test that had it.

    cd python_tests && python -m pytest -p support.ptx.plugin ops/test_compact_kv_cache_.py -k triton

`python_tests/emulate_ptx.py` runs it over devices and orders.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import pytest
from support import op_backends
from support.ptx.emulator import Emulator
from support.ptx.launch import ORDERS, Options
from support.ptx.numerics import Approximation
from support.ptx.triton_launches import emulated

_EMULATOR = pytest.StashKey[Emulator]()
_CLEANUP = pytest.StashKey[contextlib.ExitStack]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The device and what a GPU leaves open."""
    group = parser.getgroup("ptx", "emulated PTX")
    group.addoption("--ptx-capability", type=int, default=80, help="compute capability: 80 or 90 (default: 80)")
    group.addoption("--ptx-order", choices=ORDERS, default="random", help="in which blocks start (default: random)")
    group.addoption("--ptx-interleave", type=int, default=1, help="blocks under way at a time (default: 1)")
    group.addoption(
        "--ptx-warps",
        choices=("together", "random", "first", "last"),
        default="together",
        help="which warps run next (default: all together)",
    )
    group.addoption("--ptx-seed", type=int, default=0, help="of random orders (default: 0)")
    group.addoption(
        "--ptx-approximate", action="store_true", help="move approximate results within their documented errors"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Let the Triton backends take CPU tensors before anybody asks for them."""
    value = config.getoption
    options = Options(
        order=value("--ptx-order"),
        interleave=value("--ptx-interleave"),
        warps=value("--ptx-warps"),
        seed=value("--ptx-seed"),
    )
    emulator = Emulator(options)
    cleanup = contextlib.ExitStack()
    if value("--ptx-approximate"):
        Approximation.seed = options.seed
    cleanup.enter_context(emulated(emulator, value("--ptx-capability")))
    config.stash[_EMULATOR], config.stash[_CLEANUP] = emulator, cleanup
    devices = op_backends._devices
    compiled = mock.patch.object(op_backends, "_devices", lambda name: ["cpu"] if name == "triton" else devices(name))
    cleanup.enter_context(compiled)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Put everything back."""
    config.stash[_CLEANUP].close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test that passes although something was found in its launches."""
    emulator = item.config.stash[_EMULATOR]
    emulator.clear()
    result = yield
    findings = emulator.report.findings()
    if findings:
        pytest.fail("\n".join(["found in compiled code:", *map(str, findings[:8])]), pytrace=False)
    return result
