"""Caches in pages of one pool: the bits of a contiguous cache, for every forward; and what is refused."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from support.native_models import VOCAB, case_pair, lens_of, random_tree, tokens_of
from support.tiny_families import tiny_model

from sequoia_kernels.decoding.host_step import HostStep
from sequoia_kernels.drafts import DecodingState, TokenBuffers, TreeLayout
from sequoia_kernels.errors import UnsupportedModelError
from sequoia_kernels.models import (
    LayerSpec,
    PagedTreeCache,
    StepContext,
    TreeCache,
    TreeModel,
    adapt,
    causal_step,
    prefill,
)
from sequoia_kernels.models.attention import attend_along_tree, find_attention
from sequoia_kernels.models.tree_step import TreeStep
from sequoia_kernels.tree import TokenTree, Topology

PAGE_SIZES = (1, 16, 64)


@pytest.fixture(autouse=True)
def same_number_of_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def paged(model: TreeModel, row_counts: list[int], page_size: int, seed: int = 0) -> tuple[PagedTreeCache, TreeCache]:
    """A pool and the cache of requests of so many rows: shuffled pages, of which some are nobody's. NaN everywhere.

    Entries behind the pages that a request needs are -1.
    """
    counts = [-(-rows // page_size) for rows in row_counts]
    pages = list(range(sum(counts) + 3))
    random.Random(seed).shuffle(pages)
    table = torch.full((len(counts), max(counts) + 1), -1, dtype=torch.int32)
    for request, count in enumerate(counts):
        table[request, :count] = torch.tensor([pages.pop() for _ in range(count)])
    pool = model.new_paged_cache(sum(counts) + 3, page_size)
    for tensor in pool.tensors():
        tensor.fill_(float("nan"))
    return pool, pool.of(table)


def rows_of(pool: PagedTreeCache, cache: TreeCache, request: int, num_rows: int) -> list[torch.Tensor]:
    """The first rows of a request, of each of the pool's tensors. [num_rows, Hkv, D]"""
    rows = torch.arange(num_rows)
    pages = cache.block_table[request, rows // pool.page_size].long()
    return [tensor[pages, rows % pool.page_size] for tensor in pool.tensors()]


def count_written(pool: PagedTreeCache) -> int:
    """Rows of the pool that hold anything; the same in all of its tensors."""
    (count,) = {int((~tensor.isnan()).flatten(2).any(2).sum()) for tensor in pool.tensors()}
    return count


# ---- the same bits ----


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.float32),
        ("llama-biases", torch.bfloat16),
        ("mistral", torch.float32),  # windows
        ("gemma2", torch.bfloat16),  # windows in some layers, softcaps
        ("gemma3_text", torch.float32),
        ("gpt_neox", torch.float32),
        ("mixtral", torch.float32),
    ],
    ids=str,
)
def test_trees_behind_ragged_prompts_are_the_bits_of_a_contiguous_cache(name, dtype, page_size):
    native = case_pair(name, dtype).native
    assert native.runs == "native"
    lens, prompts, num_nodes = lens_of(7, 1, 64, 33), tokens_of(4, 4, 64), 27
    tree = random_tree(random.Random(3), num_nodes)
    step, nodes = TreeStep.of(tree.tensors()), tokens_of(5, 4, num_nodes)
    torch.set_num_threads(2)
    rows = native.new_cache(4, 100)
    pool, pages = paged(native, [64 + num_nodes] * 4, page_size, seed=page_size)
    scored = []
    for cache in (rows, pages):
        last = prefill(native, cache, prompts, lens)
        scored.append((last, native.forward(nodes, cache, lens, step)))
    assert torch.equal(scored[0][0], scored[1][0])
    assert torch.equal(scored[0][1], scored[1][1])
    assert bool(scored[0][1].isfinite().all())
    for request, length in enumerate(lens.tolist()):
        for mine, its in zip(rows_of(pool, pages, request, length + num_nodes), rows.tensors(), strict=True):
            assert torch.equal(mine, its[request, : length + num_nodes])
    assert count_written(pool) == sum(max(64, length + num_nodes) for length in lens.tolist())


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_levels_of_two_trees_and_wanted_rows(page_size):
    native = case_pair("mistral", torch.bfloat16).native
    trees = [TokenTree([-1, 0, 0, 0, 1, 1, 2, 4, 5]), TokenTree([-1, 0, 0, 0, 2, 2, 2, 4, 4])]
    topology = Topology.stack([tree.tensors() for tree in trees])
    lens, prompts, nodes = lens_of(31, 62), tokens_of(9, 2, 62), tokens_of(2, 2, 9)
    _, pages = paged(native, [71, 71], page_size)
    scored = []
    for cache in (native.new_cache(2, 80), pages):
        hidden = dict.fromkeys(range(native.num_layers + 1))
        results = [prefill(native, cache, prompts, lens)]
        for level in ([0], [1, 2, 3], [4, 5, 6], [7, 8]):
            results.append(native.forward(nodes[:, level], cache, lens, TreeStep.of(topology, level)))
        results.append(native.forward(nodes, cache, lens, TreeStep.of(topology), last_row=torch.tensor([8, 3])))
        native.forward(nodes, cache, lens, TreeStep.of(topology), hidden_states=hidden)
        scored.append([*results, *hidden.values()])
    assert all(map(torch.equal, *scored))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize(("name", "dtype"), [("llama", torch.bfloat16), ("mistral", torch.float32)], ids=str)
