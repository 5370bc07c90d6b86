"""compact_kv_cache_: against a row-by-row oracle; overlap, pages, canaries, tables, and what is refused."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from support.buffers import Unchanged
from support.op_backends import op_backends

from sequoia_kernels.cuda_graphs import capture
from sequoia_kernels.ops import CacheTable, backends, compact_kv_cache_
from sequoia_kernels.ops.compact_kv_cache_ import reference as reference_backend
from sequoia_kernels.ops.compact_kv_cache_.cache_table import ENTRY_FIELDS
from sequoia_kernels.ops.compact_kv_cache_.op import OPERATOR, CompactCall

FLOAT8 = torch.float8_e4m3fn


@pytest.fixture(params=op_backends("compact_kv_cache_"))
def backend(request):
    return request.param


@pytest.fixture(params=["list", "table"])
def given_as(request):
    """Caches as a list of tensors or as a CacheTable."""
    return request.param


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def numbered(batch_size, num_slots, num_heads, head_dim, dtype=torch.float32, start=0):
    """A cache whose elements all differ (where the dtype can tell them apart), as a view of [B, H, S, D]."""
    count = batch_size * num_heads * num_slots * head_dim
    values = (torch.arange(count) + start).reshape(batch_size, num_heads, num_slots, head_dim)
    return (values % 251).to(dtype).transpose(1, 2) if dtype != torch.float32 else values.to(dtype).transpose(1, 2)


def padded(paths, num_levels=None, filler=-1):
    """Paths of several requests as accepted_nodes and num_accepted; what lies behind a path must not matter."""
    num_levels = num_levels or max(len(path) for path in paths)
    rows = [[*path, *[filler] * (num_levels - len(path))] for path in paths]
    return int32(rows).reshape(len(paths), num_levels), int32([len(path) for path in paths])


def expected_cache(cache, paths, cache_lens):
    """Every source row is read from the cache as it was."""
    after = cache.clone()
    for request, (path, cache_len) in enumerate(zip(paths, cache_lens)):
        for depth, node in enumerate(path):
            after[request, cache_len + depth] = cache[request, cache_len + node]
    return after


def expected_pages(cache, block_table, paths, cache_lens):
    after, page_size = cache.clone(), cache.shape[1]
    for request, (path, cache_len) in enumerate(zip(paths, cache_lens)):
        for depth, node in enumerate(path):
            source, target = cache_len + node, cache_len + depth
            after[block_table[request, target // page_size], target % page_size] = cache[
                block_table[request, source // page_size], source % page_size
            ]
    return after


def compact(backend, caches, paths, cache_lens, *, given_as="list", num_levels=None, filler=-1, block_table=None):
    """Run on the backend's device and bring the caches and lengths back."""
    device = backend.device
    moved = [cache.to(device) for cache in caches] if device.type != "cpu" else caches
    given = CacheTable(moved, paged=block_table is not None) if given_as == "table" else moved
    nodes, counts = (tensor.to(device) for tensor in padded(paths, num_levels, filler))
    lens = int32(cache_lens).to(device)
    table = None if block_table is None else block_table.to(device)
    with Unchanged(nodes, counts, table):
        result = backend(given, nodes, counts, lens, block_table=table, raw=True)
    assert result is None
    for cache, on_device in zip(caches, moved):
        if on_device is not cache:
            cache.copy_(on_device)
    return lens.cpu()


def check(backend, caches, paths, cache_lens, **options):
    expected = [expected_cache(cache, paths, cache_lens) for cache in caches]
    lens = compact(backend, caches, paths, cache_lens, **options)
    for cache, want in zip(caches, expected, strict=True):
        assert torch.equal(cache, want)
    assert lens.tolist() == [cache_len + len(path) for cache_len, path in zip(cache_lens, paths)]


