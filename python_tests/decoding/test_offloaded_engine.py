"""How the loop treats a target that streams its layers, as far as a CPU shows it: with stand-ins for CUDA graphs."""

from __future__ import annotations

import dataclasses
import gc
import logging
import weakref
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from support.synthetic_profile import synthetic_profile
from support.tiny_families import tiny_model

from sequoia_kernels import TokenTree, generate
from sequoia_kernels.decoding import auto, overhead
from sequoia_kernels.decoding import engine as engines
from sequoia_kernels.measure import pair_times
from sequoia_kernels.offload import OffloadedModel, random_offloaded

TREE = TokenTree([-1, 0, 0, 1, 1, 3])
PROMPT = torch.tensor([[5, 9, 11, 2]])
OPTIONS = {"tree": TREE, "max_new_tokens": 16, "eos_token_id": ()}


class Recorded:
    """Stands for a captured part of a step: runs it, and counts."""

    made: ClassVar[list[Recorded]] = []

    def __init__(self, run_step, state):
        self.run_step, self.num_steps = run_step, 0
        self.num_captured = 0
        self.made.append(self)

    def step(self, tree):
        self.num_steps += 1
        return self.run_step(tree)

    def capture(self, tree):
        self.num_captured += 1


@pytest.fixture
def on_a_device(monkeypatch):
    """Let the engine take the CPU for a device that can capture what it does not have to stream."""
    Recorded.made = []

    def can_capture(target, draft):
        return target.capturable and (draft is None or draft.capturable)

    monkeypatch.setattr(engines, "can_capture", can_capture)
    monkeypatch.setattr(engines, "GraphedSteps", Recorded)
    monkeypatch.setattr(engines, "return_engine", lambda engine: None)
    return Recorded.made


@pytest.fixture
def target():
    with random_offloaded(tiny_model("llama", num_hidden_layers=4).config, resident_layers=1) as model:
        yield model


@pytest.fixture
def draft():
    return tiny_model("llama", num_hidden_layers=1)


def test_only_the_drafts_part_is_captured_and_that_is_said_once(target, draft, on_a_device, caplog):
    expected = generate(target, draft, PROMPT, cuda_graphs=False, **OPTIONS)
    assert on_a_device == []
    with caplog.at_level(logging.INFO, logger="sequoia_kernels"):
        outputs = [generate(target, draft, PROMPT, **OPTIONS) for _ in range(2)]
    assert [output.new_tokens for output in outputs] == [expected.new_tokens] * 2
    assert [recorded.num_steps for recorded in on_a_device] == [output.stats.num_steps for output in outputs]
    said = [record.getMessage() for record in caplog.records if "CUDA graphs" in record.getMessage()]
    assert said == [f"CUDA graphs hold the draft's part of a step only: {target!r} cannot be captured"]
    assert "3 of 4 layers streamed" in said[0]
    assert generate(target, None, PROMPT, **OPTIONS).new_tokens[0][0] == expected.new_tokens[0][0]
    assert len(on_a_device) == 2  # plain decoding has nothing to capture


def test_a_resident_target_is_captured_as_a_whole(draft, on_a_device):
    with random_offloaded(tiny_model("llama", num_hidden_layers=4).config, resident_layers=4) as model:
        stats = generate(model, draft, PROMPT, **OPTIONS).stats
    (recorded,) = on_a_device
    assert recorded.num_steps == stats.num_steps


def test_caches_go_with_the_call_and_not_with_the_garbage_collector(target, draft, on_a_device, monkeypatch):
    caches = []
    plain = OffloadedModel.new_cache

    def noted(self, *args, **options):
        caches.append(weakref.ref(cache := plain(self, *args, **options)))
        return cache

    monkeypatch.setattr(OffloadedModel, "new_cache", noted)
    monkeypatch.setattr(Recorded, "made", SimpleNamespace(append=lambda recorded: None))
    gc.collect()
    gc.disable()
    try:
        generate(target, draft, PROMPT, **OPTIONS)
        assert [cache() for cache in caches] == [None]
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("device", "capturable", "ahead"), [("cpu", True, 0), ("cuda", True, 1), ("cuda", False, 0), ("cpu", False, 0)]
)
def test_no_pass_is_launched_before_it_is_known_to_be_needed(device, capturable, ahead):
    assert engines.steps_ahead(SimpleNamespace(device=torch.device(device), capturable=capturable)) == ahead