def test_prompts_of_several_chunks(name, dtype, page_size):
    native = case_pair(name, dtype).native
    prompts, lens = tokens_of(7, 2, 700), lens_of(700, 530)
    pool, pages = paged(native, [700, 700], page_size)
    rows = native.new_cache(2, 700)
    assert torch.equal(prefill(native, pages, prompts, lens), prefill(native, rows, prompts, lens))
    for request, length in enumerate(lens.tolist()):
        stored = zip(rows_of(pool, pages, request, length), rows.tensors(), strict=True)
        assert all(torch.equal(mine, its[request, :length]) for mine, its in stored)


def test_requests_share_the_pages_of_a_common_prompt():
    native = case_pair("gemma3_text").native
    pool = native.new_paged_cache(9, 8)
    prompt, nodes = tokens_of(1, 1, 32), tokens_of(2, 2, 5)
    table = torch.tensor([[3, 0, 7, 5, 1], [3, 0, 7, 5, 8]], dtype=torch.int32)
    prefill(native, pool.of(table[:1]), prompt, lens_of(32))
    scored = native.forward(nodes, pool.of(table), lens_of(32, 32), causal_step(5))
    rows = native.new_cache(2, 37)
    prefill(native, rows, prompt.expand(2, -1), lens_of(32, 32))
    assert torch.equal(scored, native.forward(nodes, rows, lens_of(32, 32), causal_step(5)))


@pytest.mark.parametrize("num_threads", [1, 2])
def test_padding_may_go_to_a_page_that_nobody_reads(num_threads):
    native = case_pair("llama", wide=True).native
    torch.set_num_threads(num_threads)
    lens, prompts, nodes = lens_of(3, 29, 8), tokens_of(1, 3, 29), tokens_of(2, 3, 6)
    pool = native.new_paged_cache(12, 8)
    table = torch.tensor([[5, 11, 0, 0, 0], [2, 8, 1, 4, 9], [7, 3, 0, 0, 0]], dtype=torch.int32)  # 0: padding
    scored = []
    for cache in (native.new_cache(3, 40), pool.of(table)):
        last = prefill(native, cache, prompts, lens)
        scored.append((last, native.forward(nodes, cache, lens, causal_step(6))))
    assert all(map(torch.equal, *scored))
    assert not any(tensor[[6, 10]].any() for tensor in pool.tensors())


# ---- bound forwards ----


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_bound_forwards_read_the_table_where_it_lies(page_size):
    native = case_pair("gemma2", torch.bfloat16).native
    lens, prompts, step = lens_of(20, 40), tokens_of(4, 2, 40), causal_step(6)
    pool, pages = paged(native, [40, 48], page_size)
    table = pages.block_table
    in_use = table.clone()
    table.fill_(-1)  # not read before a run
    tokens, lengths = torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)
    bound = native.bind(tokens, pages, lengths, step)
    wanted = torch.tensor([[5, 0], [2, 3]])
    of_some = native.bind(tokens, pages, lengths, step, wanted_rows=wanted)
    logits, some = torch.empty(bound.shape, dtype=torch.bfloat16), torch.empty(of_some.shape, dtype=torch.bfloat16)
    table.copy_(in_use)
    prefill(native, pages, prompts, lens)
    tokens.copy_(tokens_of(6, 2, 6))
    lengths.copy_(lens)
    expected = native.forward(tokens, pages, lens, step)
    assert bound.run(logits) and torch.equal(logits, expected)
    # The pages move, and the table with them.
    order = torch.randperm(pool.num_pages, generator=torch.Generator().manual_seed(1))
    for tensor in pool.tensors():
        moved = torch.full_like(tensor, float("nan"))
        moved[order] = tensor
        tensor.copy_(moved)
    table.copy_(torch.where(table < 0, table, order[table.clamp(min=0).long()].int()))
    assert not torch.equal(table, in_use)
    assert bound.run(logits) and torch.equal(logits, expected)
    assert of_some.run(some) and torch.equal(some, expected.gather(1, wanted[:, :, None].expand(-1, -1, VOCAB)))


