"""Capturing, with a stand-in for CUDA: the order of things, what is refused, and that nothing is left behind."""

from __future__ import annotations

import ast
import contextlib
import ctypes
import gc
import threading
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.interrupts import interrupt_everywhere

from sequoia_kernels import cuda_graphs, guard, ops
from sequoia_kernels.cuda_graphs import CaptureError, capture

OTHER = torch.device("cuda", 1)  # not the current one
RUNS = {"first": 1, "second": 2, "captured": 3}


class Counter:
    """A call that adds 1 on a device, and what else it is told to do in one of its runs."""

    def __init__(self, fake, device=OTHER, **at):
        self.fake, self.device, self.at = fake, device, at
        self.value, self.runs, self.undone = 0, 0, []

    def __call__(self):
        self.runs += 1
        self.fake.launch(self.device, self._add)
        for name, action in self.at.items():
            if RUNS.get(name, self.runs) == self.runs:
                action()
        return "result"

    def _add(self):
        self.value += 1

    def undo(self):
        self.undone.append(self.runs)
        self.value = 0


def raising(error):
    def action():
        raise error

    return action


def test_a_graph_of_another_device_than_the_current_one_holds_the_call(fake_cuda):
    call = Counter(fake_cuda)
    graph, result = capture(call, OTHER, undo=call.undo)
    fake_cuda.assert_untouched()
    assert (call.runs, call.undone, call.value, result) == (3, [1, 2], 0, "result")
    graph.replay()
    graph.replay()
    assert call.value == 2
    assert fake_cuda.log == [
        "side stream of cuda:1 waits for default of cuda:1",
        "synchronize cuda:1",
        "empty cache",
        "capture side stream of cuda:1, thread_local",
        "default of cuda:1 waits for side stream of cuda:1",
    ]


def test_captures_of_a_device_share_its_stream_and_the_memory_they_are_given(fake_cuda):
    memory = object()
    graphs = [capture(Counter(fake_cuda), OTHER, memory=memory).graph for _ in range(2)]
    other = capture(Counter(fake_cuda, torch.device("cuda", 0)), torch.device("cuda", 0)).graph
    assert graphs[0].stream is graphs[1].stream is not other.stream
    assert graphs[0].pool == graphs[1].pool == (memory, 1)


def test_what_waits_for_the_device_is_found_before_a_capture_begins(fake_cuda):
    call = Counter(fake_cuda, always=lambda: fake_cuda.wait())
    with pytest.raises(CaptureError, match=r"it waits for the device at .*test_cuda_graphs\.py:\d+$") as caught:
        capture(call, OTHER, undo=call.undo)
    assert caught.value.lasting
    assert call.runs == 2 and call.value == 0
    assert not any(line.startswith("capture") for line in fake_cuda.log)
    fake_cuda.assert_untouched()


def test_waiting_once_is_allowed(fake_cuda):
    """The first run may wait: what it makes is there afterwards."""
    capture(Counter(fake_cuda, first=lambda: fake_cuda.wait()), OTHER)


@pytest.mark.parametrize("run", ["first", "second"])
@pytest.mark.parametrize("error", [RuntimeError("broken"), TypeError("broken"), KeyboardInterrupt()])
def test_the_calls_own_errors_come_through(fake_cuda, run, error):
    call = Counter(fake_cuda, **{run: raising(error)})
    with pytest.raises(type(error)) as caught:
        capture(call, OTHER, undo=call.undo)
    assert caught.value is error
    assert call.value == 0
    fake_cuda.assert_untouched()


@pytest.mark.parametrize("run", RUNS)
def test_a_lack_of_memory_is_no_property_of_the_call(fake_cuda, run):
    call = Counter(fake_cuda, **{run: raising(torch.cuda.OutOfMemoryError("CUDA out of memory\nTried"))})
    with pytest.raises(CaptureError, match=r"^CUDA out of memory$") as caught:
        capture(call, OTHER, undo=call.undo)
    assert not caught.value.lasting
    assert call.value == 0
    fake_cuda.assert_untouched()
    capture(Counter(fake_cuda), OTHER)


