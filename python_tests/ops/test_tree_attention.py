"""tree_attention: against a loop over rows and the float64 reference, its edges, and what is refused."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from support.attention import AttentionInputs, attention_inputs, loop_attention, paged, poison_unseen
from support.buffers import GuardedBuffer, Unchanged
from support.op_backends import op_backends
from support.operators import check_fake_matches_real
from support.packed_masks import CHAIN, FULL, RANDOM, SHAPES, STAR, pack, pack_tree, tree_parents
from support.tolerances import ATTENTION, LOG_SUM_EXP, assert_close

from sequoia_kernels.cuda_graphs import capture
from sequoia_kernels.errors import BackendUnavailableError
from sequoia_kernels.ops import TreeAttentionOutput, backends, tree_attention
from sequoia_kernels.ops.tree_attention.op import TreeAttentionInputs

INF = math.inf
NAN = math.nan
FLOAT8 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=op_backends("tree_attention"))
def backend(request):
    return request.param


def attend(backend, *inputs, **options):
    """Run on a backend, or skip with the backend's own reason."""
    try:
        return backend(*inputs, **options)
    except BackendUnavailableError as error:
        pytest.skip(str(error))


def reference(inputs, **options):
    """The float64 reference on the same rounded inputs."""
    options = {"return_lse": True, **options, "backend": "reference"}
    if options.get("sinks") is not None:
        options["sinks"] = options["sinks"].double()
    return tree_attention(*inputs.double(), **options)


def check(backend, inputs, **options):
    """Compare a backend with the float64 reference, with and without the log-sum-exp, which not every backend gives."""
    expected = reference(inputs, **options)
    dtype = inputs.q.dtype
    if backend.at_scale:
        with Unchanged(*inputs):
            result = attend(backend, *inputs, **options)
        assert result.lse is None
        assert result.out.dtype == dtype and result.out.is_contiguous()
        assert_close(result.out, expected.out, ATTENTION, dtype)
    try:
        result = backend(*inputs, return_lse=True, **options)
    except BackendUnavailableError as error:
        if not backend.at_scale:
            pytest.skip(str(error))
        return
    assert_close(result.out, expected.out, ATTENTION, dtype)
    assert result.lse.is_contiguous() and result.lse.dtype == torch.float32
    assert_close(result.lse, expected.lse, LOG_SUM_EXP, dtype)


def spare_the_interpreter(backend, representative):
    """An interpreted kernel takes seconds a call: let it run some cases of a grid."""
    if not backend.at_scale and not representative:
        pytest.skip("interpreted kernels run fewer cases of this grid")


def random_tree_inputs(num_nodes=9, cache_lens=(21,), **options):
    mask = pack_tree(tree_parents(RANDOM, num_nodes, seed=num_nodes))
    options = {"num_slots": max(cache_lens) + 32 * mask.shape[-1] + 3, **options}
    return attention_inputs(mask, list(cache_lens), **options)


# The specification itself


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 3, 12])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_equals_a_loop_over_rows(shape, with_sinks, window, softcap):
    mask = pack_tree(tree_parents(shape, 7))
    inputs = attention_inputs(mask, [0, 9], num_slots=17, heads=(6, 2), head_dim=5, value_dim=3, dtype=torch.float64)
    inputs = poison_unseen(inputs, window)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0, -INF, 1.0]) if with_sinks else None
    options = {"scale": 0.7, "softcap": softcap, "sliding_window": window, "sinks": sinks}
    expected_out, expected_lse = loop_attention(inputs, **options)
    result = reference(inputs, **options)
    torch.testing.assert_close(result.out, expected_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.lse, expected_lse, rtol=1e-12, atol=1e-12)


def test_log_sum_exp_merges_split_contexts():
    """What the log-sum-exp is for: attention over two halves of the prefix, merged, is attention over the whole."""
    inputs = attention_inputs(pack([[0]]), [20], num_slots=21, dtype=torch.float64)
    whole = reference(inputs)
    nothing = torch.zeros_like(inputs.tree_mask)
    halves = [
        reference(AttentionInputs(inputs.q, inputs.k_cache[:, part], inputs.v_cache[:, part], nothing, lens))
        for part, lens in (
            (slice(0, 9), torch.tensor([9], dtype=torch.int32)),
            (slice(9, 21), torch.tensor([12]).int()),
        )
    ]
    weights = torch.softmax(torch.stack([half.lse for half in halves]), dim=0)
    merged = sum(weight[..., None] * half.out for weight, half in zip(weights, halves))
    torch.testing.assert_close(merged, whole.out, rtol=1e-12, atol=1e-12)


# Every backend against the float64 reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_lens", [(0,), (1,), (200,), (5, 63, 0)])
@pytest.mark.parametrize(("shape", "num_nodes"), [(CHAIN, 1), (CHAIN, 6), (STAR, 9), (FULL, 15), (RANDOM, 33)])
def test_tree_shapes(backend, shape, num_nodes, cache_lens, dtype):
    spare_the_interpreter(backend, num_nodes in (1, 9) or (shape == RANDOM and max(cache_lens) < 70))
    mask = pack_tree(tree_parents(shape, num_nodes))
    inputs = attention_inputs(mask, cache_lens, num_slots=max(cache_lens) + num_nodes, dtype=dtype)
    check(backend, poison_unseen(inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (8, 1), (6, 2), (5, 5), (14, 2)])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(32, 32), (64, 32), (40, 56), (8, 8)])
