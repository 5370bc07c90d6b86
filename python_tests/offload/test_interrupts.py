"""An interrupt may arrive anywhere in the main thread: the next call is right, no thread is left, closing frees all."""

from __future__ import annotations

import gc
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.interrupts import interrupt_everywhere
from support.simulated_link import SimulatedLink
from support.streamed_layers import MemoryLayer, decoder_layers
from support.tiny_families import tiny_model

from sequoia_kernels import TokenTree
from sequoia_kernels.models import TreeStep, prefill
from sequoia_kernels.offload import (
    Link,
    OffloadedModel,
    ThreadLink,
    host_memory,
    host_weights,
    layers,
    link,
    load_offloaded,
    lockstep,
    model,
    scheduler,
    threads,
)
from sequoia_kernels.offload.lockstep import Lockstep
from sequoia_kernels.offload.scheduler import LayerStreamer
from sequoia_kernels.offload.threads import Task, run_shielded
from sequoia_kernels.offload.weights import MadeWeights

CPU = torch.device("cpu")


def our_threads() -> list[str]:
    """Threads that must not outlive a call."""
    names = ("sequoia-chunk", "sequoia-close", "sequoia-test")
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(names)]


class First(KeyboardInterrupt):
    """The interrupt behind which another one is to arrive."""


def survive_first(work: Callable[[], Any]) -> None:
    """Run work that interrupts itself, and let pass only that: what arrives besides is raised, in whatever order."""
    try:
        work()
    except First:
        if sys.gettrace() is None:  # the tracer has raised the other one, which ends it
            raise KeyboardInterrupt from None


@pytest.fixture(autouse=True)
def collected_later() -> Iterator[None]:
    """What arrives while Python deletes an object is lost, so old garbage must not be in the way."""
    gc.disable()
    yield
    gc.enable()


# Threads


def test_a_task_ends_or_never_begins() -> None:
    tasks: list[Task] = []
    done: list[int] = []

    def work() -> None:
        tasks.append(Task(lambda: done.append(1), "sequoia-test"))
        tasks[0].start()
        tasks[0].wait()
        assert done == [1]

    def check() -> None:
        for task in tasks:
            task.end()
            assert our_threads() == []
            assert len(done) == task.begun
            task.start()  # too late
            task.end()
            assert len(done) == task.begun
        tasks.clear()
        done.clear()

    assert interrupt_everywhere(work, check, [threads], "opcode") > 50


def test_what_is_shielded_comes_to_its_end() -> None:
    done: list[int] = []

    def work() -> None:
        def function() -> None:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            done.append(1)

        run_shielded(function, "sequoia-test")

    def check() -> None:
        assert our_threads() == []
        assert len(done) <= 1
        done.clear()

    def interrupt(number: int, frame: Any) -> None:
        raise First

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with pytest.raises(First):
            work()
        assert done == [1]
        check()
        interrupt_everywhere(lambda: survive_first(work), check, [threads])
    finally:
        signal.signal(signal.SIGINT, before)


def test_without_threads_to_be_had_a_task_says_so_and_the_shield_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*arguments: Any) -> None:
        raise RuntimeError("can't start new thread")

    done: list[int] = []
    for place, name in ((threads._thread, "start_new_thread"), (threading.Thread, "start")):
        with monkeypatch.context() as patched:
            patched.setattr(place, name, none_left)
            task = Task(lambda: done.append(1), "sequoia-test")
            task.start()
            task.wait()
            assert isinstance(task.error, RuntimeError)
            assert not task.begun
            run_shielded(lambda: done.append(2), "sequoia-test")
            assert done == [2]
            with pytest.raises(RuntimeError, match="can't start new thread"):
                Lockstep().run([lambda: done.append(3)], CPU)
            [layer] = decoder_layers(1)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                ThreadLink().copy(MemoryLayer(layer), torch.empty(layer.num_bytes, dtype=torch.uint8), None)
            done.clear()


# The ring


@pytest.mark.parametrize("kind", ["simulated", "thread"])
def test_the_ring_starts_anew_behind_an_interrupted_change(kind: str) -> None:
    found = decoder_layers(3)
    connection: Link = SimulatedLink(1e6) if kind == "simulated" else ThreadLink()
    streamer = LayerStreamer(found, [MemoryLayer(layer) for layer in found], 2, CPU, connection)

    def run_pass() -> None:
        for index, layer in enumerate(found):
            streamer.acquire(index)
            assert torch.equal(layer.module.weight, torch.full_like(layer.module.weight, float(index)))
            assert torch.equal(layer.module.steps, torch.full_like(layer.module.steps, index))
            streamer.release()
            assert all(layer.module.weight.is_meta and layer.module.steps.is_meta for layer in found)

    run_pass()
    places = interrupt_everywhere(run_pass, run_pass, [scheduler, layers, link, threads], "opcode")
    assert places > 500
    streamer.close()


def test_a_link_leaves_the_copies_stream_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt in torch's own context manager may leave the thread on the stream of the copies."""
    current = ["outer"]
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "copies")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", current.append)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    connection = link.CudaLink(torch.device("cuda", 0))
    connection.recover()
    assert current == ["outer"]

    def launch(*arguments: Any) -> None:
        current.append("copies")
        raise KeyboardInterrupt

    monkeypatch.setattr(connection, "launch", launch)
    [layer] = decoder_layers(1)
    source = MemoryLayer(layer)
    monkeypatch.setattr(MemoryLayer, "block", source.content)
    with pytest.raises(KeyboardInterrupt):
        connection.copy(source, torch.empty(layer.num_bytes, dtype=torch.uint8), None)
    connection.recover()
    assert current[-1] == "outer"


