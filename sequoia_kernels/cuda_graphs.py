"""CUDA graphs, captured in one place for everybody: a call is warmed up, checked, and only then captured.

A capture that fails is hard to get out of: CUDA invalidates it, and torch then leaves its allocator, its random
generators and the thread's current stream as they were inside. So what is known to fail is not begun, and what fails
all the same is led through torch's own way out.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from sequoia_kernels.guard import guarded, release_if_owned

__all__ = [
    "CaptureError", "Captured", "as_replay", "capture", "forget_refusals", "new_memory", "on_device", "refuse",
    "refused",
]  # fmt: skip

logger = logging.getLogger("sequoia_kernels")

# One capture at a time in the process: all captures of a device use one stream, and what another thread launched on it
# meanwhile would be captured, too.
_lock = threading.RLock()

_WAITS = "called a synchronizing CUDA operation"  # torch's words
_IS_PROTOTYPE = "Synchronization debug mode is a prototype"  # what torch says of it once a process, to nobody's use
_IS_EMPTY = "The CUDA Graph is empty"
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
_NONE, _INVALIDATED = 0, 2  # CU_STREAM_CAPTURE_STATUS_*


class CaptureError(RuntimeError):
    """A call cannot be captured; the message says why.

    `lasting` where the call itself is the reason, so that trying again is of no use. A lack of memory is none.
    """

    def __init__(self, reason: str, *, lasting: bool = True) -> None:
        super().__init__(reason)
        self.lasting = lasting


class Captured(NamedTuple):
    """A captured call: replaying the graph writes its results anew, into the same tensors."""

    graph: torch.cuda.CUDAGraph
    result: Any


def capture(
    call: Callable[[], object], device: torch.device, *, memory: Any = None, undo: Callable[[], object] = lambda: None
) -> Captured:
    """Capture a call in a CUDA graph, behind two runs that compile its kernels and show whether it can be captured.

    Args:
        call: what to capture; it works on `device`, which is current while it runs.
        device: a CUDA device, not necessarily the current one.
        memory: `new_memory` of several graphs that are replayed one after the other; None gives memory of its own.
        undo: sets back what a run of the call changed; called behind each run and after a failure.

    Returns:
        The graph, whose replay launches what the call launched, and what the call returned while it was captured.

    Raises:
        CaptureError: the call waits for the device, launches nothing on it, or does something else that no graph can
            hold; or there is no memory for it. Whatever the two runs raise by themselves is raised as it is.

    Notes:
        Waits for the device. Afterwards the thread's device and stream are those from before, also after an error.
        Other threads may go on using the device, but captures come one after the other.
    """
    work = _Capture(call, device, memory, undo)
    return guarded(work.enter, work.run, work.leave)


class _Capture:
    """One capture. The thread's device and stream are set for it, and put back by `leave` wherever it ended."""

    def __init__(
        self, call: Callable[[], object], device: torch.device, memory: Any, undo: Callable[[], object]
    ) -> None:
        if _lock._is_owned() or torch.cuda.is_current_stream_capturing():  # type: ignore[attr-defined]
            raise CaptureError("a capture is under way already", lasting=False)
        self.call, self.memory, self.undo = call, memory or torch.cuda.graph_pool_handle(), undo
        self.driver = _driver()
        self.device_before = torch.cuda.current_device()
        self.stream = _capture_stream(self.device_before if device.index is None else device.index)
        self.caller = torch.cuda.current_stream(self.stream.device)
        self.mode_before = torch.cuda.get_sync_debug_mode()
        self.waits: list[str] = []
        self.warnings = warnings.catch_warnings()
        self.graph: torch.cuda.CUDAGraph | None = None

    def enter(self) -> None:
        _lock.acquire()
        self.stream.wait_stream(self.caller)
        torch.cuda.set_stream(self.stream)  # which makes its device the current one

    def leave(self) -> None:
        if not _lock._is_owned():  # type: ignore[attr-defined]
            return
        with contextlib.suppress(RuntimeError):  # of a stream whose capture cannot be ended, as `record` has said
            if self.graph is not None:
                _end(self.graph, self.stream, self.driver)
        torch.cuda.set_stream(self.caller)
        with contextlib.suppress(RuntimeError):
            self.caller.wait_stream(self.stream)
        torch.cuda.set_device(self.device_before)
        release_if_owned(_lock)

    def run(self) -> Captured:
        try:
            self.warm_up()
            return self.record()
        except BaseException as error:
            self.undo()
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise CaptureError(_first_line(error), lasting=False) from error
            raise

    def warm_up(self) -> None:
        """Run the call twice: the first time it may compile and fill caches, the second time it must not wait."""
        self.call()
        self.undo()
        guarded(self.listen, self.call, self.stop_listening)
        self.undo()
        if self.waits:
            raise CaptureError(f"it waits for the device at {self.waits[0]}")

    def listen(self) -> None:
        """Note the places in which this thread waits for the device, as "file:line".

        torch tells of them in all threads of the process alike. It could raise an error there, but other threads may
        wait; so it is asked to warn, and of the warnings those of this thread are kept.
        """
        thread = threading.get_ident()
        self.warnings.__enter__()
        show = warnings.showwarning

        def keep(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
            if _WAITS not in str(message):
                show(message, category, filename, lineno, *rest)
            elif threading.get_ident() == thread:
                self.waits.append(f"{filename}:{lineno}")

        warnings.showwarning = keep  # type: ignore[assignment]
        warnings.filterwarnings("always", message=_WAITS)
        warnings.filterwarnings("ignore", message=_IS_PROTOTYPE)
        torch.cuda.set_sync_debug_mode("warn")

    def stop_listening(self) -> None:
        torch.cuda.set_sync_debug_mode(self.mode_before)
        with contextlib.suppress(RuntimeError):  # it was not entered yet
            self.warnings.__exit__(None, None, None)

    def record(self) -> Captured:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the warm-ups took goes to the graph
        graph = self.graph = torch.cuda.CUDAGraph(keep_graph=True)  # kept to count what it holds
        failure: BaseException | None = None
        result = None
        try:
            # Other threads may do meanwhile what a capture must not, such as reading an offloaded target's layers.
            graph.capture_begin(pool=self.memory, capture_error_mode="thread_local")
            result = self.call()
        except BaseException as error:
            failure = error
        try:
            valid = _end(graph, self.stream, self.driver)
            if failure is None:
                if not valid:
                    raise CaptureError("the capture became invalid by something that no graph can hold")
                if self.driver.num_nodes(graph.raw_cuda_graph()) == 0:
                    raise CaptureError("it launched nothing on the device, so that replays would do nothing")
                graph.instantiate()
                return Captured(graph, result)
        except RuntimeError as error:
            failure = failure or error  # what came first is the reason
        try:
            graph.reset()
            if isinstance(failure, CaptureError) or not isinstance(failure, Exception):
                raise failure
            reason = _first_line(failure)
            raise CaptureError(reason, lasting="out of memory" not in reason) from failure
        finally:
            failure = None  # it holds this frame, which would hold it: what was allocated would stay for a while


def _end(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, driver: _Driver) -> bool:
    """End a capture, a failed one, too; tell whether it was valid.

    torch ends an invalidated capture with an error, before its allocator and its generators have left the capture. So
    such a one is exchanged for a new, empty one first, which torch then ends as any other.
    """
    status = driver.capture_status(stream.cuda_stream)
    if status == _NONE:
        return False  # it never began
    if status == _INVALIDATED:
        driver.exchange_capture(stream.cuda_stream)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_IS_EMPTY)
        graph.capture_end()
    return status != _INVALIDATED