PATHS = {
    "root only": [0],
    "chain, nothing moves": [0, 1, 2, 3],
    "one moves": [0, 2],
    "rows overlap": [0, 2, 3, 4, 5],
    "late divergence": [0, 1, 2, 5, 9],
    "first level skipped": [3, 4, 5, 6],
    "far": [0, 7, 19, 30],
    "nothing accepted": [],
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
@pytest.mark.parametrize("cache_len", [0, 1, 9])
def test_one_request(backend, given_as, path, cache_len):
    caches = [numbered(1, 40, 2, 8, start=start) for start in (0, 1000)]
    check(backend, caches, [path], [cache_len], given_as=given_as, num_levels=6)


def test_every_path_of_a_small_tree(backend):
    for length in range(6):
        for path in itertools.combinations(range(5), length):
            check(backend, [numbered(1, 8, 1, 4)], [list(path)], [2], num_levels=5, filler=99)


def test_ragged_batch(backend, given_as):
    paths = [[0, 2, 5], [], [0], [1, 2, 3, 4], [0, 1, 2]]
    caches = [numbered(5, 32, 3, 8, start=start) for start in range(3)]
    check(backend, caches, paths, [0, 32, 5, 27, 13], given_as=given_as, num_levels=4, filler=-(2**31))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, FLOAT8], ids=str
)
def test_dtypes(backend, dtype):
    caches = [numbered(2, 20, 2, 8, dtype=dtype), numbered(2, 20, 2, 8, dtype=dtype, start=7)]
    expected = [expected_cache(cache.view(torch.uint8), [[0, 3, 4], [2, 9]], [4, 7]) for cache in as_bytes(caches)]
    compact(backend, caches, [[0, 3, 4], [2, 9]], [4, 7])
    for cache, want in zip(as_bytes(caches), expected):
        assert torch.equal(cache, want)


def as_bytes(caches):
    return [cache.view(torch.uint8) for cache in caches]


def test_nan_rows_move_and_stay_bit_for_bit(backend):
    cache = numbered(1, 12, 2, 4)
    cache[0, 5] = float("nan")
    cache[0, 11] = float("nan")
    before = cache.clone()
    compact(backend, [cache], [[0, 2]], [3])
    assert cache[0, 4].isnan().all() and cache[0, 11].isnan().all()
    unmoved = [slot for slot in range(12) if slot != 4]
    torch.testing.assert_close(cache[:, unmoved], before[:, unmoved], rtol=0, atol=0, equal_nan=True)


def test_caches_of_different_shapes(backend, given_as):
    """Target and draft, K and V: heads, head dims, dtypes and lengths differ; odd row sizes included."""
    caches = [
        numbered(2, 30, 2, 8),
        numbered(2, 30, 2, 24, start=3),
        numbered(2, 41, 1, 5, dtype=torch.bfloat16),
        numbered(2, 26, 7, 3, dtype=torch.int8),
    ]
    check(backend, caches, [[0, 4, 6], [1, 3]], [19, 2], given_as=given_as)


@pytest.mark.parametrize("layout", ["[B, S, H, D]", "[B, H, S, D]", "head slice of a wider cache", "K beside V"])
def test_strides_and_canaries(backend, layout):
    """Whatever lies between the rows of a strided cache stays as it was."""
    cache = numbered(2, 20, 3, 8)
    if layout == "[B, S, H, D]":
        storage = cache.contiguous()
        view = storage
    elif layout == "[B, H, S, D]":
        storage = cache
        view = storage
    elif layout == "head slice of a wider cache":
        storage = torch.full((4, 22, 5, 10), -77.0)
        view = storage[1:3, 1:21, 1:4, 1:9]
        view.copy_(cache)
    else:
        storage = torch.full((2, 20, 3, 2, 8), -77.0)
        view = storage[:, :, :, 0]
        view.copy_(cache)
    expected_storage = storage.clone()
    paths, cache_lens = [[0, 2, 3], [4, 5]], [6, 14]
    after = expected_cache(view, paths, cache_lens)
    expected_view = torch.as_strided(expected_storage, view.shape, view.stride(), view.storage_offset())
    expected_view.copy_(after)
    on_device = storage.to(backend.device)
    compact(backend, [on_device.as_strided(view.shape, view.stride(), view.storage_offset())], paths, cache_lens)
    assert torch.equal(on_device.cpu(), expected_storage)


@pytest.mark.parametrize("page_size", [1, 4, 7])
def test_pages(backend, given_as, page_size):
    batch_size, num_slots = 3, 28
    pages_each = -(-num_slots // page_size)
    num_pages = batch_size * pages_each + 2
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(page_size))
    block_table = order[: batch_size * pages_each].reshape(batch_size, pages_each).to(torch.int32)
    paths, cache_lens = [[0, 3, 4, 9], [], [0, 1, 5]], [11, 28, 0]
    caches = [numbered(num_pages, page_size, 2, head_dim, start=head_dim) for head_dim in (8, 3)]
    expected = [expected_pages(cache, block_table, paths, cache_lens) for cache in caches]
    lens = compact(backend, caches, paths, cache_lens, given_as=given_as, block_table=block_table)
    for cache, want in zip(caches, expected):
        assert torch.equal(cache, want)
    assert lens.tolist() == [15, 28, 3]


