"""A pytest plugin for runs on a device: every failure is on disk as it happens.

    python -m pytest -p support.failure_log --failure-log failures.log ...

pytest shows failures when all tests are over, which a run that is ended does not reach. And a test whose kernel breaks
the CUDA context makes every later one in its process fail: a worker of pytest-xdist ends behind such a test, and xdist
puts another in its place.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--failure-log", metavar="PATH", help="append failures to this file, each as it happens")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("failure_log")
    if path is not None:
        in_worker = hasattr(config, "workerinput")
        config.pluginmanager.register(EndWorker(Path(path)) if in_worker else FailureLog(Path(path)))


def append(path: Path, title: str, text: str) -> None:
    """Write one entry in one piece."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(f"==== {time.strftime('%H:%M:%S')} {title}\n{text.rstrip()}\n\n")


class FailureLog:
    """Writes failures where reports arrive: those of all workers, and of tests during which a worker was lost."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.running: list[str] = []

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running.append(nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.running = [other for other in self.running if other != nodeid]

    def pytest_keyboard_interrupt(self) -> None:
        append(self.path, "INTERRUPTED while these ran", "\n".join(self.running))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "???":  # xdist's word for a worker that was lost: the test has not ended, and will not
            self.pytest_runtest_logfinish(report.nodeid)
        if report.failed:
            output = "".join(f"\n-- {title}\n{text}" for title, text in report.sections)
            append(self.path, f"FAILED {report.nodeid} ({report.when})", report.longreprtext + output)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            append(self.path, f"NOT COLLECTED {report.nodeid}", report.longreprtext)


class EndWorker:
    """Ends a worker behind a failed test that the device did not survive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed

    @pytest.hookimpl(trylast=True)  # behind xdist's own, which sends the reports
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        failed, self.failed = self.failed, False
        error = device_error() if failed else None
        if error is not None:
            append(self.path, f"THE DEVICE DOES NOT ANSWER behind {nodeid}; the worker ends", error)
            os._exit(1)  # Python's own way out would wait for the device


def device_error() -> str | None:
    """What the device says when it is waited for; None where all is well or nothing has used it."""
    import torch  # not before the suite has set its environment

    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error)
    return None
