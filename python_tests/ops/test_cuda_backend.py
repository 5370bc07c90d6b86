"""The CUDA backend of compact_kv_cache_ without a device: who may run it, what it launches, and that the build agrees.

A stand-in takes the place of the compiled module, and torch seems to see two devices, the second of them current.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
import torch

import sequoia_kernels
from sequoia_kernels import cli
from sequoia_kernels.ops import backends
from sequoia_kernels.ops.compact_kv_cache_.op import CompactInputs

OP = "compact_kv_cache_"
MODULE = "sequoia_kernels.ops.compact_kv_cache_.cuda"


class FakeModule:
    """Stands for `sequoia_kernels._cuda`."""

    architectures = "80-real 90-virtual"

    def __init__(self):
        self.driver_reason = None
        self.device_reasons = {0: None, 1: None}
        self.asked = []
        self.launches = []

    def unavailable_reason(self):
        return self.driver_reason

    def device_reason(self, device):
        self.asked.append(device)
        return self.device_reasons[device]

    def compact_kv_cache(self, **arguments):
        self.launches.append(arguments)


@pytest.fixture
def module(monkeypatch):
    fake = FakeModule()
    monkeypatch.setitem(sys.modules, "sequoia_kernels._cuda", fake)
    monkeypatch.setattr(sequoia_kernels, "_cuda", fake, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    for name in ("_loaded", "_reasons"):
        known = {op: dict(entries) for op, entries in getattr(backends, name).items()}
        known[OP].pop("cuda", None)
        monkeypatch.setattr(backends, name, known)
    monkeypatch.setattr(backends, "_auto", {})
    return fake


@pytest.fixture
def backend(module, monkeypatch):
    """The backend's file, on top of the stand-in."""
    spec = importlib.util.find_spec(MODULE)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    monkeypatch.setitem(sys.modules, MODULE, loaded)
    return loaded


def auto_order():
    return [candidate.name for candidate in backends._available(OP, "cuda")]


def test_it_comes_first_where_it_works(module, backend):
    assert auto_order()[0] == "cuda"
    assert module.asked == [1]  # a device that is asked keeps memory for it: not those that nobody uses


def test_a_driver_that_is_too_old_for_the_modules_runtime(module, backend, capsys):
    """torch brings a runtime of its own, which may well run on that driver."""
    module.driver_reason = "CUDA driver version is insufficient for CUDA runtime version"
    assert "cuda" not in auto_order()
    assert backends.unavailable_reason(OP, "cuda") == module.driver_reason
    cli.main(["doctor", "--json"])
    assert json.loads(capsys.readouterr().out)["backends"][OP]["cuda"]["reason"] == module.driver_reason
    assert module.asked == []


def test_a_build_without_code_for_any_device(module, backend):
    module.device_reasons = dict.fromkeys((0, 1), "no kernel image is available")
    assert "cuda" not in auto_order()
    reason = backends.unavailable_reason(OP, "cuda")
    assert reason == "built for 80-real 90-virtual; GPU 1: no kernel image is available"
    assert module.asked == [1, 0]


def test_a_build_with_code_for_one_of_two_devices(module, backend):
    module.device_reasons[1] = "no kernel image is available"
    assert auto_order()[0] == "cuda"
    path = torch.zeros(1, 4, dtype=torch.int32)
    reasons = []
    for index in range(2):
        lens = SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))
        reasons.append(backend.supports(CompactInputs([], path, lens, lens, None, path, 0, 100, True)))
    assert reasons == [None, "built for 80-real 90-virtual; GPU 1: no kernel image is available"]


def test_no_device_in_torch(module, backend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no CUDA device" in backends.unavailable_reason(OP, "cuda")


def launch(backend, module, num_levels=4, advance=True, max_slots=90):
    caches = [torch.zeros(2, 90, 8, 128) for _ in range(6)]  # rows of 4096 bytes
    path, lens = torch.zeros(2, num_levels, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    backend.run(CompactInputs(caches, path, lens, lens, None, None, 4096, max_slots, advance))
    return module.launches.pop()


def test_one_launch_counts_its_blocks_above_the_length(backend, module):
    arguments = launch(backend, module)
    assert (arguments["num_slices"], arguments["num_caches"], arguments["length_bits"]) == (2, 6, 27)
    assert launch(backend, module, num_levels=40)["num_slices"] == 4  # narrower columns
    assert launch(backend, module, max_slots=2**27)["num_slices"] == 1  # fewer blocks leave more bits for the length
    assert launch(backend, module, max_slots=2**27)["length_bits"] == 28
    assert launch(backend, module, advance=False)["length_bits"] == 0
    assert module.launches == []
    lens = SimpleNamespace(is_cuda=True)
    path = torch.zeros(1, 4, dtype=torch.int32)
    reason = backend.supports(CompactInputs([path] * 6, path, lens, lens, None, path, 4096, 2**28, True))
    assert reason == "takes up to 2**30 slots times caches"


def test_the_compiled_module_takes_these_arguments(request):
    compiled = pytest.importorskip("sequoia_kernels._cuda", reason="the CUDA module is not built")
    module, backend = request.getfixturevalue("module"), request.getfixturevalue("backend")
    for arguments in (launch(backend, module), launch(backend, module, advance=False)):
        assert compiled.compact_kv_cache(**{**arguments, "device": 0, "batch_size": 0}) is None  # nothing to launch