def paged_pair():
    """Caches of a target and a draft in pages of other sizes and other orders, and one without pages."""
    target, draft, plain = numbered(8, 7, 2, 8), numbered(14, 3, 1, 5, start=7), numbered(2, 21, 2, 4, start=3)
    pages = [int32([[5, 2, 0], [1, 7, 3]]), int32([[9, 0, 4, 13, 2, 7, 6], [1, 12, 3, 8, 5, 10, 11]]), None]
    return [target, draft, plain], pages


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0), (0, 0)])
def test_caches_with_block_tables_of_their_own(backend, order):
    """All of them start from the lengths as they were, and these advance once."""
    paths, cache_lens = [[0, 3, 4, 9], [2, 5]], [11, 4]
    nodes, counts = (tensor.to(backend.device) for tensor in padded(paths))
    (*caches, plain), (*pages, _) = paged_pair()
    expected = [expected_pages(cache, table, paths, cache_lens) for cache, table in zip(caches, pages)]
    expected.append(expected_cache(plain, paths, cache_lens))
    moved = [paged_pair()[0][index].to(backend.device) for index in order]
    tables = [CacheTable([cache], paged=index < 2) for index, cache in zip(order, moved)]
    pages = [None if index == 2 else pages[index].to(backend.device) for index in order]
    lens = int32(cache_lens).to(backend.device)
    backend(tables, nodes, counts, lens, block_table=pages, raw=True)
    assert lens.tolist() == [15, 6]
    for index, cache in zip(order, moved):
        assert torch.equal(cache.cpu(), expected[index])


def test_nothing_is_written_if_any_of_several_tables_is_refused(backend):
    if backend.device.type != "cpu":
        pytest.skip("values are checked on CPU tensors only")
    caches, pages = paged_pair()
    pages[1][1, 2] = 14  # row 6 of the second request, a page that does not exist
    tables = [CacheTable([cache], paged=index < 2) for index, cache in enumerate(caches)]
    nodes, counts = padded([[0, 3, 4, 9], [2, 5]])
    lens = int32([11, 4])
    with Unchanged(*caches, lens):
        with pytest.raises(ValueError, match=r"block_table must name pages from 0 to 13, got \[8, 12, 14\]"):
            backend(tables, nodes, counts, lens, block_table=pages, raw=True)
        with pytest.raises(ValueError, match=r"caches\[2\] must be a CacheTable\(..., paged=True\) with a block_table"):
            backend(tables, nodes, counts, lens, block_table=[*pages[:2], pages[0]], raw=True)
        with pytest.raises(ValueError, match="block_table must have one for each of 3 CacheTables, got 2"):
            backend(tables, nodes, counts, lens, block_table=pages[:2], raw=True)
        with pytest.raises(ValueError, match=r"block_table\[1\] must have shape \[batch, pages\] with batch 2, got"):
            backend(tables, nodes, counts, lens, block_table=[pages[0], pages[1][:1], None], raw=True)
        with pytest.raises(ValueError, match=r"caches\[1\].caches\[0\] must have the batch 2 of accepted_nodes"):
            backend([tables[2], CacheTable([torch.zeros(3, 21, 1, 4)])], nodes, counts, lens, raw=True)
        for again in (caches[2], caches[2][:, 3:]):
            with pytest.raises(ValueError, match=r"caches\[0\].caches\[0\] must share no memory with caches\[1\]"):
                backend([tables[2], CacheTable([again])], nodes, counts, lens, raw=True)


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (1,), (1, 1)])
def test_caches_on_another_device_than_the_lengths(order, monkeypatch):
    """The meta device stands in for a second one. It computes nothing, so look at what its backend is given."""
    op = importlib.import_module("sequoia_kernels.ops.compact_kv_cache_.op")
    # Torch's dispatcher would only check shapes, as meta tensors ask for.
    monkeypatch.setattr(op.OPERATOR, "_operator", op.OPERATOR._run_in_place)
    caches = [numbered(2, 12, 2, 4), numbered(2, 12, 2, 4).to("meta")]
    tables = [CacheTable([caches[index]]) for index in order]
    expected = expected_cache(caches[0], [[0, 2], [1, 3]], [3, 4]) if 0 in order else caches[0].clone()
    seen, run = [], reference_backend.run

    def noted(inputs, outputs):
        devices = {tensor.device.type for tensor in [*inputs.caches, *inputs[1:4]]}
        seen.append((len(inputs.caches), *devices, inputs.advance))
        run(inputs)

    monkeypatch.setattr(backends._load("compact_kv_cache_", "reference"), "run", noted)
    lens = int32([3, 4])
    compact_kv_cache_(tables, *padded([[0, 2], [1, 3]]), lens, backend="reference")
    assert seen == [(1, "meta", False)] * order.count(1) + [(order.count(0), "cpu", True)]
    assert torch.equal(caches[0], expected) and lens.tolist() == [5, 6]
    lens = int32([3, 11])
    with Unchanged(caches[0], lens), pytest.raises(ValueError, match="must stay inside a cache of 12 slots with 11"):
        compact_kv_cache_(tables, *padded([[0, 2], [1, 3]]), lens, backend="reference")


