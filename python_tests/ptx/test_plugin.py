"""The plugin that runs the ops' tests on compiled code: a finding fails the test that had it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from support.ptx import plugin
from support.ptx.emulator import Emulator


@pytest.mark.parametrize("has_finding", [False, True])
def test_a_finding_fails_its_test(has_finding):
    emulator = Emulator()
    emulator.report.add("out of bounds", None, "of the test before")
    item = SimpleNamespace(config=SimpleNamespace(stash={plugin._EMULATOR: emulator}))
    call = plugin.pytest_runtest_call(item)
    next(call)
    if not has_finding:
        with pytest.raises(StopIteration):
            call.send("passed")
        return
    emulator.report.add("out of bounds", None, "of this test")
    with pytest.raises(pytest.fail.Exception, match=r"found in compiled code:\nout of bounds.*of this test"):
        call.send("passed")