@functools.cache
def _capture_stream(index: int) -> torch.cuda.Stream:
    """The stream of a device's captures: one, since graphs of one memory must be captured on one stream."""
    return torch.cuda.Stream(torch.device("cuda", index))


class _Driver:
    """The calls of the CUDA driver that torch does not offer. Streams and graphs are handles."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise CaptureError(f"the CUDA driver cannot be called: {error}") from error

    def _call(self, name: str, *arguments: Any) -> None:
        if (status := getattr(self._library, name)(*arguments)) != 0:
            raise RuntimeError(f"{name} of the CUDA driver failed with status {status}")

    def num_nodes(self, graph: int) -> int:
        """Kernels, copies and other nodes of a graph."""
        count = ctypes.c_size_t()
        self._call("cuGraphGetNodes", ctypes.c_void_p(graph), None, ctypes.byref(count))
        return count.value

    def capture_status(self, stream: int) -> int:
        """Whether a stream is being captured: 0 no, 1 yes, 2 yes, but the capture is invalid."""
        status = ctypes.c_int()
        self._call("cuStreamIsCapturing", ctypes.c_void_p(stream), ctypes.byref(status))
        return status.value

    def exchange_capture(self, stream: int) -> None:
        """End an invalid capture of a stream and begin another one."""
        self._library.cuStreamEndCapture(ctypes.c_void_p(stream), ctypes.byref(ctypes.c_void_p()))  # gives an error
        self._call("cuStreamBeginCapture_v2", ctypes.c_void_p(stream), ctypes.c_int(_THREAD_LOCAL))


_driver = functools.cache(_Driver)

# Models that cannot be captured, with the dtype in which that was found: cast to another one they run other kernels.
_refused: WeakKeyDictionary[Any, torch.dtype] = WeakKeyDictionary()


def refuse(model: Any, reason: CaptureError) -> None:
    """Remember, and log once, that the forwards of a `TreeModel` cannot be captured. The model is not kept alive."""
    _refused[model.model] = model.dtype
    # as text: a log record that somebody keeps must not keep the model either, nor what the error has seen
    logger.warning(
        "CUDA-graph capture is off for %s, its forwards are launched kernel by kernel: %s", repr(model), str(reason)
    )


def refused(model: Any) -> bool:
    """Tell whether a `TreeModel` is known to be impossible to capture, so that nobody tries."""
    if not model.capturable:
        return True
    known = _refused.get(model.model) == model.dtype
    if not known and model.ranks is not None:
        refuse(model, CaptureError("it is split over ranks, which add up in every layer"))
        return True
    if not known and len({weight.device for weight in model.weights() if weight.is_cuda}) > 1:
        refuse(model, CaptureError("its weights lie on several devices, and a graph belongs to one"))
        return True
    return known


def forget_refusals() -> None:
    """Let every model be tried again."""
    _refused.clear()


def new_memory(device: torch.device) -> Any:
    """Give memory that graphs share which are replayed one after the other; None on devices without graphs."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def as_replay(
    call: Callable[[], object], device: torch.device, memory: Any = None, model: Any | None = None
) -> Callable[[], object]:
    """Give the replay of a call that is captured, as a decoding step pays for it; on other devices the call itself.

    Args:
        call, device, memory: as for `capture`; the call's results are thrown away.
        model: the `TreeModel` whose forward the call is, if any. One that cannot be captured is tried once.

    Notes:
        Where capture fails, the reason is logged and the call is returned as it is: its time then contains launches.
    """
    if device.type != "cuda" or (model is not None and refused(model)):
        return call
    try:
        return capture(call, device, memory=memory).graph.replay
    except CaptureError as error:
        if model is not None and error.lasting:
            refuse(model, error)
        else:
            logger.warning("a call is timed uncaptured: %s", error)
        return call


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a CUDA device current; nothing for other devices.

    Streams and events belong to the device that is current when they are made or recorded, wherever tensors are.
    """
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