def stand_in(device, capturable, max_positions):
    return SimpleNamespace(device=torch.device(device), capturable=capturable, max_positions=max_positions)


def test_the_overhead_beside_a_streamed_pass_is_not_measured(monkeypatch):
    monkeypatch.setattr(overhead, "adapt", lambda model: model)
    monkeypatch.setattr(overhead, "decode", None)
    before = synthetic_profile().with_overhead(3.0)
    found = overhead.measure_overhead(stand_in("cuda", False, None), stand_in("cuda", True, None), before)
    assert (found.step_overhead_ms, found.level_overhead_ms) == (0.0, 0.0)


def test_auto_times_a_streamed_target_at_few_sizes(monkeypatch):
    """The profile's own defaults for such a target, with sizes that fit the tiny models and the first tree."""
    monkeypatch.setattr(pair_times, "OFFLOADED_NODE_COUNTS", (1, 8, 32))
    monkeypatch.setattr(auto, "LEAST_SECONDS", 0.0)
    found = noted_profiles(monkeypatch)
    draft = tiny_model("llama")
    with random_offloaded(draft.config, resident_layers=0) as target:
        output = generate(target, draft, PROMPT, tree="auto", max_new_tokens=8, eos_token_id=())
    (measured,) = found
    table = measured.forward_table(measured.target_key)
    assert (table.node_counts, table.repeats) == ((1, 8, 32), 2)
    assert output.stats.tree.num_nodes <= 32


@pytest.mark.parametrize(("rows", "largest"), [(60, 32), (40, 8), (18, None)])
def test_auto_stays_within_the_targets_memory(rows, largest, monkeypatch):
    """A prompt of 4 and 8 new tokens take 11 rows of the budget; the rest is for trees."""
    monkeypatch.setattr(pair_times, "OFFLOADED_NODE_COUNTS", (1, 8, 32, 128))
    monkeypatch.setattr(auto, "LEAST_SECONDS", 0.0)
    found = noted_profiles(monkeypatch)
    draft = tiny_model("llama")
    with random_offloaded(draft.config, resident_layers=0) as target:
        memory = target.memory
        row_bytes = sum(tensor.nbytes for tensor in target.new_cache(1, 1).tensors())
        budget = memory.weight_bytes + memory.workspace_bytes + rows * row_bytes
        target.memory = dataclasses.replace(memory, budget_bytes=budget)
        assert target.max_cache_rows(1) == rows
        assert target.max_cache_rows(2) == rows // 2
        with pytest.raises(ValueError, match="must fit"):
            target.new_cache(1, rows + 1)
        for _ in range(3):
            output = generate(target, draft, PROMPT, tree="auto", max_new_tokens=8, eos_token_id=())
        plain = generate(target, None, PROMPT, max_new_tokens=8, eos_token_id=())
    assert output.new_tokens == plain.new_tokens
    sizes = [measured.forward_table(measured.target_key).node_counts[-1] for measured in found]
    assert sizes == ([] if largest is None else [largest])


def noted_profiles(monkeypatch):
    """The profiles that auto measures, in a process that knows none."""
    monkeypatch.setenv("SEQUOIA_CACHE", "0")
    monkeypatch.setattr(auto, "_profiles", type(auto._profiles)())
    monkeypatch.setattr(auto, "_pairs", type(auto._pairs)())
    found = []
    measure = auto._measure
    monkeypatch.setattr(auto, "_measure", lambda *arguments: found.append(measure(*arguments)) or found[-1])
    return found
