"""Captured steps and copies, with a stand-in for CUDA; on a device: python_tests/gpu."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.tiny_models import noisy_copy, tiny_llama

from sequoia_kernels import TokenTree, cuda_graphs, generate, release_engines
from sequoia_kernels.cuda_graphs import Captured, CaptureError
from sequoia_kernels.decoding import engine as engines
from sequoia_kernels.decoding.engine import GraphedSteps
from sequoia_kernels.decoding.loop import HostCopy, on_target_device
from sequoia_kernels.decoding.step import EmittedTokens
from sequoia_kernels.drafts import DecodingState

OTHER = torch.device("cuda", 1)
TREES = [TokenTree([-1, 0, 0, 1]), TokenTree.chain(3)]


def new_state():
    return DecodingState.create(2, torch.device("cpu"), seeds=[3, 4], temperature=[0, 0], top_k=None, top_p=None)


@pytest.mark.parametrize("failing_run", [None, 1, 2, 3])
def test_a_captured_step_starts_from_the_state_before(fake_cuda, failing_run):
    state, runs = new_state(), []

    def step(tree):
        runs.append(tree)
        fake_cuda.launch(None, lambda: state.offsets.add_(tree.num_nodes))
        if failing_run is not None:
            state.cache_lens += 7  # of a step that got to somewhere
            if len(runs) == failing_run:
                raise RuntimeError("broken")
        return tree

    graphed = GraphedSteps(step, state)
    if failing_run is not None:
        with pytest.raises(RuntimeError, match="broken"):
            graphed.capture(TREES[0])
        assert graphed.num_captured == 0
    else:
        graphed.capture(TREES[0])
        graphed.capture(TREES[0])
        assert graphed.num_captured == 1 and runs == TREES[:1] * 3
    assert state.offsets.tolist() == state.cache_lens.tolist() == [0, 0]
    fake_cuda.assert_untouched()
    if failing_run is None:
        assert graphed.step(TREES[0]) is TREES[0]
        assert state.offsets.tolist() == [4, 4] and len(runs) == 3
        assert graphed.step(TREES[1]) is TREES[1]  # not captured: it runs
        assert state.offsets.tolist() == [7, 7] and len(runs) == 4


def test_tokens_are_copied_and_awaited_on_their_own_devices_stream(fake_cuda, monkeypatch):
    """Recorded on another stream, the event would be over before the copies are."""

    class Tensor:
        device, shape, dtype = OTHER, (1,), torch.int64

        def copy_(self, other, non_blocking):
            assert non_blocking
            fake_cuda.log.append(f"copy on {fake_cuda.current_stream()}")

        def tolist(self):
            return [5]

    monkeypatch.setattr(torch, "empty", lambda shape, dtype, pin_memory: Tensor())
    copy = HostCopy(EmittedTokens(Tensor(), Tensor(), Tensor()))
    fake_cuda.assert_untouched()
    assert copy.read() == ([5], [5], [5])
    assert fake_cuda.log == [
        *3 * ["copy on default of cuda:1"],
        "record on default of cuda:1",
        "wait for default of cuda:1",
    ]


def test_a_call_runs_with_the_targets_device_as_the_current_one(fake_cuda):
    @on_target_device
    def call(target, draft=None):
        return fake_cuda.current_device()

    target = SimpleNamespace(device=OTHER)
    assert call(target) == call(target=target) == call(draft=None, target=target) == 1
    assert call(SimpleNamespace(device=torch.device("cpu"))) == call(None) == 0
    with pytest.raises(TypeError):
        call()
    fake_cuda.assert_untouched()


def test_generate_runs_so(fake_cuda, monkeypatch):
    class Stop(Exception):
        pass

    def adapt(target, **options):
        raise Stop(fake_cuda.current_device())

    monkeypatch.setattr("sequoia_kernels.decoding.generation.adapt", adapt)
    with pytest.raises(Stop, match="1"):
        generate(SimpleNamespace(device=OTHER), None, torch.zeros(1, 3, dtype=torch.int64))
    fake_cuda.assert_untouched()


# The engine: which part of a step is captured


@pytest.fixture
def pair():
    target = tiny_llama(0, vocab_size=61)
    return target, noisy_copy(target, 0.5)


@pytest.fixture
def captures(monkeypatch):
    """Capture on a CPU: replays run the call again. Gives what was tried; `captures.fail` maps models to errors."""
    tried = SimpleNamespace(num=0, fail={}, forwards=[])

    def capture(call, device, *, memory, undo):
        tried.num += 1
        tried.forwards.clear()
        call()
        undo()
        for model, error in tried.fail.items():
            if model in tried.forwards:
                raise error
        return Captured(SimpleNamespace(replay=lambda: results.append(call())), Latest(results))

    results = []

    class Latest:
        """The results of the latest replay, under the names that a step's have."""

        def __init__(self, results):
            self._results = results

        def __getattr__(self, name):
            return getattr(self._results[-1], name)

        def __iter__(self):
            return iter(self._results[-1])

    forward = engines.TreeModel.forward

    def recorded(self, *args, **kwargs):
        tried.forwards.append(self.model)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(engines.TreeModel, "forward", recorded)
    monkeypatch.setattr(engines, "capture", capture)
    monkeypatch.setattr(engines, "can_capture", lambda *pair: not any(map(engines.refused, engines._models(*pair))))
    release_engines()
    yield tried
    release_engines()


