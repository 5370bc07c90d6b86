"""The registry of backends: who is chosen, why not, and that nothing is swallowed."""

from __future__ import annotations

import logging
import sys
import textwrap

import pytest
import torch

import sequoia_kernels.ops
from sequoia_kernels.errors import BackendUnavailableError
from sequoia_kernels.ops import backends

OP = "test_op"
OPS = ["compact_kv_cache_", "sample_without_replacement", "tree_attention", "verify_tree", "warped_logsumexp"]


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch):
    """A copy of the registry for each test."""
    for name in ("_modules", "_loaded", "_reasons"):
        monkeypatch.setattr(backends, name, {op: dict(entries) for op, entries in getattr(backends, name).items()})
    monkeypatch.setattr(backends, "_auto", {})
    monkeypatch.setattr(backends, "_logged", set())


def register(name, reason=None, unavailable=None):
    backends.register_backend(OP, name, lambda *inputs: reason, lambda *inputs: name, unavailable=unavailable)


def chosen(requested="auto", device_type="cpu"):
    return backends.choose(OP, requested, device_type, (1, 2)).run(1, 2)


def test_auto_follows_the_order_of_the_device():
    for name in ("reference", "triton", "host", "cuda", "sdpa"):
        register(name)
    assert chosen() == "host"
    assert chosen(device_type="cuda") == "cuda"
    assert chosen(device_type="xpu") == "sdpa"


def test_auto_passes_over_what_does_not_support_the_call_and_says_so_once(caplog):
    register("reference")
    register("sdpa", reason="has no soft-cap")
    register("host", unavailable=lambda: "is not built")
    with caplog.at_level(logging.INFO, logger="sequoia_kernels"):
        assert [chosen() for _ in range(3)] == ["reference"] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "test_op on cpu runs on backend reference (host: is not built; sdpa: has no soft-cap)"
    ]
    register("sdpa", reason="has no sinks")  # another reason is logged again
    with caplog.at_level(logging.INFO, logger="sequoia_kernels"):
        chosen()
    assert len(caplog.records) == 2


def test_nothing_supports_the_call():
    register("reference", reason="too large")
    with pytest.raises(BackendUnavailableError, match=r"test_op: no backend on cpu supports .*reference: too large"):
        chosen()


def test_a_named_backend_runs_or_raises_its_reason():
    register("reference")
    register("triton", reason="takes CUDA tensors")
    register("cuda", unavailable=lambda: "no CUDA device")
    assert chosen("reference") == "reference"
    with pytest.raises(BackendUnavailableError, match=r"test_op: backend 'triton' cannot run .*: takes CUDA tensors"):
        chosen("triton")
    with pytest.raises(BackendUnavailableError, match=r"test_op: backend 'cuda' cannot run .*: no CUDA device"):
        chosen("cuda")
    with pytest.raises(
        ValueError, match="test_op: backend must be one of auto, reference, triton, cuda, got 'tensorrt'"
    ):
        chosen("tensorrt")


def test_a_backend_outside_the_order_runs_by_name_only():
    register("reference")
    register("vendor")
    assert chosen() == "reference"
    assert chosen("vendor") == "vendor"


def test_registering_again_replaces():
    register("reference", reason="first")
    with pytest.raises(BackendUnavailableError, match="first"):
        chosen()
    register("reference")
    assert chosen() == "reference"


@pytest.fixture
def room(tmp_path, monkeypatch):
    """Write backend files into a package of its own and register it as the room of the test op."""
    package = f"room_{tmp_path.name}"
    folder = tmp_path / package
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(**files):
        for name, text in files.items():
            (folder / f"{name}.py").write_text(textwrap.dedent(text))
        backends.register_room(OP, package)
        return package

    yield write
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]


WORKING = """
def supports(*inputs):
    return None

def run(*inputs):
    return __name__.rpartition(".")[2]
"""


def test_files_of_a_room_are_its_backends_and_load_on_first_use(room):
    package = room(reference=WORKING, triton_launch=WORKING, host="raise RuntimeError('imported too early')", op="")
    assert set(backends.backend_names(OP)) == {"reference", "triton", "host"}
    assert f"{package}.reference" not in sys.modules
    assert chosen("reference") == "reference"
    assert chosen("triton") == "triton_launch"
    with pytest.raises(RuntimeError, match="imported too early"):
        chosen()


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("import triton.language", "triton is not installed"),
        ("import sequoia_kernels._host as _host", "the C\\+\\+ module sequoia_kernels._host is not built"),
        ("from sequoia_kernels import _cuda", "the CUDA module sequoia_kernels._cuda is not built"),
    ],
)
def test_a_missing_optional_module_is_a_reason(room, monkeypatch, statement, reason):
    for name in [name for name in sys.modules if name == "triton" or name.startswith("triton.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("_host", "_cuda"):
        monkeypatch.setitem(sys.modules, f"sequoia_kernels.{name}", None)
        monkeypatch.delattr(sequoia_kernels, name, raising=False)
    room(reference=WORKING, host=f"{statement}\n{WORKING}")
    assert chosen() == "reference"
    with pytest.raises(BackendUnavailableError, match=reason):
        chosen("host")
    assert backends.backend_report()[OP]["reference"] is None
    assert backends.backend_report()[OP]["host"] is not None


def test_a_module_that_fails_to_load_tells_why(room):
    failing = "raise ImportError('libcudart.so.13: cannot open shared object file', name='sequoia_kernels._cuda')"
    room(reference=WORKING, cuda=failing)
    assert backends.unavailable_reason(OP, "cuda") == (
        "sequoia_kernels._cuda cannot be loaded: libcudart.so.13: cannot open shared object file"
    )


def test_any_other_failing_import_is_raised(room):
    room(reference=WORKING, host="import no_such_module_anywhere")
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        chosen()


def test_unavailable_is_asked_once(room):
    room(
        reference=WORKING,
        host="calls = []\ndef unavailable():\n    calls.append(1)\n    return 'not today'\n" + WORKING,
    )
    for _ in range(3):
        assert chosen() == "reference"
        assert backends.unavailable_reason(OP, "host") == "not today"
    module = sys.modules[backends._modules[OP]["host"]]
    assert module.calls == [1]


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_reference_for_every_device(op):
    report = backends.backend_report()
    assert sorted(report) == OPS
    assert report[op]["reference"] is None
    assert all(reason is None or reason for reason in report[op].values())
    assert hasattr(torch.ops.sequoia, op)
    for order in (*backends.AUTO_ORDER.values(), backends._OTHER_DEVICES):
        assert order[-1] == "reference"