@pytest.mark.parametrize("wrong", [-1, 11, 2**31 - 1, -(2**31)])
def test_a_bound_forward_refuses_pages_that_there_are_not(wrong):
    native = case_pair("llama").native
    pool = native.new_paged_cache(11, 4)
    table = torch.tensor([[0, 1, 2, -7], [3, 4, 5, 6]], dtype=torch.int32)
    bound = native.bind(tokens_of(0, 2, 3), pool.of(table), lens_of(8, 8), causal_step(3))
    logits = torch.zeros(bound.shape)
    assert bound.run(logits)  # the entry behind the rows in use is not read
    before = [tensor.clone() for tensor in pool.tensors()]
    logits.fill_(7.0)
    for place in ((0, 0), (0, 2), (1, 1), (1, 2)):
        kept = int(table[place])
        table[place] = wrong
        assert not bound.run(logits)
        table[place] = kept
    assert bool((logits == 7.0).all()) and all(map(torch.equal, pool.tensors(), before))


# ---- the modules ----


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("attention", ["reference", "host"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])  # windows, soft-caps, sinks, Dv != D
def test_modules_score_what_they_do_on_a_contiguous_cache(family, attention, page_size):
    model = adapt(tiny_model(family), forward="modules", attention=attention)
    vocab = model.num_embeddings
    lens, prompts, nodes = lens_of(23, 9), tokens_of(1, 2, 23) % vocab, tokens_of(2, 2, 7) % vocab
    step = TreeStep.of(TokenTree([-1, 0, 0, 1, 2, 2, 4]).tensors())
    pool, pages = paged(model, [30, 23], page_size)
    scored = []
    for cache in (model.new_cache(2, 32), pages):
        last = prefill(model, cache, prompts, lens)
        scored.append((last, model.forward(nodes, cache, lens, step)))
    for one, other in zip(*scored, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    # One request alone, whose rows follow each other in a contiguous cache.
    alone = model.forward(nodes[:1], pool.of(pages.block_table[:1]), lens[:1], step)
    torch.testing.assert_close(alone, scored[0][1][:1], rtol=1e-5, atol=1e-5)
    assert count_written(pool) == 30 + 23


@pytest.mark.slow
def test_compiled_modules_score_what_they_do_on_a_contiguous_cache():
    model = adapt(tiny_model("llama"), compile=True)
    vocab, step = model.num_embeddings, TreeStep.of(TokenTree([-1, 0, 0, 1, 2]).tensors())
    lens, prompts, nodes = lens_of(9, 4), tokens_of(1, 2, 9) % vocab, tokens_of(2, 2, 5) % vocab
    scored = []
    for cache in (model.new_cache(2, 16), paged(model, [14, 9], 4)[1]):
        prefill(model, cache, prompts, lens)
        scored.append(model.forward(nodes, cache, lens, step))
    torch.testing.assert_close(*scored, rtol=1e-5, atol=1e-6)


def test_an_attention_must_say_that_it_reads_block_tables():
    def attend(*arguments, **settings):
        tables.append(arguments[3].block_table)
        return attend_along_tree(*arguments, **settings)

    tables = []
    model = adapt(tiny_model("llama"), attention=attend)
    lens, tokens = lens_of(2), torch.tensor([[1, 2, 3]])
    model.forward(tokens, model.new_cache(1, 8), lens, causal_step(3))
    assert tables == [None] * model.num_layers
    pool, pages = paged(model, [8], 4)
    for tensor in pool.tensors():
        tensor.zero_()
    before = [tensor.clone() for tensor in pool.tensors()]
    tables.clear()
    with pytest.raises(UnsupportedModelError, match=r"cache must not be paged for .*`reads_block_tables`.* of 4 rows"):
        model.forward(tokens, pages, lens, causal_step(3))
    assert not tables and all(map(torch.equal, pool.tensors(), before))
    attend.reads_block_tables = True
    expected = adapt(model.model, attention="auto", forward="modules").forward(tokens, pages, lens, causal_step(3))
    assert torch.equal(model.forward(tokens, pages, lens, causal_step(3)), expected)
    assert len(tables) == model.num_layers and all(table is pages.block_table for table in tables)
    for bound in (partial(attend, backend="reference"), find_attention("reference")):  # settings change nothing
        scored = adapt(model.model, attention=bound).forward(tokens, pages, lens, causal_step(3))
        torch.testing.assert_close(scored, expected, rtol=1e-5, atol=1e-5)


def test_a_context_on_another_device_has_the_table_there():
    pool = case_pair("llama").native.new_paged_cache(3, 4)
    cache = pool.of(torch.tensor([[2, 0], [1, -1]], dtype=torch.int32))
    context = StepContext.create(cache, causal_step(2), lens_of(3, 1), attend_along_tree)
    assert context.block_table is cache.block_table
    assert (context.first_row, context.rows.tolist()) == (None, [11, 0, 5, 6])
    moved = context.on(torch.device("meta"))
    assert moved.block_table.is_meta and moved.block_table.shape == (2, 2) and moved.rows.is_meta


# ---- the storage ----


def test_pools_are_the_layers_storage_in_order():
    model = case_pair("gemma2", torch.bfloat16).native
    pool = model.new_paged_cache(5, 16)
    tensors = pool.tensors()
    assert [tuple(tensor.shape) for tensor in tensors] == [(5, 16, 3, 6)] * 4
    assert not any(tensor.any() for tensor in tensors)
    assert (pool.num_pages, pool.page_size, pool.specs) == (5, 16, model.new_cache(1, 1).specs)
    assert pool.bytes_per_row == 2 * 2 * 3 * 6 * 2
    assert pool.num_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    table = torch.zeros(3, 4, dtype=torch.int32)
    cache = pool.of(table)
    assert (cache.batch_size, cache.max_cache_len, cache.page_size) == (3, 64, 16)
    assert cache.block_table is table and cache.specs is pool.specs
    assert all(one is other for one, other in zip(cache.tensors(), tensors, strict=True))
    first = cache.first_layers(1)
    assert (first.block_table is table, first.page_size, len(first.tensors())) == (True, 16, 2)
    contiguous = model.new_cache(1, 4)
    assert (contiguous.block_table, contiguous.page_size) == (None, 0)


def test_latent_layers_have_widths_of_their_own():
    specs = (LayerSpec(2, 16, 12, torch.float32, torch.device("cpu"), None),)
    pool = PagedTreeCache(specs, 3, 2)
    assert [tuple(tensor.shape) for tensor in pool.tensors()] == [(3, 2, 2, 16), (3, 2, 2, 12)]
    assert (pool.bytes_per_row, pool.num_bytes) == (224, 1344)


def test_a_pool_made_in_inference_mode_works_outside():
    model = case_pair("llama").native
    with torch.inference_mode():
        cache = model.new_paged_cache(2, 4).of(torch.tensor([[1, 0]], dtype=torch.int32))
    assert not any(tensor.is_inference() for tensor in cache.tensors())
    lens = lens_of(0)
    outside = model.forward(torch.tensor([[1, 2]]), cache, lens, causal_step(2))
    with torch.inference_mode():
        inside = model.forward(torch.tensor([[1, 2]]), cache, lens, causal_step(2))
    assert torch.equal(outside, inside)


# ---- refusals ----


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ((0, 4), ValueError, r"PagedTreeCache: num_pages must be at least 1, got 0"),
        ((4, -1), ValueError, r"PagedTreeCache: page_size must be at least 1, got -1"),
        ((4.0, 4), TypeError, r"PagedTreeCache: num_pages must be an integer, got float"),
        ((4, True), TypeError, r"PagedTreeCache: page_size must be an integer, got bool"),
        ((2**20, 2**11), ValueError, r"num_pages \* page_size must be below 2\^31, got 1048576 \* 2048"),
    ],
)
def test_sizes_that_are_none(sizes, error, message):
    with pytest.raises(error, match=message):
        case_pair("llama").native.new_paged_cache(*sizes)


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        ([[0, 1]], TypeError, r"PagedTreeCache.of: block_table must be a tensor, got list"),
        (torch.zeros(1, 2), TypeError, r"block_table must have dtype int32, got float32"),
        (torch.zeros(1, 2, dtype=torch.int64), TypeError, r"block_table must have dtype int32, got int64"),
        (torch.zeros(2, dtype=torch.int32), ValueError, r"contiguous with shape \[batch, pages\], got \[2\]"),
        (torch.zeros(0, 2, dtype=torch.int32), ValueError, r"got \[0, 2\]"),
        (torch.zeros(2, 0, dtype=torch.int32), ValueError, r"got \[2, 0\]"),
        (torch.zeros(3, 4, dtype=torch.int32)[:, :2], ValueError, r"got \[3, 2\] with strides \(4, 1\)"),
    ],
)
def test_tables_that_are_none(table, error, message):
    with pytest.raises(error, match=message):
        case_pair("llama").native.new_paged_cache(3, 4).of(table)