def test_head_layouts(backend, heads, head_dim, value_dim, dtype):
    spare_the_interpreter(backend, (heads == (6, 2)) == (dtype == torch.float32) and (head_dim, heads[1]) != (64, 4))
    check(backend, random_tree_inputs(heads=heads, head_dim=head_dim, value_dim=value_dim, dtype=dtype))


@pytest.mark.parametrize("head_dim", [128, 256])
def test_wide_heads(backend, head_dim):
    check(backend, random_tree_inputs(5, heads=(2, 1), head_dim=head_dim, dtype=torch.bfloat16))


@pytest.mark.parametrize("window", [1, 2, 4, 30, 1000])
@pytest.mark.parametrize("shape", SHAPES)
def test_sliding_window(backend, shape, window):
    spare_the_interpreter(backend, shape in (FULL, RANDOM))
    mask = pack_tree(tree_parents(shape, 13))
    inputs = attention_inputs(mask, [0, 3, 40], num_slots=60)
    check(backend, poison_unseen(inputs, window), sliding_window=window)


def test_sliding_window_counts_depth_and_not_node_index(backend):
    """Regression: by node index, the last child of a wide star is far from the root and would lose the prefix."""
    num_nodes, cache_len, window = 30, 10, 4
    inputs = attention_inputs(pack_tree(tree_parents(STAR, num_nodes)), [cache_len], num_slots=64)
    result = attend(backend, *inputs, sliding_window=window).out
    # Every child is at depth 1: it sees itself, the root and the last two rows of the prefix.
    for child in (1, num_nodes - 1):
        slots = [cache_len - 2, cache_len - 1, cache_len, cache_len + child]
        one_row = inputs._replace(
            q=inputs.q[:, child : child + 1].double(),
            k_cache=inputs.k_cache[:, slots].double(),
            v_cache=inputs.v_cache[:, slots].double(),
            tree_mask=pack([[]], num_words=1),
            cache_lens=torch.tensor([4], dtype=torch.int32),
        )
        expected, _ = loop_attention(one_row)
        assert_close(result[:, child : child + 1], expected, ATTENTION, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap(backend, dtype):
    check(backend, random_tree_inputs(dtype=dtype), softcap=3.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks(backend, dtype):
    sinks = torch.tensor([0.0, 5.0, -3.0, -INF])
    inputs = random_tree_inputs(cache_lens=(21, 0), dtype=dtype)
    check(backend, inputs, sinks=sinks)
    check(backend, inputs, sinks=sinks.to(dtype), sliding_window=3, softcap=4.0, scale=0.3)


@pytest.mark.parametrize("num_nodes", [31, 32, 33, 64, 65, 130])
def test_masks_of_many_words(backend, num_nodes):
    """Regression: a tree of more nodes than a word has bits."""
    spare_the_interpreter(backend, num_nodes in (33, 64))
    check(backend, random_tree_inputs(num_nodes, cache_lens=(50,)))


def test_a_tree_a_request(backend):
    shapes = [CHAIN, STAR, FULL]
    mask = torch.stack([pack_tree(tree_parents(shape, 40)) for shape in shapes])
    for cache_lens in ([7, 7, 7], [0, 25, 3]):
        inputs = attention_inputs(mask, cache_lens, num_slots=70)
        check(backend, poison_unseen(inputs))
        check(backend, poison_unseen(inputs, 5), sliding_window=5)


def test_a_draft_level_feeds_some_nodes(backend):
    """The rows of a call need not be all nodes; unfed slots between them hold anything."""
    parents = tree_parents(RANDOM, 20)
    nodes = [4, 6, 11]
    inputs = attention_inputs(pack_tree(parents, nodes), [33, 5], num_slots=64)
    check(backend, poison_unseen(inputs))
    everything = inputs._replace(q=torch.randn(2, 20, 4, 32), tree_mask=pack_tree(parents))
    everything.q[:, nodes] = inputs.q
    whole = reference(everything).out[:, nodes]
    assert_close(attend(backend, *inputs).out, whole, ATTENTION, torch.float32)


@pytest.mark.parametrize("cache_lens", [[0, 0], [0, 6]])
def test_a_row_that_sees_nothing_gives_zero(backend, cache_lens):
    inputs = attention_inputs(pack([[0], [], [2]], num_words=1), cache_lens, num_slots=40)
    inputs = poison_unseen(inputs)
    check(backend, inputs)
    result = attend(backend, *inputs)
    assert (result.out[0, 1] == 0).all()
    assert reference(inputs).lse[0, 1].eq(-INF).all()


def test_a_row_that_sees_nothing_but_a_sink(backend):
    inputs = attention_inputs(pack([[]], num_words=1), [0], num_slots=3)
    inputs = poison_unseen(inputs)
    sinks = torch.tensor([1.0, -2.0, 0.0, -INF])
    result = attend(backend, *inputs, sinks=sinks, return_lse=True)
    assert (result.out == 0).all()
    assert torch.equal(result.lse[0, 0], sinks)


def test_full_cache_and_refusal_of_one_row_more(backend):
    mask = pack_tree(tree_parents(CHAIN, 5))
    inputs = attention_inputs(mask, [27, 3], num_slots=32)
    check(backend, inputs)
    if backend.device.type == "cpu":
        with pytest.raises(ValueError, match=r"cache_lens must leave room for 5 tree rows in a cache of 32 slots"):
            backend(*inputs._replace(cache_lens=torch.tensor([28, 3], dtype=torch.int32)))


def test_long_prefix(backend):
    """More slots than one block of any kernel, ragged, so that whole blocks are invisible to a request."""
    cache_lens = [1500 if backend.at_scale else 300, 30]
    inputs = attention_inputs(pack_tree(tree_parents(FULL, 7)), cache_lens, num_slots=1600, heads=(2, 1))
    check(backend, poison_unseen(inputs))
    check(backend, poison_unseen(inputs, 200), sliding_window=200)


def test_large_scores_do_not_overflow(backend):
    inputs = random_tree_inputs()
    inputs = inputs._replace(q=inputs.q * 60, k_cache=inputs.k_cache * 60)
    expected = reference(inputs)
    result = attend(backend, *inputs).out
    assert torch.isfinite(result).all()
    # Scores of thousands: float32 rounds them by 1e-4, and so the weights.
    torch.testing.assert_close(result.double(), expected.out, rtol=5e-3, atol=5e-3)


def test_a_prompt_is_a_chain(backend):
    num_rows = 1024 if backend.at_scale else 70
    mask = pack_tree(tree_parents(CHAIN, num_rows))
    inputs = attention_inputs(mask, [0], num_slots=num_rows, heads=(2, 1), head_dim=16)
    q, k, v = (tensor.transpose(1, 2).double() for tensor in inputs[:3])
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    assert_close(attend(backend, *inputs).out, expected, ATTENTION, torch.float32)


@pytest.mark.parametrize("layout", ["[B, S, H, D]", "[B, H, S, D]", "sliced", "packed with values"])
def test_strides(backend, layout):
    inputs = random_tree_inputs(cache_lens=(21, 9))
    if layout == "[B, S, H, D]":
        inputs = inputs._replace(k_cache=inputs.k_cache.contiguous(), v_cache=inputs.v_cache.contiguous())
    elif layout == "sliced":
        wide = torch.full((3, 70, 5, 40), NAN)
        wide[1:3, 3:59, 1:3, :32] = inputs.k_cache[:, :56]
        inputs = inputs._replace(
            k_cache=wide[1:3, 3:59, 1:3, :32], v_cache=inputs.v_cache[:, :56], q=inputs.q.transpose(0, 1).contiguous()
        )
        inputs = inputs._replace(q=inputs.q.transpose(0, 1))
    elif layout == "packed with values":
        both = torch.stack([inputs.k_cache, inputs.v_cache], dim=3)
        inputs = inputs._replace(k_cache=both[:, :, :, 0], v_cache=both[:, :, :, 1])
    check(backend, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_size", [1, 16, 33])
def test_paged_equals_contiguous(backend, page_size, dtype):
    inputs = random_tree_inputs(cache_lens=(21, 0, 44), dtype=dtype)
    k_pages, block_table = paged(inputs.k_cache, page_size)
    v_pages, _ = paged(inputs.v_cache, page_size)
    # Entries behind a request's last row in use may be anything.
    for request, cache_len in enumerate(inputs.cache_lens.tolist()):
        unused = block_table[request, -(-(cache_len + 9) // page_size) :]
        unused[:] = torch.tensor([10**9, -1])[torch.arange(len(unused)) % 2]
    for options in ({}, {"sliding_window": 7, "softcap": 2.0}):
        expected = reference(inputs, **options).out
        pages = inputs._replace(k_cache=k_pages, v_cache=v_pages)
        with Unchanged(*pages, block_table):
            result = attend(backend, *pages, block_table=block_table, **options)
        assert_close(result.out, expected, ATTENTION, dtype)


@pytest.mark.parametrize("unused", [-1, 10**9])
def test_a_request_uses_the_pages_of_its_own_tree_only(backend, unused):
    """Trees of different sizes, each ending at the last row of a page; the other requests' pages do not exist here."""
    trees = [tree_parents(RANDOM, num_nodes, seed=num_nodes) for num_nodes in (1, 33, 9, 40)]
    masks = torch.stack([pack_tree(parents, nodes=[0, len(parents) - 1], num_words=2) for parents in trees])
    cache_lens = [7, 7, 0, 24]
    inputs = attention_inputs(masks, cache_lens, num_slots=64)
    k_pages, block_table = paged(inputs.k_cache, 8)
    v_pages, _ = paged(inputs.v_cache, 8)
    for request, (cache_len, parents) in enumerate(zip(cache_lens, trees)):
        block_table[request, -(-(cache_len + len(parents)) // 8) :] = unused
    for options in ({}, {"sliding_window": 5}):
        result = attend(backend, *inputs._replace(k_cache=k_pages, v_cache=v_pages), block_table=block_table, **options)
        assert_close(result.out, reference(inputs, **options).out, ATTENTION, torch.float32)


def test_a_request_is_as_long_as_its_own_tree_asks_for(backend):
    """The last request has room for one row, and its tree has one; another one's has forty."""
    masks = torch.stack([pack_tree(tree_parents(RANDOM, 40, seed=3), nodes=[39]), pack([[0]], num_words=2)])
    check(backend, attention_inputs(masks, [2, 49], num_slots=50))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [1e-18, 300.0, 1e6, 1e18])
def test_narrow_and_wide_softcaps(backend, softcap, dtype):
    check(backend, random_tree_inputs(dtype=dtype), softcap=softcap)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_rows_of_nan_stay_nan_and_among_themselves(backend, softcap, with_sinks):
    """A query of NaN makes its own output and log-sum-exp NaN, unless its row sees nothing."""
    mask = pack([[0], [0, 1], [0, 2], []], num_words=1)
    inputs = attention_inputs(mask, [9, 0], num_slots=12)
    sinks = torch.tensor([0.0, 5.0, -3.0, -INF]) if with_sinks else None
    expected = reference(inputs, softcap=softcap, sinks=sinks)
    inputs.q[:, 1] = NAN
    inputs.q[0, 2, 3] = NAN
    inputs.q[1, 3] = NAN  # sees nothing
    want_lse = backend.name != "sdpa"
    result = attend(backend, *inputs, softcap=softcap, sinks=sinks, return_lse=want_lse)
    for buffer in (expected.out, expected.lse):
        buffer[:, 1] = NAN
        buffer[0, 2, 3] = NAN
    torch.testing.assert_close(result.out.double(), expected.out, rtol=1e-5, atol=1e-5, equal_nan=True)
    if want_lse:
        torch.testing.assert_close(result.lse.double(), expected.lse, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scales", ["none", "numbers", "one element", "a head"])
def test_float8_caches(backend, scales, dtype):
    inputs = random_tree_inputs(cache_lens=(21, 5), dtype=dtype)
    k_scale, v_scale = {
        "none": (None, None),
        "numbers": (0.25, 3.0),
        "one element": (torch.tensor(0.25), torch.tensor([3.0])),
        "a head": (torch.tensor([0.25, 0.5]), torch.tensor([3.0, 0.125])),
    }[scales]
    rounded = inputs._replace(k_cache=inputs.k_cache.to(FLOAT8), v_cache=inputs.v_cache.to(FLOAT8))
    columns = torch.ones(2, 1, dtype=torch.float64)
    expanded = inputs._replace(
        k_cache=rounded.k_cache.double()
        * (columns * (1.0 if k_scale is None else torch.as_tensor(k_scale).view(-1, 1))),
        v_cache=rounded.v_cache.double()
        * (columns * (1.0 if v_scale is None else torch.as_tensor(v_scale).view(-1, 1))),
    )
    expected = reference(expanded)
    result = attend(backend, *rounded, k_scale=k_scale, v_scale=v_scale, return_lse=True)
    assert_close(result.out, expected.out, ATTENTION, dtype)
    assert_close(result.lse, expected.lse, LOG_SUM_EXP, dtype)


def test_float8_pages(backend):
    inputs = random_tree_inputs(cache_lens=(21, 5), dtype=torch.bfloat16)
    rounded = inputs._replace(k_cache=inputs.k_cache.to(FLOAT8), v_cache=inputs.v_cache.to(FLOAT8))
    k_pages, block_table = paged(rounded.k_cache.float(), 8)
    v_pages, _ = paged(rounded.v_cache.float(), 8)
    pages = rounded._replace(k_cache=k_pages.to(FLOAT8), v_cache=v_pages.to(FLOAT8))
    expected = reference(rounded._replace(k_cache=rounded.k_cache.float(), v_cache=rounded.v_cache.float()))
    result = attend(backend, *pages, block_table=block_table)
    assert_close(result.out, expected.out, ATTENTION, torch.bfloat16)


@pytest.mark.parametrize("with_lse", [False, True])
def test_out_buffers(backend, with_lse):
    inputs = random_tree_inputs(cache_lens=(21, 9))
    expected = reference(inputs)
    inputs = AttentionInputs(*(tensor.to(backend.device) for tensor in inputs))
    out = GuardedBuffer(inputs.q.shape, torch.float32, backend.device)
    lse = GuardedBuffer(inputs.q.shape[:3], torch.float32, backend.device)
    given = TreeAttentionOutput(out.view, lse.view) if with_lse else out.view
    result = attend(backend, *inputs, out=given, return_lse=with_lse, raw=True)
    assert result.out is out.view
    assert result.lse is (lse.view if with_lse else None)
    assert_close(out.view.cpu(), expected.out, ATTENTION, torch.float32)
    out.check()
    if with_lse:
        assert_close(lse.view.cpu(), expected.lse, LOG_SUM_EXP, torch.float32)
        lse.check()
    else:
        lse.check_untouched()


def test_empty_batch(backend):
    inputs = random_tree_inputs(cache_lens=(21, 9))
    none = AttentionInputs(
        inputs.q[:0], inputs.k_cache[:0], inputs.v_cache[:0], inputs.tree_mask, inputs.cache_lens[:0]
    )
    result = backend(*none, return_lse=True)
    assert result.out.shape == (0, 9, 4, 32)
    assert result.lse.shape == (0, 9, 4)


def test_results_repeat(backend):
    inputs = random_tree_inputs(33, cache_lens=(130, 7))
    first = attend(backend, *inputs).out
    assert torch.equal(first, attend(backend, *inputs).out)


@pytest.mark.gpu
def test_graph_replay_follows_lengths_on_the_device(backend):
    if backend.device.type != "cuda":
        pytest.skip("graphs are captured on CUDA devices")
    inputs = AttentionInputs(*(tensor.cuda() for tensor in random_tree_inputs(cache_lens=(21, 5))))
    attend(backend, *inputs, raw=True)
    graph, result = capture(lambda: tree_attention(*inputs, backend=backend.name), inputs.q.device)
    for cache_lens in ([21, 5], [3, 30]):
        inputs.cache_lens.copy_(torch.tensor(cache_lens))
        graph.replay()
        cpu = AttentionInputs(*(tensor.cpu() for tensor in inputs))
        assert_close(result.out.cpu(), reference(cpu).out, ATTENTION, torch.float32)


# Calls like an earlier one, whose structure is not checked again


def test_what_changes_between_like_calls_is_noticed():
    inputs = random_tree_inputs(9, cache_lens=(21, 5), num_slots=40)
    tree_attention(*inputs)
    inputs.cache_lens.fill_(31)  # in place: 9 rows of the tree fit
    check_auto(inputs)
    inputs.cache_lens.fill_(32)
    with pytest.raises(ValueError, match="cache_lens must leave room for 9 tree rows in a cache of 40 slots"):
        tree_attention(*inputs)
    inputs.cache_lens.fill_(-1)
    with pytest.raises(ValueError, match="cache_lens must not be negative"):
        tree_attention(*inputs)
    inputs.cache_lens.fill_(30)
    inputs.tree_mask[3, 0] |= 1 << 10
    with pytest.raises(ValueError, match="cache_lens must leave room for 11 tree rows in a cache of 40 slots"):
        tree_attention(*inputs)


@pytest.mark.parametrize("backend_name", ["host", "sdpa", "reference"])
def test_structure_is_checked_after_good_calls(backend_name):
    if (reason := backends.unavailable_reason("tree_attention", backend_name)) is not None:
        pytest.skip(reason)
    tree_attention(*GOOD, backend=backend_name)
    for changes, error in (
        ({"q": GOOD.q.double()}, TypeError),
        ({"v_cache": GOOD.v_cache[:, :50]}, ValueError),
        ({"tree_mask": GOOD.tree_mask.repeat(1, 2)[:, ::2]}, ValueError),
        ({"cache_lens": GOOD.cache_lens.to("meta")}, ValueError),
        ({"sliding_window": 0}, ValueError),
        ({"scale": INF}, ValueError),
        ({"sinks": torch.zeros(3)}, ValueError),
        ({"out": torch.empty(2, 9, 4, 31)}, ValueError),
    ):
        arguments, options = refused(**changes)
        with pytest.raises(error, match=r"^tree_attention: "):
            tree_attention(*arguments, **options, backend=backend_name)


def test_a_backend_registered_later_is_found(monkeypatch):
    monkeypatch.setitem(backends.AUTO_ORDER, "cpu", ("other", *backends.AUTO_ORDER["cpu"]))
    inputs = random_tree_inputs()
    expected = tree_attention(*inputs).out
    other = torch.full_like(expected, 7.0)
    try:
        backends.register_backend(
            "tree_attention", "other", lambda _: None, lambda _, outputs: outputs.out.copy_(other)
        )
        assert torch.equal(tree_attention(*inputs).out, other)
    finally:
        backends.register_room("tree_attention", package="sequoia_kernels.ops.tree_attention")
    assert torch.equal(tree_attention(*inputs).out, expected)


def test_modes_see_the_operator():
    inputs = random_tree_inputs()
    tree_attention(*inputs)
    seen = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Recorder():
        tree_attention(*inputs)
    assert any("sequoia.tree_attention" in name for name in seen)


def check_auto(inputs):
    assert_close(tree_attention(*inputs).out, reference(inputs).out, ATTENTION, inputs.q.dtype)


# The C++ backend


def test_host_leaves_large_calls_to_threads(monkeypatch):
    if (reason := backends.unavailable_reason("tree_attention", "host")) is not None:
        pytest.skip(reason)
    small, large = random_tree_inputs(9), random_tree_inputs(33, cache_lens=(900,))

    def chosen(inputs, **options):
        options = {"softcap": None, "return_lse": False, **options}
        arguments = TreeAttentionInputs(
            *inputs, 0.2, options["softcap"], None, None, None, None, None, options["return_lse"]
        )
        return backends.choose("tree_attention", "auto", "cpu", arguments).name

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert chosen(small) == chosen(large) == "host"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert chosen(small) == "host"
    assert chosen(large) == "sdpa"  # 33 nodes of a group of heads each, behind many rows
    assert chosen(random_tree_inputs(9, cache_lens=(900,))) == "host"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert chosen(random_tree_inputs(9, cache_lens=(900,))) == "sdpa"
    assert chosen(small) == "host"
    assert chosen(large) == "sdpa"
    assert chosen(large, softcap=2.0) == chosen(large, return_lse=True) == "host"  # the others would be slower still
    assert_close(tree_attention(*large, backend="host").out, reference(large).out, ATTENTION, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "value_dim"), [(1, 3), (5, 17), (33, 20)])
def test_host_takes_head_dims_of_any_size(head_dim, value_dim, dtype):
    if (reason := backends.unavailable_reason("tree_attention", "host")) is not None:
        pytest.skip(reason)
    inputs = random_tree_inputs(heads=(6, 2), head_dim=head_dim, value_dim=value_dim, dtype=dtype)
    result = tree_attention(*inputs, backend="host", return_lse=True)
    expected = reference(inputs)
    assert_close(result.out, expected.out, ATTENTION, dtype)
    assert_close(result.lse, expected.lse, LOG_SUM_EXP, dtype)


# The torch SDPA backend


@pytest.mark.parametrize("inference", [False, True])
def test_sdpa_sees_masks_and_lengths_change_in_place(inference):
    """Masks are remembered between layers; a mask that was written to is another mask."""
    with torch.inference_mode(inference):
        inputs = random_tree_inputs(9, cache_lens=(21, 4))
        check_sdpa(inputs)
        inputs.tree_mask.copy_(pack_tree(tree_parents(CHAIN, 9)))
        check_sdpa(inputs)
        inputs.cache_lens.add_(2)
        check_sdpa(inputs)
        check_sdpa(inputs, sliding_window=3)
        check_sdpa(inputs._replace(tree_mask=inputs.tree_mask.expand(2, -1, -1).contiguous()))


def check_sdpa(inputs, **options):
    result = tree_attention(*inputs, **options, backend="sdpa").out
    assert_close(result, reference(inputs, **options).out, ATTENTION, inputs.q.dtype)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"softcap": 1.0}, "soft-cap"),
        ({"sinks": torch.zeros(4)}, "sinks"),
        ({"return_lse": True}, "log-sum-exp"),
    ],
)
def test_sdpa_by_name_refuses_with_its_reason(options, reason):
    inputs = random_tree_inputs()
    with pytest.raises(BackendUnavailableError, match=f"tree_attention: backend 'sdpa' cannot run this call.*{reason}"):
        tree_attention(*inputs, **options, backend="sdpa")


def test_sdpa_refuses_pages_and_float8():
    inputs = random_tree_inputs()
    pages, block_table = paged(inputs.k_cache, 8)
    with pytest.raises(BackendUnavailableError, match="paged"):
        tree_attention(inputs.q, pages, pages, *inputs[3:], block_table=block_table, backend="sdpa")
    with pytest.raises(BackendUnavailableError, match="float8"):
        k_cache, v_cache = inputs.k_cache.to(FLOAT8), inputs.v_cache.to(FLOAT8)
        tree_attention(inputs.q, k_cache, v_cache, *inputs[3:], backend="sdpa")


def test_auto_passes_over_what_cannot_run(caplog, monkeypatch):
    monkeypatch.setattr(backends, "_logged", set())
    inputs = random_tree_inputs()
    with caplog.at_level(logging.INFO, logger="sequoia_kernels"):
        for _ in range(2):
            result = tree_attention(*inputs, softcap=3.0, sinks=torch.zeros(4), return_lse=True)
    assert_close(result.out, reference(inputs, softcap=3.0, sinks=torch.zeros(4)).out, ATTENTION, torch.float32)
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().startswith("tree_attention on cpu runs on backend")


# The torch operator


def operator_arguments(inputs, name, *, block_table=None, window=None, return_lse=False):
    return (*inputs, 0.2, None, window, None, block_table, None, None, return_lse, False, name)


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_operator(name):
    inputs = random_tree_inputs(cache_lens=(21, 5))
    arguments = operator_arguments(inputs, name, window=5)
    with_lse = operator_arguments(inputs, name, window=5, return_lse=True)
    operators = torch.ops.sequoia.tree_attention
    torch.library.opcheck(operators.default, arguments)
    torch.library.opcheck(operators.default, with_lse)
    out, lse = torch.empty(inputs.q.shape), torch.empty(inputs.q.shape[:3])
    torch.library.opcheck(operators.out, (*with_lse, out, lse))
    torch.library.opcheck(operators.out, (*arguments, out, None))


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_fake_outputs_match_real_ones(dtype):
    inputs = random_tree_inputs(cache_lens=(21, 5), dtype=dtype, value_dim=24)
    for name in ("auto", "reference"):
        check_fake_matches_real(torch.ops.sequoia.tree_attention.default, *operator_arguments(inputs, name))
    with_lse = operator_arguments(inputs, "auto", return_lse=True)
    check_fake_matches_real(torch.ops.sequoia.tree_attention.default, *with_lse)
    pages, block_table = paged(inputs.k_cache, 8)
    inputs = inputs._replace(k_cache=pages, v_cache=pages)
    arguments = operator_arguments(inputs, "auto", block_table=block_table)
    check_fake_matches_real(torch.ops.sequoia.tree_attention.default, *arguments)


def test_compiled_function():
    inputs = random_tree_inputs(cache_lens=(21, 5))

    def layer(q, k_cache, v_cache, tree_mask, cache_lens):
        result = tree_attention(q * 2, k_cache, v_cache, tree_mask, cache_lens, sliding_window=9)
        with_lse = tree_attention(q, k_cache, v_cache, tree_mask, cache_lens, return_lse=True)
        buffer = torch.empty_like(q)
        tree_attention(q, k_cache, v_cache, tree_mask, cache_lens, out=buffer)
        return result.out + 1, with_lse.lse, buffer

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(*inputs), layer(*inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


# What is refused

GOOD = random_tree_inputs(cache_lens=(21, 5))
PAGES, PAGE_TABLE = paged(GOOD.k_cache, 8)


def refused(**changes):
    """Arguments of the good call with some replaced."""
    arguments = {**GOOD._asdict(), **changes}
    return [arguments.pop(name) for name in GOOD._fields], arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": [1.0]}, "q must be a tensor, got list"),
        ({"cache_lens": 5}, "cache_lens must be a tensor, got int"),
        ({"q": GOOD.q.int()}, "q must have dtype bfloat16 or float16 or float32 or float64, got int32"),
        ({"k_cache": GOOD.k_cache.half()}, "k_cache must have dtype float32 or float8_e4m3fn, got float16"),
        ({"v_cache": GOOD.v_cache.to(FLOAT8)}, "v_cache must have dtype float32, got float8_e4m3fn"),
        ({"tree_mask": GOOD.tree_mask.long()}, "tree_mask must have dtype int32, got int64"),
        ({"cache_lens": GOOD.cache_lens.long()}, "cache_lens must have dtype int32, got int64"),
        ({"sinks": torch.zeros(4, dtype=torch.float16)}, "sinks must have dtype float32, got float16"),
        ({"k_scale": 0.5}, "k_scale must be None unless the caches are float8_e4m3fn"),
        ({"v_scale": "0.5"}, "v_scale must be a number or a tensor"),
        ({"out": torch.empty(GOOD.q.shape, dtype=torch.float64)}, "out must have dtype float32, got float64"),
        ({"out": (1, 2)}, "out must be a tensor, got int"),
        ({"scale": "1"}, "scale must be a number, got str"),
        ({"scale": True}, "scale must be a number, got bool"),
        ({"softcap": [1.0]}, "softcap must be a number, got list"),
        ({"softcap": torch.tensor(1.0)}, "softcap must be a number, got Tensor"),
        ({"sliding_window": 3.0}, "sliding_window must be an integer, got float"),
        ({"sliding_window": True}, "sliding_window must be an integer, got bool"),
        ({"sinks": [0.0] * 4}, "sinks must be a tensor, got list"),
        ({"block_table": [[0]]}, "block_table must be a tensor, got list"),
        ({"return_lse": 1}, "return_lse must be a bool, got int"),
        ({"backend": None}, "backend must be a string, got NoneType"),
        ({"debug": "no"}, "debug must be a bool, got str"),
        ({"out": torch.empty(GOOD.q.shape), "return_lse": True}, "out must be a TreeAttentionOutput of two tensors"),
    ],
)
def test_wrong_types(changes, message):
    arguments, options = refused(**changes)
    with pytest.raises(TypeError, match=f"^tree_attention: {message}"):
        tree_attention(*arguments, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": GOOD.q[0]}, r"q must have shape \[batch, nodes, q heads, head dim\], got \[9, 4, 32\]"),
        ({"q": GOOD.q[:, :0], "tree_mask": GOOD.tree_mask[:0]}, "q must have from 1 to 1024 nodes"),
        ({"q": GOOD.q.transpose(2, 3).contiguous().transpose(2, 3)}, "q must be contiguous in its last dimension"),
        ({"q": GOOD.q[..., :16]}, r"k_cache must have shape .* = \[2, 56, 2, 16\], got \[2, 56, 2, 32\]"),
        ({"q": GOOD.q[:, :, :3]}, "k_cache must have a number of kv heads that divides q's 3 heads, got 2"),
        ({"k_cache": GOOD.k_cache[:1]}, r"k_cache must have shape .* = \[2, 56, 2, 32\], got \[1, 56, 2, 32\]"),
        ({"v_cache": GOOD.v_cache[:, :50]}, r"v_cache must have shape .* = \[2, 56, 2, 32\], got \[2, 50, 2, 32\]"),
        ({"tree_mask": GOOD.tree_mask[:5]}, r"tree_mask must have shape .* with 9 nodes, batch 2.*, got \[5, 1\]"),
        ({"tree_mask": GOOD.tree_mask[0]}, r"tree_mask must have shape .*, got \[1\]"),
        ({"tree_mask": GOOD.tree_mask[:, :0]}, r"tree_mask must have shape .*, got \[9, 0\]"),
        ({"tree_mask": GOOD.tree_mask.expand(3, -1, -1)}, r"tree_mask must have shape .*, got \[3, 9, 1\]"),
        ({"tree_mask": GOOD.tree_mask.repeat(1, 2)[:, ::2]}, "tree_mask and cache_lens must be contiguous"),
        ({"cache_lens": GOOD.cache_lens[:1]}, r"cache_lens must have shape \[batch\] = \[2\], got \[1\]"),
        ({"cache_lens": GOOD.cache_lens - 6}, r"cache_lens must not be negative, got \[15, -1\]"),
        ({"cache_lens": GOOD.cache_lens + 30}, "cache_lens must leave room for 9 tree rows in a cache of 56 slots"),
        ({"cache_lens": GOOD.cache_lens.to("meta")}, "cache_lens must be on cpu, got meta"),
        ({"q": GOOD.q[:, :, :0]}, r"q must have at least one head and one dimension, got \[2, 9, 0, 32\]"),
        ({"q": GOOD.q[..., :0], "k_cache": GOOD.k_cache[..., :0]}, "q must have at least one head and one dimension"),
        ({"q": GOOD.q[:0, :, :0], "cache_lens": GOOD.cache_lens[:0]}, "k_cache must have shape"),
        (
            {"k_cache": GOOD.k_cache[:, :, :0], "v_cache": GOOD.v_cache[:, :, :0]},
            "k_cache must have a number of kv heads",
        ),
        (
            {"k_cache": GOOD.k_cache[:, :0], "v_cache": GOOD.v_cache[:, :0]},
            "v_cache must have at least one slot and one",
        ),
        ({"v_cache": GOOD.v_cache[..., :0]}, "v_cache must have at least one slot and one dimension"),
        ({"scale": NAN}, "scale must be from -1e18 to 1e18, got nan"),
        ({"scale": 1e39}, "scale must be from -1e18 to 1e18, got 1e"),
        ({"scale": 10**400}, "scale must fit into float32, got a number beyond float64"),
        ({"softcap": 0.0}, "softcap must be from 1e-18 to 1e18, got 0.0"),
        ({"softcap": -1.0}, "softcap must be from 1e-18 to 1e18"),
        ({"softcap": NAN}, "softcap must be from 1e-18 to 1e18"),
        ({"softcap": 1e39}, "softcap must be from 1e-18 to 1e18, got 1e"),
        ({"softcap": 1e-46}, "softcap must be from 1e-18 to 1e18, got 1e-46"),
        ({"sliding_window": 0}, "sliding_window must be at least 1, got 0"),
        ({"sliding_window": 2**63}, "sliding_window must fit into int64, got 9223372036854775808"),
        ({"sliding_window": -(10**5000)}, "sliding_window must fit into int64, got an integer of 16610 bits"),
        ({"sinks": torch.zeros(2)}, r"sinks must have shape \[q heads\] = \[4\], got \[2\]"),
        ({"block_table": PAGE_TABLE, "k_cache": PAGES}, "v_cache must have shape"),
        (
            {"block_table": PAGE_TABLE[:1], "k_cache": PAGES, "v_cache": PAGES},
            "block_table must be contiguous with shape",
        ),
        (
            {"block_table": PAGE_TABLE - 99, "k_cache": PAGES, "v_cache": PAGES},
            "block_table must name pages from 0 to 16",
        ),
        (
            {"block_table": PAGE_TABLE + 99, "k_cache": PAGES, "v_cache": PAGES},
            "block_table must name pages from 0 to 16",
        ),
        ({"out": torch.empty(2, 9, 4, 31)}, r"out must have shape .* = \[2, 9, 4, 32\], got \[2, 9, 4, 31\]"),
        ({"backend": "cudnn"}, "backend must be one of auto, reference, .*, got 'cudnn'"),
    ],
)
def test_wrong_values(changes, message):
    arguments, options = refused(**changes)
    with pytest.raises(ValueError, match=f"^tree_attention: {message}"):
        tree_attention(*arguments, **options)