def test_tables_by_device():
    on_cpu, elsewhere = torch.zeros(1, 8, 2, 4), torch.zeros(1, 6, 2, 4, device="meta")
    tables = CacheTable.by_device([on_cpu, elsewhere, on_cpu.clone(), elsewhere.clone()])
    assert repr(tables) == "[CacheTable(2 caches, 8 slots), CacheTable(2 caches, 6 slots)]"
    assert [table.entries.device.type for table in tables] == ["cpu", "meta"]
    assert CacheTable.by_device([]) == []
    with pytest.raises(TypeError, match=r"CacheTable: caches\[1\] must be a tensor, got NoneType"):
        CacheTable.by_device([on_cpu, None])


@pytest.mark.parametrize("unused", [-1, 5, 10**9])
def test_entries_of_unused_pages_may_be_anything(backend, unused):
    """Also those of a request that accepts nothing, even where its unused pages are ones that another request uses."""
    cache = numbered(6, 4, 1, 4)
    block_table = int32([[unused] * 4, [3, 5, unused, unused], [unused] * 4, [unused] * 4])
    expected = cache.clone()
    expected[5, 0] = cache[5, 2]  # slot 4 <- slot 6
    lens = compact(backend, [cache], [[], [0, 3], [], []], [1, 3, 0, 16], block_table=block_table)
    assert torch.equal(cache, expected)
    assert lens.tolist() == [1, 5, 0, 16]
    compact(backend, [cache], [[], []], [1, 3], num_levels=2, block_table=int32([[unused] * 4] * 2))
    assert torch.equal(cache, expected)


def test_full_cache(backend):
    check(backend, [numbered(1, 12, 1, 4)], [[0, 2, 4]], [7])
    check(backend, [numbered(1, 12, 1, 4)], [[0, 1, 2, 3, 4]], [7])
    check(backend, [numbered(1, 12, 1, 4)], [[]], [12], num_levels=3)


def test_a_path_longer_than_a_warp(backend):
    check(backend, [numbered(1, 200, 1, 4)], [list(range(0, 120, 2))], [60])


def test_no_caches_and_no_requests(backend):
    lens = int32([3, 4]).to(backend.device)
    backend([], int32([[0, 1], [0, 1]]).to(backend.device), int32([2, 1]).to(backend.device), lens, raw=True)
    assert lens.tolist() == [5, 5]
    lens = int32([2**30 - 4, 0]).to(backend.device)
    backend([], int32([[0, 1], [0, 1]]).to(backend.device), int32([2, 0]).to(backend.device), lens, raw=True)
    assert lens.tolist() == [2**30 - 2, 0]
    empty = torch.zeros(0, 8, 1, 4, device=backend.device)
    nothing = int32([]).to(backend.device)
    backend([empty], nothing.reshape(0, 3), nothing, nothing.clone(), raw=True)


@pytest.mark.parametrize("shape", [(2, 0, 1, 4), (2, 8, 0, 4), (2, 8, 1, 0)], ids=["no rows", "no heads", "no columns"])
@pytest.mark.parametrize("paged", [False, True])
def test_empty_caches(backend, given_as, shape, paged):
    path = [0, 2] if shape[1] else []
    block_table = int32([[0, -1], [1, -1]]) if paged else None
    caches = [torch.zeros(shape), torch.zeros(shape)]
    lens = compact(backend, caches, [path, []], [0, 0], given_as=given_as, num_levels=2, block_table=block_table)
    assert lens.tolist() == [len(path), 0]
    if paged:
        lens = compact(backend, caches, [[], []], [0, 0], num_levels=2, block_table=int32([[], []]))
        assert lens.tolist() == [0, 0]