@pytest.mark.parametrize("kind", ["native", "modules"])
def test_pages_that_there_are_not(kind):
    model = getattr(case_pair("mistral"), kind)
    pool = model.new_paged_cache(6, 4)
    table = torch.tensor([[0, 1, 2, -1], [3, 4, 5, 99]], dtype=torch.int32)
    cache, tokens, step = pool.of(table), tokens_of(0, 2, 3), causal_step(3)
    assert bool(model.forward(tokens, cache, lens_of(9, 4), step).isfinite().all())
    before = [tensor.clone() for tensor in pool.tensors()]
    message = r"forward: block_table must have pages in 0..5 for 13 rows of request 1, got 99 in place 3"
    with pytest.raises(ValueError, match=message):
        model.forward(tokens, cache, lens_of(9, 10), step)
    table[0, 1] = -1  # behind a window of four rows, and refused all the same
    with pytest.raises(ValueError, match=r"for 12 rows of request 0, got -1 in place 1"):
        model.forward(tokens, cache, lens_of(9, 4), step)
    with pytest.raises(ValueError, match=r"leave room for 3 tree rows in a cache of 16, got 14"):
        model.forward(tokens, cache, lens_of(14, 4), step)
    with pytest.raises(ValueError, match=r"cache must be this model's cache for 1 requests, got one of 2 layers for 2"):
        model.forward(tokens[:1], cache, lens_of(9), step)
    other = case_pair("llama").native.new_paged_cache(6, 4).of(table)
    with pytest.raises(ValueError, match="cache must be this model's cache as the model is now"):
        model.forward(tokens, other, lens_of(0, 0), step)
    assert all(map(torch.equal, pool.tensors(), before))


