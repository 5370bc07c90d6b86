"""The CUDA backend on CPU tensors, on top of stand-ins for vLLM: which kernel gets which rows, and from what memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support.vllm_stand_ins import common_metadata, gpu_attention

from sequoia_kernels.ops import triton_device
from sequoia_kernels.ops.backends import unavailable_reason
from sequoia_kernels.tree import TokenTree

SEVEN = TokenTree([-1, 0, 0, 0, 1, 1, 2])
OTHER_SEVEN = TokenTree([-1, 0, 1, 1, 2, 4, 4])
FOUR = TokenTree([-1, 0, 0, 1])
TREES = (FOUR, SEVEN, OTHER_SEVEN)
NODES = 7
HEADS, KV_HEADS, DIM, PAGE, PAGES = 4, 2, 16, 4, 12
MOST_REQUESTS = 6
LAYOUTS = {"heads of a token": (0, 2, 1, 3), "tokens of a head": (0, 1, 2, 3)}


@pytest.fixture
def module(monkeypatch):
    """The backend's module; where no GPU is, the op takes the backend of CPU tensors."""
    module = gpu_attention(monkeypatch)
    monkeypatch.setattr(module, "TREE_BACKEND", "auto")
    return module


class Step(NamedTuple):
    """Requests of one step: rows, committed tokens, and the tree or None of each."""

    num_rows: list[int]
    committed: list[int]
    trees: list[TokenTree | None]


STEPS = {
    "trees of all": Step([7, 7, 7], [20, 3, 11], [SEVEN, OTHER_SEVEN, SEVEN]),
    "smaller trees": Step([4, 4], [9, 0], [FOUR, FOUR]),
    "trees, decoding, prompts": Step([7, 7, 1, 13, 5], [9, 30, 8, 6, 0], [SEVEN, SEVEN, None, None, None]),
    "two sizes in order": Step([4, 4, 7, 7, 2], [5, 6, 7, 8, 9], [FOUR, FOUR, SEVEN, OTHER_SEVEN, None]),
    "out of order": Step([7, 1, 7, 4, 9], [3, 14, 15, 9, 2], [OTHER_SEVEN, None, SEVEN, FOUR, None]),
    "two sizes out of order": Step([7, 4, 7, 4], [3, 14, 15, 9], [SEVEN, FOUR, OTHER_SEVEN, FOUR]),
    "cut trees": Step([5, 3, 7, 1], [30, 2, 9, 7], [SEVEN, FOUR, OTHER_SEVEN, None]),
    "the same rows of other trees": Step([3, 3, 3], [4, 5, 6], [FOUR, SEVEN, OTHER_SEVEN]),
    "no trees": Step([1, 1, 8], [5, 6, 0], [None, None, None]),
    "a prompt of as many rows": Step([7, 7], [9, 13], [SEVEN, None]),
    "prompts of as many rows": Step([7], [0], [None]),
}