def test_strided_lengths_and_paths(backend):
    device = backend.device
    cache = numbered(2, 20, 1, 4)
    expected = expected_cache(cache, [[0, 2], [1, 3]], [5, 6])
    on_device = cache.to(device)
    lens = int32([[5, -7], [6, -7]]).to(device)
    nodes = int32([[0, 1], [2, 3]]).t().to(device)
    counts = int32([2, 0, 2, 0]).to(device)[::2]
    backend([on_device], nodes.contiguous().t().contiguous().t(), counts, lens[:, 0], raw=True)
    assert torch.equal(on_device.cpu(), expected)
    assert lens.tolist() == [[7, -7], [8, -7]]


@pytest.mark.parametrize("paged", [False, True])
def test_the_reference_for_devices_equals_the_one_for_cpus(paged):
    """On a device the reference must not read lengths; that code runs on CPU tensors as well."""
    paths, cache_lens = [[0, 2, 5], [], [0], [1, 2, 3, 4]], [0, 32, 5, 27]
    nodes, counts = padded(paths, filler=-5)
    cache = numbered(4, 32, 2, 4)
    block_table = int32([[4 * request + page for page in range(4)] for request in range(4)]) if paged else None
    given = cache.reshape(16, 8, 2, 4) if paged else cache.clone()
    expected = expected_cache(cache, paths, cache_lens)
    reference_backend.move_all_requests([given], nodes, counts, int32(cache_lens), block_table)
    assert torch.equal(given.reshape(cache.shape), expected)


@pytest.mark.gpu
def test_graph_replay_follows_lengths_on_the_device(backend):
    if backend.device.type != "cuda":
        pytest.skip("graphs are captured on CUDA devices")
    cache = numbered(1, 40, 2, 8)
    on_device = cache.cuda()
    table = CacheTable([on_device])
    nodes, counts, lens = int32([[0, 2, 5]]).cuda(), int32([3]).cuda(), int32([4]).cuda()
    backend(table, nodes, counts, lens, raw=True)
    graph, _ = capture(lambda: compact_kv_cache_(table, nodes, counts, lens, backend=backend.name), lens.device)
    on_device.copy_(cache)
    lens.fill_(9)
    graph.replay()
    assert torch.equal(on_device.cpu(), expected_cache(cache, [[0, 2, 5]], [9]))
    assert lens.tolist() == [12]


# The table and the torch operator


def test_cache_table_describes_the_caches():
    key, value = numbered(2, 12, 3, 8), numbered(2, 10, 3, 4, dtype=torch.bfloat16).contiguous()
    table = CacheTable([key, value])
    assert len(table) == 2 and table.num_slots == 10 and table.max_row_bytes == 96
    assert table.entries.tolist() == [
        [key.data_ptr(), 3 * 12 * 8 * 4, 8 * 4, 12 * 8 * 4, 3, 32, 12],
        [value.data_ptr(), 10 * 3 * 4 * 2, 3 * 4 * 2, 4 * 2, 3, 8, 10],
    ]
    assert repr(table) == "CacheTable(2 caches, 10 slots)"
    pages = CacheTable([numbered(7, 4, 1, 8)], paged=True)
    assert pages.num_slots == 7 and repr(pages) == "CacheTable(1 paged caches, 7 pages)"


def test_the_table_is_laid_out_as_the_native_modules_read_it():
    """Both read csrc/cache_entry.h; Triton's kernel takes its columns from the same names."""
    host = pytest.importorskip("sequoia_kernels._host")
    assert host.cache_entry_offsets == {name: 8 * column for column, name in enumerate(ENTRY_FIELDS)}
    assert list(host.cache_entry_offsets) == list(ENTRY_FIELDS)


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_operator(name):
    caches = [numbered(2, 12, 2, 4), numbered(2, 12, 2, 4, start=5)]
    nodes, counts = padded([[0, 2], [1, 3]])
    operator = torch.ops.sequoia.compact_kv_cache_.default
    for block_tables, sizes in (([None], [2]), ([int32([[0], [1]])], [2]), ([int32([[0], [1]]), None], [1, 1])):
        entries = [None] * len(sizes)
        groups = (block_tables, entries, sizes, [0, 0, 0] * len(sizes))
        torch.library.opcheck(operator, (caches, nodes, counts, int32([3, 4]), *groups, False, name))


