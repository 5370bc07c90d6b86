"""The ring of buffers over a simulated link: order, overlap, reuse, recovery and cancellation."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from support.simulated_link import SimulatedLink, VirtualClock
from support.streamed_layers import MemoryLayer, decoder_layers

from sequoia_kernels.offload import Link, ThreadLink
from sequoia_kernels.offload.layers import DecoderLayer
from sequoia_kernels.offload.scheduler import LayerStreamer

BANDWIDTH = 1e6


def build(num_layers: int, num_buffers: int, link: Link) -> tuple[list[DecoderLayer], LayerStreamer]:
    layers = decoder_layers(num_layers)
    sources = [MemoryLayer(layer) for layer in layers]
    return layers, LayerStreamer(layers, sources, num_buffers, torch.device("cpu"), link)


def run_pass(layers: list[DecoderLayer], streamer: LayerStreamer, clock: VirtualClock, compute_s: float) -> None:
    """Run every layer once; layer i holds the value i everywhere, as a NaN or another layer's values would not."""
    for index, layer in enumerate(layers):
        streamer.acquire(index)
        assert torch.equal(layer.module.weight, torch.full_like(layer.module.weight, float(index)))
        assert torch.equal(layer.module.steps, torch.full_like(layer.module.steps, index))
        clock.advance(compute_s)
        streamer.release()
        assert layer.module.weight.is_meta


@pytest.mark.parametrize("num_buffers", [1, 2, 3, 5])
@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_every_layer_runs_with_its_own_weights_pass_after_pass(num_layers: int, num_buffers: int) -> None:
    clock = VirtualClock()
    layers, streamer = build(num_layers, num_buffers, SimulatedLink(BANDWIDTH, clock=clock))
    for _ in range(4):
        run_pass(layers, streamer, clock, 1.0)
    assert streamer.num_copies == 4 * num_layers + num_buffers  # the next pass is under way


@pytest.mark.parametrize(("compute_share", "latency_s"), [(0.0, 0.0), (0.25, 0.0), (1.0, 0.0), (3.0, 0.0), (0.5, 0.01)])
def test_copies_and_compute_overlap_completely(compute_share: float, latency_s: float) -> None:
    """In the steady state a pass takes the longer of the two and not their sum, with two buffers already."""
    clock = VirtualClock()
    link = SimulatedLink(BANDWIDTH, latency_s, clock)
    layers, streamer = build(6, 2, link)
    copy_s = latency_s + layers[0].num_bytes / BANDWIDTH
    compute_s = compute_share * copy_s
    run_pass(layers, streamer, clock, compute_s)
    begin, stalled = clock.now, link.stalled_s
    for _ in range(3):
        run_pass(layers, streamer, clock, compute_s)
    assert clock.now - begin == pytest.approx(3 * 6 * max(copy_s, compute_s))
    assert link.stalled_s - stalled == pytest.approx(3 * 6 * max(0.0, copy_s - compute_s), abs=1e-12)
    # the link is never idle where it is the bottleneck
    if compute_s <= copy_s:
        assert all(start == pytest.approx(end) for (_, end), (start, _) in zip(link.history, link.history[1:]))


def test_one_buffer_cannot_overlap() -> None:
    clock = VirtualClock()
    layers, streamer = build(6, 1, SimulatedLink(BANDWIDTH, clock=clock))
    copy_s = layers[0].num_bytes / BANDWIDTH
    run_pass(layers, streamer, clock, copy_s)
    begin = clock.now
    run_pass(layers, streamer, clock, copy_s)
    assert clock.now - begin == pytest.approx(6 * 2 * copy_s)


def test_what_is_computed_between_passes_hides_the_first_layers() -> None:
    clock = VirtualClock()
    link = SimulatedLink(BANDWIDTH, clock=clock)
    layers, streamer = build(4, 2, link)
    run_pass(layers, streamer, clock, 0.0)
    copy_s = layers[0].num_bytes / BANDWIDTH
    clock.advance(10 * copy_s)  # the draft grows a tree
    stalled = link.stalled_s
    streamer.acquire(0)
    streamer.release()
    streamer.acquire(1)
    streamer.release()
    assert link.stalled_s == stalled
    streamer.acquire(2)
    assert link.stalled_s > stalled


def test_layers_in_any_order() -> None:
    clock = VirtualClock()
    layers, streamer = build(5, 2, SimulatedLink(BANDWIDTH, clock=clock))
    generator = torch.Generator().manual_seed(0)
    for index in torch.randint(0, 5, (60,), generator=generator).tolist():
        streamer.acquire(index)
        streamer.acquire(index)  # bound already
        assert torch.equal(layers[index].module.weight, torch.full_like(layers[index].module.weight, float(index)))
        if index % 2:  # else the layer breaks off, and the next one unbinds it
            streamer.release()
    run_pass(layers, streamer, clock, 0.1)