@pytest.mark.gpu
def test_debug_checks_lengths_and_pages_on_a_device():
    inputs = [tensor.cuda() for tensor in GOOD]
    for name, message in (("long", "cache_lens must leave room"), ("negative", "cache_lens must not be negative")):
        lens = inputs[4] + 1000 if name == "long" else inputs[4] - 1000
        with pytest.raises(ValueError, match=f"^tree_attention: {message}"):
            tree_attention(*inputs[:4], lens, debug=True)
    assert tree_attention(*inputs, debug=True).out.shape == GOOD.q.shape


def test_a_refused_call_leaves_the_buffers_as_they_were(backend):
    out = GuardedBuffer(GOOD.q.shape, torch.float32, backend.device)
    lse = GuardedBuffer(GOOD.q.shape[:3], torch.float32, backend.device)
    buffers = TreeAttentionOutput(out.view, lse.view)
    for changes in ({"sliding_window": 0}, {"cache_lens": GOOD.cache_lens.long()}, {"v_cache": GOOD.v_cache[:, :50]}):
        arguments, _ = refused(**{name: value for name, value in changes.items() if name in GOOD._fields})
        options = {name: value for name, value in changes.items() if name not in GOOD._fields}
        arguments = [argument.to(backend.device) for argument in arguments]
        with pytest.raises((TypeError, ValueError)), Unchanged(*arguments):
            backend(*arguments, **options, return_lse=True, out=buffers, raw=True)
    out.check_untouched()
    lse.check_untouched()


def test_buffers_that_share_memory_are_refused(backend):
    inputs = AttentionInputs(*(tensor.to(backend.device) for tensor in GOOD))
    storage = torch.zeros(2, 9, 4, 33, device=backend.device)
    lse = torch.zeros(2, 9, 4, device=backend.device)
    cases = [
        (TreeAttentionOutput(storage[..., :32], storage[..., 31]), "out.* must share no memory with out"),
        (TreeAttentionOutput(inputs.q, lse), "out must share no memory with q"),
        (TreeAttentionOutput(inputs.k_cache[:, 3:12, :1].expand(2, 9, 4, 32), lse), "out must have memory of its own"),
        (TreeAttentionOutput(storage[..., :32], inputs.v_cache[:, :9, :, 0].repeat(1, 1, 2)), None),
        (TreeAttentionOutput(storage[..., :32], storage[..., 32]), None),  # side by side
    ]
    for buffers, message in cases:
        if message is None:
            backend(*inputs, return_lse=True, out=buffers, raw=True)
            continue
        with Unchanged(*inputs, storage), pytest.raises(ValueError, match=f"^tree_attention: {message}"):
            backend(*inputs, return_lse=True, out=buffers, raw=True)