def test_compiled_function_with_several_tables():
    (target, draft, _), pages = paged_pair()
    paths = [[0, 3, 4, 9], [2, 5]]
    expected = [expected_pages(target, pages[0], paths, [11, 4]), expected_pages(draft, pages[1], paths, [11, 4])]
    tables, lens = [CacheTable([target], paged=True), CacheTable([draft], paged=True)], int32([11, 4])

    def commit(nodes, counts, lens):
        compact_kv_cache_(tables, nodes, counts, lens, block_table=pages[:2])
        return lens * 2

    doubled = torch.compile(commit, backend="aot_eager", fullgraph=True)(*padded(paths), lens)
    assert torch.equal(target, expected[0]) and torch.equal(draft, expected[1])
    assert lens.tolist() == [15, 6] and doubled.tolist() == [30, 12]


@pytest.mark.parametrize("as_table", [False, True])
def test_compiled_function(as_table):
    def commit(caches, nodes, counts, lens):
        compact_kv_cache_(caches, nodes, counts, lens)
        return lens * 2

    cache, lens = numbered(1, 12, 2, 4), int32([3])
    expected = expected_cache(cache, [[0, 2, 4]], [3])
    nodes, counts = padded([[0, 2, 4]])
    caches = CacheTable([cache]) if as_table else [cache]
    doubled = torch.compile(commit, backend="aot_eager", fullgraph=True)(caches, nodes, counts, lens)
    assert torch.equal(cache, expected)
    assert lens.tolist() == [6] and doubled.tolist() == [12]


# What is refused


def good():
    nodes, counts = padded([[0, 2], [1, 3]], num_levels=3)
    return {
        "caches": [numbered(2, 12, 2, 4), numbered(2, 12, 2, 4)],
        "accepted_nodes": nodes,
        "num_accepted": counts,
        "cache_lens": int32([3, 4]),
    }


WRONG_TYPES = [
    (
        {"caches": torch.zeros(2, 12, 2, 4)},
        "caches must be a list of tensors, a CacheTable or a list of them, got Tensor",
    ),
    ({"caches": [None]}, r"caches\[0\] must be a tensor, got NoneType"),
    ({"accepted_nodes": [[0]]}, "accepted_nodes must be a tensor, got list"),
    ({"accepted_nodes": torch.zeros(2, 3, dtype=torch.int64)}, "accepted_nodes must have dtype int32, got int64"),
    ({"num_accepted": torch.zeros(2)}, "num_accepted must have dtype int32, got float32"),
    ({"cache_lens": torch.zeros(2, dtype=torch.int64)}, "cache_lens must have dtype int32, got int64"),
    ({"block_table": torch.zeros(2, 3, dtype=torch.int64)}, "block_table must have dtype int32, got int64"),
    ({"block_table": [[0], [1]]}, "block_table must be a tensor, got list"),
    ({"backend": b"host"}, "backend must be a string, got bytes"),
    ({"debug": 1}, "debug must be a bool, got int"),
    ({"caches": [CacheTable([]), torch.zeros(1)]}, r"caches\[0\] must be a tensor, got CacheTable"),
    ({"caches": [CacheTable([])], "block_table": int32([[0], [1]])}, "block_table must be a list with one for each of"),
    ({"caches": [CacheTable([])] * 2, "block_table": [None, 3]}, r"block_table\[1\] must be a tensor, got int"),
]

OVERLAPPING = torch.zeros(2, 12, 2, 6)