PROMPT = torch.arange(9)[None]
OPTIONS = {"tree": TREES[0], "max_new_tokens": 20, "eos_token_id": ()}


def run(target, draft, **options):
    return generate(target, draft, PROMPT, **{**OPTIONS, **options}).new_tokens


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("who", [None, "target", "draft", "both"])
def test_what_cannot_be_captured_is_launched_and_not_tried_again(pair, captures, caplog, who, temperature):
    target, draft = pair
    options = {"temperature": temperature, "seed": 3}
    expected = run(target, draft, cuda_graphs=False, **options)
    assert captures.num == 0
    guilty = {None: [], "target": [target], "draft": [draft], "both": [target, draft]}[who]
    captures.fail = {model: CaptureError("it waits for the device") for model in guilty}
    counts = []
    for _ in range(3):
        assert run(target, draft, **options) == expected
        counts.append(captures.num)
    warned = [record.getMessage() for record in caplog.records if "capture is off" in record.getMessage()]
    # the whole step, then the draft's part; a draft that is captured with no step around it is so in every call
    assert counts == {None: [1, 1, 1], "target": [2, 3, 4], "draft": [2, 2, 2], "both": [2, 2, 2]}[who]
    assert [message.endswith("it waits for the device") for message in warned] == [True] * (who is not None)
    blamed = {None: [], "target": [target], "draft": [draft], "both": [draft]}[who]
    assert [model for model in pair if model in cuda_graphs._refused] == blamed


def test_without_a_draft_the_target_is_remembered(pair, captures, caplog):
    captures.fail = {pair[0]: CaptureError("it waits for the device")}
    expected = run(pair[0], None, cuda_graphs=False)
    assert [run(pair[0], None) for _ in range(2)] == [expected] * 2
    assert captures.num == 1 and len(caplog.records) == 1
    release_engines()  # after which it is tried again
    run(pair[0], None)
    assert captures.num == 2


def test_a_lack_of_memory_stops_captures_for_one_call(pair, captures, caplog):
    """What was captured before is replayed, by this call and the next, which tries the rest again."""
    target, draft = pair
    expected = run(target, draft, cuda_graphs=False)
    run(target, draft)
    captures.fail = {target: CaptureError("out of memory", lasting=False)}
    wide = TokenTree([-1, 0, 0, 0, 0])
    plain = run(target, draft, cuda_graphs=False, tree=wide)
    before = captures.num
    for turn in (1, 2):
        assert run(target, draft, tree=wide) == plain
        assert captures.num == before + turn
    assert not cuda_graphs._refused
    captures.fail = {}
    assert run(target, draft) == expected
    assert captures.num == before + 2  # the first tree's graph is still there
    assert run(target, draft, tree=wide) == plain
    assert captures.num == before + 3