class Layer:
    """A builder, a layer and its cache, whose rows are random and stay: keys and values are stored by vLLM."""

    def __init__(self, module: Any, layout: str = "heads of a token", device: str = "cpu", **settings: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        num_blocks = MOST_REQUESTS * PAGES + 1
        cache = torch.randn(num_blocks, KV_HEADS, PAGE, 2 * DIM, generator=generator)
        order = LAYOUTS[layout]
        self.cache = cache.permute(order).contiguous().permute(order).to(device)
        pages = 1 + torch.randperm(num_blocks - 1, generator=generator, dtype=torch.int64)
        self.block_table = pages.view(MOST_REQUESTS, PAGES).to(device, torch.int32)
        config = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=MOST_REQUESTS), num_speculative_tokens=NODES - 1
        )
        self.builder = module.DeviceTreeMetadataBuilder(None, [], config, torch.device(device))
        self.trees = self.builder.step_trees = module.DeviceTrees(TREES, MOST_REQUESTS, torch.device(device))
        settings = {"sliding_window": None, "logits_soft_cap": None, "sinks": None, **settings}
        self.settings = settings
        self.impl = module.DeviceTreeImpl(
            HEADS, DIM, DIM**-0.5, KV_HEADS, None, settings["sliding_window"], "auto",
            settings["logits_soft_cap"], "decoder", None, settings["sinks"],
        )  # fmt: skip
        self.device = device

    def build(self, step: Step, padded_to: int = 0) -> Any:
        self.trees.trees = step.trees
        meta = common_metadata(step.num_rows, step.committed, self.block_table, padded_to=padded_to, device=self.device)
        built = self.builder.build(0, meta)
        self.trees.forget()
        return built

    def queries(self, count: int, seed: int = 1) -> torch.Tensor:
        """Queries as a model gives them: a part of a wider product."""
        wide = torch.randn(count, 2 * HEADS * DIM, generator=torch.Generator().manual_seed(seed)).to(self.device)
        return wide[:, : HEADS * DIM].unflatten(1, (HEADS, DIM))

    def forward(self, metadata: Any, query: torch.Tensor) -> torch.Tensor:
        output = torch.full((len(query), HEADS, DIM), torch.nan, device=self.device)
        keys = torch.empty(len(query), KV_HEADS, DIM, device=self.device)
        assert self.impl.forward(None, query, keys, keys, self.cache, metadata, output) is output
        return output

    def expected(self, step: Step, query: torch.Tensor) -> torch.Tensor:
        """What each row sees, written out in float64."""
        found, first = [], 0
        rows_of = self.cache.permute(0, 2, 1, 3).double()
        for request, (count, committed, tree) in enumerate(zip(*step)):
            tree = tree or TokenTree.chain(count)
            rows = rows_of[self.block_table[request].long()].flatten(0, 1)[: committed + count]
            rows = rows.repeat_interleave(HEADS // KV_HEADS, 1)
            positions = [*range(committed), *(committed + depth for depth in tree.depths[:count])]
            for node in range(count):
                path, above = [], node
                while above >= 0:
                    path.append(committed + above)
                    above = tree.parents[above]
                seen = [*range(committed), *reversed(path)]
                window = self.settings["sliding_window"]
                if window is not None:
                    seen = [row for row in seen if positions[committed + node] - positions[row] < window]
                keys, values = rows[seen].split(DIM, dim=-1)
                scores = torch.einsum("hd,shd->hs", query[first + node].double(), keys) * DIM**-0.5
                cap = self.settings["logits_soft_cap"]
                scores = scores if cap is None else cap * torch.tanh(scores / cap)
                if self.settings["sinks"] is not None:
                    scores = torch.cat([scores, self.settings["sinks"].double()[:, None]], dim=1)
                found.append(torch.einsum("hs,shd->hd", scores.softmax(-1)[:, : len(seen)], values))
            first += count
        return torch.stack(found)


SETTINGS = {
    "plain": {},
    "window": {"sliding_window": 6},
    "softcap": {"logits_soft_cap": 2.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", STEPS)
def test_every_row_sees_what_it_should(module, name, settings, layout):
    layer, step = Layer(module, layout, **SETTINGS[settings]), STEPS[name]
    query = layer.queries(sum(step.num_rows))
    found = layer.forward(layer.build(step), query)
    torch.testing.assert_close(found.double(), layer.expected(step, query), atol=2e-6, rtol=2e-6)


ROWS_OF_FLASH_ATTENTION = {
    "trees of all": 0,
    "smaller trees": 0,
    "trees, decoding, prompts": 1 + 13 + 5,
    "two sizes in order": 2,
    "out of order": 7 + 1 + 7 + 4 + 9,  # all of them: what it says of trees is written anew
    "two sizes out of order": 0,
    "cut trees": 1,
    "the same rows of other trees": 0,
    "no trees": 1 + 1 + 8,
    "a prompt of as many rows": 0,
    "prompts of as many rows": 0,
}


@pytest.mark.parametrize("name", STEPS)
def test_prompts_and_plain_decoding_go_to_flash_attention(module, name):
    layer, step = Layer(module), STEPS[name]
    layer.forward(layer.build(step), layer.queries(sum(step.num_rows)))
    assert layer.impl.rows_seen == ROWS_OF_FLASH_ATTENTION[name]


@pytest.mark.parametrize("name", STEPS)
def test_trees_in_a_row_are_slices(module, name):
    layer, step = Layer(module), STEPS[name]
    groups = layer.build(step).groups
    scattered = {"out of order": {7}, "two sizes out of order": {7, 4}}
    assert {group.num_rows for group in groups if group.rows is not None} == scattered.get(name, set())


UNIFORM = [
    Step([7, 7, 7], [20, 3, 11], [SEVEN, OTHER_SEVEN, SEVEN]),
    Step([7, 7, 7], [0, 28, 5], [OTHER_SEVEN, SEVEN, None]),
    Step([7], [16], [OTHER_SEVEN]),
    Step([7, 7], [1, 2], [None, None]),
]


def addresses(group: Any) -> list[int]:
    return [part.data_ptr() for part in (group.masks, group.cache_lens, group.block_table)]


def test_a_captured_step_is_replayed_for_other_trees_lengths_pages_and_requests(module):
    layer = Layer(module)
    # As vLLM captures: a batch of its own, of as many rows as the largest tree has, without trees.
    captured = layer.build(Step([7, 7, 7, 7], [0, 0, 0, 0], []))
    (group,) = captured.groups
    for seed, step in enumerate(UNIFORM):
        layer.block_table.copy_(layer.block_table.roll(1, 0))  # pages are what vLLM last wrote to its own table
        (now,) = layer.build(step, padded_to=4).groups
        assert addresses(now) == addresses(group) and now.masks.shape == group.masks.shape
        query = layer.queries(4 * 7, seed)
        replayed = layer.forward(captured, query)
        rows = sum(step.num_rows)
        torch.testing.assert_close(replayed[:rows].double(), layer.expected(step, query), atol=2e-6, rtol=2e-6)
        assert replayed.isfinite().all()  # what only fills the batch is computed, too


def test_steps_between_do_not_move_what_a_captured_step_reads(module):
    layer = Layer(module)
    captured = layer.build(UNIFORM[0])
    for step in STEPS.values():
        layer.forward(layer.build(step), layer.queries(sum(step.num_rows)))
    step = UNIFORM[1]
    layer.build(step)
    query = layer.queries(21)
    torch.testing.assert_close(
        layer.forward(captured, query).double(), layer.expected(step, query), atol=2e-6, rtol=2e-6
    )


def test_only_steps_of_as_many_rows_as_the_largest_tree_may_be_captured(module):
    support = module.DeviceTreeMetadataBuilder._cudagraph_support
    assert support.name == "UNIFORM_BATCH"
    layer = Layer(module)
    for name, step in STEPS.items():
        built = layer.build(step)
        if step.num_rows == [NODES] * len(step.num_rows):
            assert built.rest is None and len(built.groups) == 1 and built.groups[0].rows is None, name


@pytest.mark.parametrize("name", STEPS)
def test_nothing_of_the_device_is_read_on_the_host(module, name):
    layer, step = Layer(module, device="meta"), STEPS[name]  # tensors without values: reading one raises
    built = layer.build(step)
    output = layer.forward(built, layer.queries(sum(step.num_rows)))
    assert output.is_meta
    rows = torch.arange(sum(step.num_rows), device="meta")
    layer.trees.move_positions_(rows.clone(), rows.clamp(max=1), rows)
    with pytest.raises((NotImplementedError, RuntimeError)):
        output.sum().item()


@pytest.mark.parametrize("name", STEPS)
def test_positions_are_depths(module, name):
    step = STEPS[name]
    trees = module.DeviceTrees(TREES, MOST_REQUESTS, torch.device("cpu"))
    trees.trees = step.trees
    num_rows = np.array(step.num_rows)
    requests = torch.from_numpy(np.repeat(np.arange(len(num_rows)), num_rows))
    rows = torch.cat([torch.arange(count) for count in step.num_rows])
    positions = torch.tensor(step.committed)[requests] + rows
    trees.move_positions_(positions, requests, rows)
    expected = [
        committed + (row if tree is None else tree.depths[row])
        for count, committed, tree in zip(*step)
        for row in range(count)
    ]
    assert positions.tolist() == expected


def test_trees_are_copied_to_the_device_when_they_change(module):
    trees = module.DeviceTrees(TREES, MOST_REQUESTS, torch.device("cpu"))
    place, copies = trees.numbers.data_ptr(), trees._numbers.copies
    for given, numbers, more in (
        ([SEVEN, None], [1, 3, 3, 3, 3, 3], 1),
        ([SEVEN, None], [1, 3, 3, 3, 3, 3], 0),
        ([SEVEN, None, None], [1, 3, 3, 3, 3, 3], 0),
        ([FOUR, OTHER_SEVEN, None], [0, 2, 3, 3, 3, 3], 1),
        ([], [3, 3, 3, 3, 3, 3], 1),
    ):
        trees.trees = given
        assert trees.numbers.tolist() == numbers and trees.numbers.data_ptr() == place
        copies += more
        assert trees._numbers.copies == copies


def test_masks_of_wide_trees_have_several_words(module):
    wide, chain = TokenTree([-1, *(0,) * 20, *range(1, 21)]), TokenTree.chain(41)
    trees = module.DeviceTrees((FOUR, wide), 2, torch.device("cpu"))
    assert trees.masks.shape == (3, 41, 2)
    assert trees.masks[0, :4, 0].tolist() == [1, 3, 5, 11] and not trees.masks[0, 4:].any()
    for row, tree in ((1, wide), (2, chain)):
        assert torch.equal(trees.masks[row], tree.ancestor_mask())


def test_without_the_tree_runner_it_is_flash_attention(module):
    layer = Layer(module)
    layer.builder.step_trees = None
    step = Step([7, 7], [3, 4], [None, None])
    query = layer.queries(14)
    found = layer.forward(layer.build(step), query)
    assert layer.impl.rows_seen == 14
    torch.testing.assert_close(found.double(), layer.expected(step, query), atol=2e-6, rtol=2e-6)


def test_steps_of_vllms_own_have_no_trees(module):
    layer = Layer(module)
    layer.build(STEPS["trees, decoding, prompts"])
    own = layer.build(Step([1, 1, 9], [0, 0, 0], []))  # numbers of the last step are still on the device
    assert own.groups == [] and own.rest.num_actual_tokens == 11
    layer.build(STEPS["trees, decoding, prompts"])
    meta = common_metadata([1, 1, 9], [0, 0, 0], layer.block_table)
    assert layer.builder.build(0, meta).groups == []


def test_a_forward_without_metadata_measures_memory(module):
    output = Layer(module).forward(None, torch.zeros(3, HEADS, DIM))
    assert not output.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_type": "encoder"}, "must be a decoder's, got one of an encoder"),
        ({"alibi_slopes": [0.5]}, "must have no ALiBi slopes"),
    ],
)
def test_layers_that_trees_do_not_serve_are_refused(module, change, message):
    given = {"attn_type": "decoder", "alibi_slopes": None, **change}
    with pytest.raises(ValueError, match=message):
        module.DeviceTreeImpl(4, 16, 1.0, 2, given["alibi_slopes"], None, "auto", None, given["attn_type"])


def test_what_the_backend_serves(module):
    backend = module.DeviceTreeBackend
    assert backend.get_name() == "CUSTOM"
    assert backend.get_impl_cls() is module.DeviceTreeImpl
    assert backend.get_builder_cls() is module.DeviceTreeMetadataBuilder
    assert [size for size in (4, 64, 100, 256, 512) if backend.supports_head_size(size)] == [64, 256]
    assert [kind for kind in ("decoder", "encoder", "encoder_only") if backend.supports_attn_type(kind)] == ["decoder"]
    assert "fp8" not in backend.supported_kv_cache_dtypes


@pytest.mark.parametrize("name", ["trees, decoding, prompts", "out of order"])
def test_trees_are_for_the_triton_kernel(monkeypatch, name):
    module = gpu_attention(monkeypatch)
    assert module.TREE_BACKEND == "triton"
    reason = unavailable_reason("tree_attention", "triton") or triton_device.device_reason(torch.device("cpu"))
    if reason is not None:
        pytest.skip(reason)
    layer, step = Layer(module), STEPS[name]
    query = layer.queries(sum(step.num_rows))
    found = layer.forward(layer.build(step), query)
    torch.testing.assert_close(found.double(), layer.expected(step, query), atol=2e-6, rtol=2e-6)