WRONG_VALUES = [
    ({"caches": [OVERLAPPING[..., :4], OVERLAPPING[..., 3:]]}, r"caches\[0\] must share no memory with caches\[1\]"),
    ({"caches": [torch.zeros(1, 12, 2, 4).expand(2, 12, 2, 4)]}, r"caches\[0\] must have memory of its own for each"),
    ({"caches": [torch.zeros(2, 12, 8)]}, r"caches\[0\] must have shape \[batch, slots, heads, head dim\], got"),
    (
        {"caches": [torch.zeros(1, 12, 2, 4)]},
        r"caches\[0\] must have the batch 2 of accepted_nodes, got \[1, 12, 2, 4\]",
    ),
    ({"caches": [torch.zeros(2, 12, 2, 4), torch.zeros(3, 12, 2, 4)]}, r"caches\[1\] must have the batch 2 of caches"),
    ({"caches": [torch.zeros(2, 12, 4, 2).transpose(2, 3)]}, r"caches\[0\] must be contiguous in its last dimension"),
    ({"caches": [torch.zeros(2, 12, 2, 4, device="meta")]}, r"caches\[0\] must be on cpu, got meta"),
    ({"accepted_nodes": int32([0, 2])}, r"accepted_nodes must have shape \[batch, levels\], got \[2\]"),
    ({"num_accepted": int32([2])}, r"num_accepted must have shape \[batch\] = \[2\], got \[1\]"),
    ({"cache_lens": int32([2, 3, 4])}, r"cache_lens must have shape \[batch\] = \[2\], got \[3\]"),
    ({"num_accepted": int32([2, 4])}, "num_accepted must be from 0 to 3, got 4 for request 1"),
    ({"num_accepted": int32([-1, 2])}, "num_accepted must be from 0 to 3, got -1 for request 0"),
    (
        {"accepted_nodes": int32([[0, 2, 3], [3, 1, 0]])},
        r"accepted_nodes must be tree slots that increase .* got \[3, 1\]",
    ),
    (
        {"accepted_nodes": int32([[0, 0, 3], [1, 2, 0]])},
        r"accepted_nodes must be tree slots that increase .* got \[0, 0\]",
    ),
    ({"accepted_nodes": int32([[0, 2, 3], [-1, 1, 0]])}, "accepted_nodes must be tree slots that increase"),
    ({"accepted_nodes": int32([[0, 2, 3], [1, 8, 0]])}, "accepted_nodes must stay inside a cache of 12 slots with 4"),
    ({"cache_lens": int32([3, 9])}, "accepted_nodes must stay inside a cache of 12 slots with 9 committed"),
    ({"cache_lens": int32([-1, 9])}, "cache_lens must be from 0 to 12, got -1 for request 0"),
    ({"cache_lens": int32([13, 4]), "num_accepted": int32([0, 2])}, "cache_lens must be from 0 to 12, got 13"),
    ({"block_table": int32([[0]])}, r"block_table must have shape \[batch, pages\] with batch 2, got \[1, 1\]"),
    ({"block_table": int32([[0], [2]])}, r"block_table must name pages from 0 to 1, got \[2\] for request 1"),
    ({"block_table": int32([[-1], [1]])}, r"block_table must name pages from 0 to 1, got \[-1\] for request 0"),
    ({"caches": [], "num_accepted": int32([2, 4])}, "num_accepted must be from 0 to 3, got 4 for request 1"),
    ({"caches": [], "num_accepted": int32([2, 2**31 - 1])}, "num_accepted must be from 0 to 3, got 2147483647"),
    ({"caches": [], "num_accepted": int32([-2, 2])}, "num_accepted must be from 0 to 3, got -2 for request 0"),
    ({"caches": [], "accepted_nodes": int32([[0, 2, 3], [3, 1, 0]])}, "accepted_nodes must be tree slots that incr"),
    ({"caches": [], "cache_lens": int32([3, -1])}, "cache_lens must be from 0 to 1073741823, got -1 for request 1"),
    ({"caches": [], "cache_lens": int32([2**31 - 1, 4])}, "cache_lens must be from 0 to 1073741823, got 2147483647"),
    ({"caches": [], "cache_lens": int32([2**30 - 2, 4])}, "accepted_nodes must stay inside a cache of 1073741823"),
    (
        {"caches": [], "cache_lens": int32([-1, 4]), "block_table": int32([[0], [0]])},
        "cache_lens must be from 0 to 1073741823, got -1 for request 0",
    ),
    ({"backend": "memcpy"}, "backend must be one of auto, reference.*, got 'memcpy'"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG_TYPES)
def test_wrong_types(changes, message):
    with pytest.raises(TypeError, match=f"^compact_kv_cache_: {message}"):
        compact_kv_cache_(**{**good(), **changes})


@pytest.mark.parametrize(("changes", "message"), WRONG_VALUES)
def test_wrong_values_leave_everything_as_it_was(backend, given_as, changes, message):
    if backend.device.type != "cpu":
        pytest.skip("values are checked on CPU tensors only")
    arguments = {**good(), "backend": backend.name, **changes}
    if given_as == "table":
        if "caches" in changes:
            pytest.skip("a CacheTable refuses these itself")
        arguments["caches"] = CacheTable(arguments["caches"], paged="block_table" in changes)
    caches = arguments["caches"].caches if given_as == "table" else arguments["caches"]
    on_cpu = [tensor for tensor in (*caches, arguments["cache_lens"]) if tensor.device.type == "cpu"]
    with Unchanged(*on_cpu), pytest.raises(ValueError, match=f"^compact_kv_cache_: {message}"):
        compact_kv_cache_(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("changes", "message"), [case for case in WRONG_VALUES if not {"caches", "backend"} & set(case[0])]
)
def test_debug_checks_values_on_a_device(changes, message):
    arguments = {**good(), **changes}
    arguments["caches"] = [cache.cuda() for cache in arguments["caches"]]
    arguments = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    with (
        Unchanged(*arguments["caches"], arguments["cache_lens"]),
        pytest.raises(ValueError, match=f"^compact_kv_cache_: {message}"),
    ):
        compact_kv_cache_(**arguments, debug=True)


def test_debug_alone_asks_for_what_waits(monkeypatch):
    asked = []
    monkeypatch.setattr(OPERATOR, "check_use", asked.append)
    compact_kv_cache_(**good())
    assert asked == []
    compact_kv_cache_(**good(), debug=True)
    assert len(asked) == 1


def test_debug_reads_pages_that_a_call_would_not_wait_for(monkeypatch):
    """Pages on a device are read under debug only; here a CPU's tensors say that they lie elsewhere."""
    arguments = {**good(), "block_table": int32([[0], [2]])}
    call = CompactCall(
        arguments["caches"], *(arguments[name] for name in ("accepted_nodes", "num_accepted", "cache_lens")),
        [arguments["block_table"]], [None], [2], [0, 0, 0],
    )  # fmt: skip
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    (launch,) = OPERATOR.launches(call)
    with pytest.raises(ValueError, match=r"block_table must name pages from 0 to 1, got \[2\] for request 1"):
        OPERATOR.check_use(launch)


def test_lengths_that_share_memory_are_refused(backend):
    arguments = {name: value for name, value in good().items() if name != "caches"}
    caches = [cache.to(backend.device) for cache in good()["caches"]]
    for name in ("accepted_nodes", "num_accepted", "block_table"):
        moved = {other: value.to(backend.device) for other, value in arguments.items()}
        moved["block_table"] = int32([[0], [1]]).to(backend.device) if name == "block_table" else None
        moved["cache_lens"] = moved[name] if name == "num_accepted" else moved[name][:, 0]
        with (
            Unchanged(*caches, *moved.values()),
            pytest.raises(ValueError, match="cache_lens must share no memory with"),
        ):
            backend(caches, **moved, raw=True)


@pytest.mark.parametrize(
    ("caches", "paged", "message"),
    [
        ([OVERLAPPING[..., :4], OVERLAPPING[..., 3:]], False, r"caches\[0\] must share no memory with caches\[1\]"),
        ([OVERLAPPING, OVERLAPPING], True, "must share no memory with"),
        ([torch.zeros(2, 12, 8)], False, r"CacheTable: caches\[0\] must have shape \[batch, slots, heads, head dim\]"),
        ([torch.zeros(2, 12, 2, 4), torch.zeros(3, 12, 2, 4)], False, "must have the batch 2 of caches"),
        ([torch.zeros(2, 12, 2, 4), torch.zeros(2, 11, 2, 4)], True, "must have the page size 12 of caches"),
    ],
)
def test_cache_table_refuses(caches, paged, message):
    with pytest.raises(ValueError, match=message):
        CacheTable(caches, paged=paged)


def test_cache_table_refuses_wrong_types():
    for arguments, message in (
        ({"caches": OVERLAPPING}, "caches must be a list of tensors, got Tensor"),
        ({"caches": None}, "caches must be a list of tensors, got NoneType"),
        ({"caches": [OVERLAPPING], "paged": 1}, "paged must be a bool, got int"),
    ):
        with pytest.raises(TypeError, match=f"^CacheTable: {message}"):
            CacheTable(**arguments)


def test_a_table_of_the_other_kind_is_refused():
    arguments = good()
    with pytest.raises(ValueError, match=r"caches must be a CacheTable\(..., paged=True\) with a block_table"):
        compact_kv_cache_(**{**arguments, "caches": CacheTable(arguments["caches"]), "block_table": int32([[0], [1]])})
    with pytest.raises(ValueError, match=r"caches must be a CacheTable\(..., paged=False\) without a block_table"):
        compact_kv_cache_(**{**arguments, "caches": CacheTable(arguments["caches"], paged=True)})
