"""Shared by the whole suite: which package is under test, and the marks."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before torch is imported anywhere: a test process computes with one thread, so that parallel workers do not fight.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

import sequoia_kernels


@pytest.fixture(scope="session", autouse=True)
def measurements_of_this_run_only(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what the tests measure out of the user's cache folder, in their subprocesses too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SEQUOIA_CACHE", raising=False)
        patch.setenv("SEQUOIA_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_report_header(config: pytest.Config) -> str:
    return f"sequoia_kernels {sequoia_kernels.__version__} from {os.path.dirname(sequoia_kernels.__file__)}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests marked gpu, with the reason, where torch sees no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch):
    """A stand-in for torch.cuda, in its place: see `support/fake_cuda.py`."""
    from support.fake_cuda import install

    return install(monkeypatch)