# Models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny_model("llama", num_hidden_layers=3).save_pretrained(path)
    return path


def forwards(tree_model: OffloadedModel, prompt_len: int) -> list[torch.Tensor]:
    """Logits of a prompt, in chunks of four, and of a tree behind it, and what they left in the cache."""
    tree = TokenTree([-1, 0, 0])
    tensors = tree.tensors(CPU)
    step = TreeStep(tensors.ancestor_mask, torch.arange(3, dtype=torch.int32), tensors.depths, 3, 0)
    lens = torch.tensor([prompt_len], dtype=torch.int32)
    cache = tree_model.new_cache(1, prompt_len + 3)
    first = [prefill(tree_model, cache, torch.arange(3, 3 + prompt_len)[None], lens)] if prompt_len else []
    return [*first, tree_model.forward(torch.tensor([[5, 6, 7]]), cache, lens, step), *cache.tensors()]


STAGES = {"decode": 0, "prefill": 8}


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["sequoia_kernels.models.prefill"], "_CHUNK_ROWS", 4)


class Interrupts:
    """A layer's hook that interrupts the main thread once when it is armed, in whatever thread the layer runs."""

    def __init__(self, tree_model: OffloadedModel) -> None:
        self.armed = False
        tree_model.model.model.layers[1].mlp.register_forward_pre_hook(self)

    def __call__(self, module: Any, inputs: Any) -> None:
        if self.armed:
            self.armed = False
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


@pytest.fixture
def first_interrupts() -> Iterator[None]:
    def interrupt(number: int, frame: Any) -> None:
        raise First

    before = signal.signal(signal.SIGINT, interrupt)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(("stage", "host_memory"), [("decode", "mapped"), ("prefill", "packed")])
def test_the_call_behind_an_interrupted_one_is_right(folder: Path, stage: str, host_memory: str) -> None:
    with load_offloaded(folder, host_memory=host_memory, resident_layers=1) as tree_model:
        expected = forwards(tree_model, STAGES[stage])

        def check() -> None:
            assert our_threads() == []
            found = forwards(tree_model, STAGES[stage])
            assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))

        # The ring has a test of its own.
        places = interrupt_everywhere(
            lambda: forwards(tree_model, STAGES[stage]), check, [model, lockstep, threads, host_weights]
        )
        assert places > 50


@pytest.mark.usefixtures("chunks", "first_interrupts")
@pytest.mark.parametrize("stage", STAGES)
def test_a_second_interrupt_while_the_first_is_dealt_with(folder: Path, stage: str) -> None:
    with load_offloaded(folder) as tree_model:
        expected = forwards(tree_model, STAGES[stage])
        interrupts = Interrupts(tree_model)

        def work() -> None:
            interrupts.armed = True
            forwards(tree_model, STAGES[stage])

        def check() -> None:
            interrupts.armed = False
            found = forwards(tree_model, STAGES[stage])
            assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
            assert our_threads() == []

        with pytest.raises(First):
            work()
        assert our_threads() == []
        check()
        places = interrupt_everywhere(lambda: survive_first(work), check, [model, lockstep, threads])
        assert places > 20


class CountedLock:
    """Stands for what locks pages."""

    def __init__(self) -> None:
        self.locked: set[int] = set()

    def lock(self, block: torch.Tensor) -> None:
        self.locked.add(block.data_ptr())

    def unlock(self, block: torch.Tensor) -> None:
        self.locked.discard(block.data_ptr())


def weight_threads() -> int:
    return sum(thread.name == "sequoia-weights" for thread in threading.enumerate())


def test_interrupted_packing_leaves_nothing_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_weights, "available_host_bytes", lambda: None)
    lock, found = CountedLock(), decoder_layers(2)
    weights = MadeWeights(lambda name, tensor: tensor.fill_(1))
    names = {packed.name: packed.name for layer in found for packed in layer.tensors}

    kept: list[Any] = []

    def work() -> None:
        kept.append(host_weights.pack_layers(found, weights, names, lock))
        assert len(lock.locked) == 2
        host_memory.close_all(kept[0])

    def check() -> None:
        kept.clear()  # here: what interrupts the end of an object is lost
        assert lock.locked == set()
        assert our_threads() == []

    assert interrupt_everywhere(work, check, [host_weights, host_memory, threads], "opcode") > 500


def test_an_interrupted_load_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = CountedLock()
    monkeypatch.setattr(model, "_page_lock", lambda device: lock)
    running = weight_threads()

    def check() -> None:
        assert lock.locked == set()
        assert our_threads() == []
        assert weight_threads() == running

    def work() -> None:
        load_offloaded(folder, resident_layers=2).close()

    assert interrupt_everywhere(work, check, [model], stride=11) > 300


@pytest.mark.usefixtures("first_interrupts")
def test_an_interrupted_close_frees_all_or_can_be_repeated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = CountedLock()
    monkeypatch.setattr(model, "_page_lock", lambda device: lock)
    running = weight_threads()
    opened: list[OffloadedModel] = []

    def work() -> None:
        tracer = sys.gettrace()
        sys.settrace(None)
        opened.append(load_offloaded(folder))
        interrupts = Interrupts(opened[0])
        with opened[0] as tree_model:
            interrupts.armed = True
            with pytest.raises(First):
                forwards(tree_model, 0)
            assert len(lock.locked) == 3
            sys.settrace(tracer)

    def check() -> None:
        for tree_model in opened:
            if tree_model._closing.alive:  # the interrupt came before closing had begun
                tree_model.close()
        assert lock.locked == set()
        assert our_threads() == []
        assert weight_threads() == running
        opened.clear()

    assert interrupt_everywhere(work, check, [model, scheduler, threads, link]) > 20