def test_layers_of_different_sizes_share_buffers() -> None:
    clock = VirtualClock()
    layers = decoder_layers(5, widths=[3, 8, 3, 5, 8])
    streamer = LayerStreamer(
        layers, [MemoryLayer(layer) for layer in layers], 2, torch.device("cpu"), SimulatedLink(BANDWIDTH, clock=clock)
    )
    assert [buffer.numel() for buffer in streamer.buffers] == [max(layer.num_bytes for layer in layers)] * 2
    for _ in range(3):
        run_pass(layers, streamer, clock, 0.1)


@pytest.fixture
def thread_link() -> Iterator[ThreadLink]:
    link = ThreadLink()
    yield link
    link.close()


@pytest.mark.parametrize("num_buffers", [1, 2, 4])
def test_a_thread_copies_what_the_simulation_copies(thread_link: ThreadLink, num_buffers: int) -> None:
    layers, streamer = build(5, num_buffers, thread_link)
    for _ in range(20):
        run_pass(layers, streamer, VirtualClock(), 0.0)


def test_closing_does_not_wait_for_a_slow_copy() -> None:
    """The copy of this link would take a day."""
    link = ThreadLink(bandwidth_bytes_per_s=1e-2, latency_s=10.0)
    _, streamer = build(3, 2, link)
    streamer.close()
    streamer.close()
    assert not link._worker.is_alive
    assert streamer.buffers == []
    assert streamer.sources == []
    with pytest.raises(RuntimeError, match="the model must be open, got a closed one"):
        streamer.acquire(0)


def test_closing_wakes_whoever_waits_for_a_copy() -> None:
    link = ThreadLink(latency_s=1e6)
    layers = decoder_layers(1)
    buffers = [torch.empty(layers[0].num_bytes, dtype=torch.uint8) for _ in range(2)]
    link.copy(MemoryLayer(layers[0]), buffers[0], None)
    queued = link.copy(MemoryLayer(layers[0]), buffers[1], None)
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            link.wait(queued)
        except RuntimeError as error:
            errors.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    link.close()
    waiter.join()
    assert len(errors) == 1
    with pytest.raises(RuntimeError, match="must be open"):
        link.copy(MemoryLayer(layers[0]), buffers[0], None)


def test_a_link_may_be_closed_in_its_own_thread() -> None:
    """As the garbage collector does that finds the model there."""
    link = ThreadLink()
    layers = decoder_layers(1)

    class Last(MemoryLayer):
        def write_into(self, destination: torch.Tensor) -> None:
            link.close()

    link.wait(link.copy(Last(layers[0]), torch.empty(layers[0].num_bytes, dtype=torch.uint8), None))
    link.close()
    assert not link._worker.is_alive


def test_a_failed_copy_is_reported_where_its_layer_is_wanted_and_can_be_repeated(thread_link: ThreadLink) -> None:
    layers = decoder_layers(4)
    sources = [MemoryLayer(layer) for layer in layers]
    sources[2].failures = 1
    streamer = LayerStreamer(layers, sources, 2, torch.device("cpu"), thread_link)
    for index in (0, 1):
        streamer.acquire(index)
        streamer.release()
    with pytest.raises(RuntimeError, match="a layer could not be copied: the disk is gone"):
        streamer.acquire(2)
    run_pass(layers, streamer, VirtualClock(), 0.0)


@pytest.mark.parametrize(("bandwidth", "latency", "message"), [(0.0, 0.0, "bandwidth"), (1.0, -1.0, "latency_s")])
def test_rates_out_of_range(bandwidth: float, latency: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"ThreadLink: {message}"):
        ThreadLink(bandwidth, latency)


def test_a_closed_simulation_refuses() -> None:
    layers = decoder_layers(1)
    link = SimulatedLink(BANDWIDTH)
    transfer = link.copy(MemoryLayer(layers[0]), torch.empty(layers[0].num_bytes, dtype=torch.uint8), None)
    link.close()
    with pytest.raises(RuntimeError, match="must be open"):
        link.wait(transfer)


def test_where_the_link_refuses_nothing_is_changed() -> None:
    """A mark that is made inside a graph's capture would mean nothing to the copies behind it."""

    class Refusing(SimulatedLink):
        refuses = False
        marks = 0

        def check(self) -> None:
            if self.refuses:
                raise RuntimeError("not from here")

        def mark(self) -> float:
            self.marks += 1
            return super().mark()

    link = Refusing(BANDWIDTH)
    layers, streamer = build(3, 2, link)
    run_pass(layers, streamer, link.clock, 1.0)
    marks, copies = link.marks, streamer.num_copies
    link.refuses = True
    for layer in (0, 2):
        with pytest.raises(RuntimeError, match="not from here"):
            streamer.acquire(layer)
        streamer.release()  # as the hooks do
    assert (link.marks, streamer.num_copies) == (marks, copies)
    link.refuses = False
    run_pass(layers, streamer, link.clock, 1.0)