def test_a_table_on_another_device():
    model = case_pair("llama").native
    cache = model.new_paged_cache(6, 4).of(torch.zeros(1, 2, dtype=torch.int32, device="meta"))
    with pytest.raises(ValueError, match=r"block_table must be on the device of cache_lens, cpu, got meta"):
        model.forward(tokens_of(0, 1, 2), cache, lens_of(0), causal_step(2))


def test_what_reaches_beyond_a_view_is_refused():
    model = case_pair("llama").native
    pool = model.new_paged_cache(2, 4)
    cache = pool.of(torch.tensor([[0]], dtype=torch.int32))
    model.forward(tokens_of(0, 1, 2), cache, lens_of(0), causal_step(2))
    with pytest.raises(UnsupportedModelError, match=r"reset: cache must not be paged, got pages of 4 rows"):
        cache.reset()
    assert all(tensor[0].any() for tensor in pool.tensors())
    contiguous = model.new_cache(1, 4)
    contiguous.require_rows("anybody")
    state = DecodingState.create(1, torch.device("cpu"), seeds=[0], temperature=[0.0], top_k=None, top_p=None)
    layout = TreeLayout.build(TokenTree([-1, 0]), "cpu")
    buffers = TokenBuffers.allocate(layout, 1, VOCAB, torch.float32, torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match=r"HostStep: cache must not be paged"):
        HostStep(model, cache, state, layout, buffers, [], "sequoia")