@pytest.mark.parametrize("invalid", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("the reason\nand more"), AssertionError("the reason")])
def test_the_reason_of_a_failed_capture_is_not_hidden_and_nothing_is_left_of_it(fake_cuda, error, invalid):
    def fail():
        if invalid:
            with pytest.raises(RuntimeError, match="operation not permitted"):
                fake_cuda.wait()
        raise error

    call = Counter(fake_cuda, captured=fail)
    with pytest.raises(CaptureError, match=r"^the reason$") as caught:
        capture(call, OTHER, undo=call.undo)
    assert caught.value.lasting and caught.value.__cause__ is error
    assert call.value == 0
    fake_cuda.assert_untouched()
    graph, _ = capture(Counter(fake_cuda), OTHER)
    assert graph.instantiated


def test_a_failed_capture_keeps_nothing_alive(fake_cuda):
    """An error that is held by a frame which it holds would keep what the call allocated until garbage is collected."""
    seen = []

    def fail():
        allocated = torch.nn.Module()  # in place of a tensor
        seen.append(weakref.ref(allocated))
        raise RuntimeError("the reason")

    gc.disable()
    try:
        try:
            capture(Counter(fake_cuda, captured=fail), OTHER)
        except CaptureError:
            assert seen[0]() is not None
        assert seen[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("invalid", [False, True])
def test_an_interrupt_leaves_nothing_of_a_capture(fake_cuda, invalid):
    def interrupt():
        if invalid:
            fake_cuda.current_stream().status = 2
        raise KeyboardInterrupt

    call = Counter(fake_cuda, captured=interrupt)
    with pytest.raises(KeyboardInterrupt):
        capture(call, OTHER, undo=call.undo)
    assert call.value == 0
    fake_cuda.assert_untouched()


def test_a_capture_that_became_invalid_without_an_error_is_not_taken_for_a_graph(fake_cuda):
    def swallow():
        with pytest.raises(RuntimeError):
            fake_cuda.wait()

    with pytest.raises(CaptureError, match="became invalid"):
        capture(Counter(fake_cuda, captured=swallow), OTHER)
    fake_cuda.assert_untouched()


def test_the_reason_stays_if_the_driver_fails_too(fake_cuda, monkeypatch):
    driver = cuda_graphs._driver()
    driver.exchange_capture = lambda stream: raising(RuntimeError("the driver's"))()
    monkeypatch.setattr(cuda_graphs, "_driver", lambda: driver)
    with pytest.raises(CaptureError, match="operation not permitted"):
        capture(Counter(fake_cuda, captured=fake_cuda.wait), OTHER)
    assert fake_cuda.current_stream(1) is fake_cuda.default[1] and fake_cuda.current_device() == 0
    assert not cuda_graphs._lock._is_owned()


@pytest.mark.parametrize("message", ["out of memory", "no such kernel"])
def test_a_graph_that_cannot_be_instantiated(fake_cuda, monkeypatch, message):
    monkeypatch.setattr(torch.cuda.CUDAGraph, "instantiate", lambda graph: raising(RuntimeError(message))())
    with pytest.raises(CaptureError, match=message) as caught:
        capture(Counter(fake_cuda), OTHER)
    assert caught.value.lasting == (message != "out of memory")
    fake_cuda.assert_untouched()


def test_a_capture_that_cannot_begin_is_not_ended(fake_cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", lambda graph, **options: raising(RuntimeError("no"))())
    call = Counter(fake_cuda)
    with pytest.raises(CaptureError, match=r"^no$"):
        capture(call, OTHER)
    assert call.runs == 2
    fake_cuda.assert_untouched()


def test_a_capture_that_launched_nothing_is_refused(fake_cuda):
    """As happens to work on another device than the one captured; torch's warning of it is not needed then."""
    call = Counter(fake_cuda, device=torch.device("cuda", 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CaptureError, match="it launched nothing on the device"):
            capture(call, OTHER)
    fake_cuda.assert_untouched()


def test_one_capture_at_a_time_in_the_process(fake_cuda):
    got = []

    def try_the_lock():
        taken = cuda_graphs._lock.acquire(blocking=False)
        got.append(taken)
        if taken:
            cuda_graphs._lock.release()

    def elsewhere():
        thread = threading.Thread(target=try_the_lock)
        thread.start()
        thread.join()

    capture(Counter(fake_cuda, always=elsewhere), OTHER)
    with pytest.raises(RuntimeError):
        capture(Counter(fake_cuda, second=raising(RuntimeError())), OTHER)
    elsewhere()
    assert got == [False] * 3 + [True]


def test_other_threads_may_wait_meanwhile(fake_cuda):
    """Neither an error nor a warning for them, and the call is not blamed."""
    errors = []

    def wait():
        try:
            fake_cuda.wait()
        except RuntimeError as error:
            errors.append(error)

    def elsewhere():
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join()

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        capture(Counter(fake_cuda, always=elsewhere), OTHER)
    assert not errors and not shown


def test_other_warnings_of_a_call_are_shown(fake_cuda):
    def warn():
        warnings.warn("mine", UserWarning, stacklevel=1)

    with pytest.warns(UserWarning, match="mine"):
        capture(Counter(fake_cuda, second=warn), OTHER)


def test_the_callers_own_debug_mode_stays(fake_cuda):
    fake_cuda.sync_mode = 2
    capture(Counter(fake_cuda), OTHER)
    assert fake_cuda.sync_mode == 2


@pytest.mark.parametrize("run", RUNS)
def test_a_call_that_is_captured_cannot_capture(fake_cuda, run):
    inner = Counter(fake_cuda)
    with pytest.raises(CaptureError, match="under way already") as caught:
        capture(Counter(fake_cuda, **{run: lambda: capture(inner, OTHER)}), OTHER)
    assert inner.runs == 0 and not caught.value.lasting
    fake_cuda.assert_untouched()


def test_what_torch_says_of_its_debug_mode_is_nobodys_business(fake_cuda):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        capture(Counter(fake_cuda), OTHER)


@pytest.mark.parametrize("event", ["line", "opcode"])
@pytest.mark.parametrize("invalid", [False, True])
def test_an_interrupt_at_any_line_leaves_nothing_behind(fake_cuda, invalid, event):
    show = warnings.showwarning

    def work():
        call = Counter(fake_cuda, captured=fake_cuda.wait if invalid else list)
        with contextlib.suppress(CaptureError):
            capture(call, OTHER)

    def check():
        fake_cuda.assert_untouched()
        assert warnings.showwarning is show

    assert interrupt_everywhere(work, check, [cuda_graphs, guard], event) > 50


def test_what_is_asked_of_the_driver(monkeypatch):
    asked = []

    def put(value, status=0):
        def function(name, handle, *arguments):
            asked.append((name, handle.value, [a.value for a in arguments if isinstance(a, ctypes.c_int)]))
            if value is not None:
                arguments[-1]._obj.value = value
            return status

        return function

    functions = {
        "cuGraphGetNodes": put(3),
        "cuStreamIsCapturing": put(2),
        "cuStreamEndCapture": put(0, status=901),  # what an invalid capture ends with
        "cuStreamBeginCapture_v2": put(None),
    }
    library = SimpleNamespace(**{
        name: lambda *arguments, name=name, function=function: function(name, *arguments)
        for name, function in functions.items()
    })  # fmt: skip
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    driver = cuda_graphs._Driver()
    assert driver.num_nodes(1 << 40) == 3
    assert driver.capture_status(1 << 41) == 2
    driver.exchange_capture(1 << 42)
    assert asked == [
        ("cuGraphGetNodes", 1 << 40, []),
        ("cuStreamIsCapturing", 1 << 41, []),
        ("cuStreamEndCapture", 1 << 42, []),
        ("cuStreamBeginCapture_v2", 1 << 42, [1]),  # thread-local
    ]
    functions["cuGraphGetNodes"] = put(0, status=1)
    library.cuGraphGetNodes = lambda *arguments: 1
    with pytest.raises(RuntimeError, match="cuGraphGetNodes of the CUDA driver failed with status 1"):
        driver.num_nodes(1)


def test_without_a_driver_nothing_is_captured(fake_cuda, monkeypatch):
    def missing(name):
        raise OSError("cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.setattr(cuda_graphs, "_driver", cuda_graphs._Driver)
    with pytest.raises(CaptureError, match="the CUDA driver cannot be called: cannot open"):
        capture(Counter(fake_cuda), OTHER)
    fake_cuda.assert_untouched()


class Model:
    """As much of a `TreeModel` as is needed to remember it."""

    capturable = True
    dtype = torch.float32
    ranks = None

    def __init__(self, devices=()):
        self.model = torch.nn.Module()
        self.devices = devices

    def weights(self):
        return [SimpleNamespace(device=torch.device(device), is_cuda=device != "cpu") for device in self.devices]

    def __repr__(self):
        return "a model"


def test_a_refused_model_is_remembered_by_its_dtype_and_not_kept_alive(caplog):
    model, other = Model(), Model()
    cuda_graphs.refuse(model, CaptureError("it waits"))
    assert [record.getMessage() for record in caplog.records] == [
        "CUDA-graph capture is off for a model, its forwards are launched kernel by kernel: it waits"
    ]
    again = Model()
    again.model = model.model  # adapted once more
    assert cuda_graphs.refused(model) and cuda_graphs.refused(again) and not cuda_graphs.refused(other)
    again.dtype = torch.bfloat16
    assert not cuda_graphs.refused(again)
    other.capturable = False
    assert cuda_graphs.refused(other)
    cuda_graphs.forget_refusals()
    assert not cuda_graphs.refused(model)
    cuda_graphs.refuse(model, CaptureError("it waits"))
    del model, again
    gc.collect()
    assert not cuda_graphs._refused


def test_a_model_on_several_devices_is_not_tried(caplog):
    """A graph would hold one device's part, and its replays would leave the rest as it was."""
    assert not cuda_graphs.refused(Model(["cuda:1", "cuda:1", "cpu"]))
    spread = Model(["cuda:0", "cuda:1"])
    assert cuda_graphs.refused(spread) and cuda_graphs.refused(spread)
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "its weights lie on several devices, and a graph belongs to one"
    ]


def test_a_model_that_is_split_over_ranks_is_not_tried(caplog):
    """What collectives inside of a capture do was not tried."""
    split = Model(["cuda:0"])
    split.ranks = object()
    assert cuda_graphs.refused(split) and cuda_graphs.refused(split)
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "it is split over ranks, which add up in every layer"
    ]


@pytest.mark.parametrize(
    "path", sorted(Path(ops.__file__).parent.glob("*/triton_launch.py")), ids=lambda p: p.parent.name
)
def test_triton_launches_on_the_device_of_its_tensors(path):
    """Left alone, Triton launches on the current device."""

    def launches(node):
        """The calls `kernel[grid](...)` in a function, but not those within `with launching_on(...)`."""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.With) and "launching_on(" in ast.unparse(child.items[0]):
                continue
            if isinstance(child, ast.Call) and isinstance(child.func, ast.Subscript):
                yield ast.unparse(child.func)
            yield from launches(child)

    (run,) = (
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == "run"
    )
    assert list(launches(run)) == [] and "launching_on(" in ast.unparse(run)


def test_launching_on_a_device_makes_it_the_current_one(fake_cuda):
    triton_device = pytest.importorskip("sequoia_kernels.ops.triton_device")
    for device, index in (("cuda:1", 1), ("cuda:0", 0), ("cpu", 0)):
        with triton_device.launching_on(torch.device(device)):
            assert torch.cuda.current_device() == index
        assert torch.cuda.current_device() == 0
