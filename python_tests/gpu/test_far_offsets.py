"""Tensors of more than 2^31 elements: every op must reach their far end as it reaches a small tensor.

The far end of a tensor is compared with a call on that end alone. On a CUDA device the tensors are large, 4 to 9 GB;
the same bodies run on small ones on the CPU, so that a mistake in a body shows there.
"""

from __future__ import annotations

import pytest
import torch

from sequoia_kernels import TokenTree
from sequoia_kernels.ops import (
    backends,
    compact_kv_cache_,
    sample_without_replacement,
    tree_attention,
    verify_tree,
    warped_logsumexp,
)

HEADS, HEAD_DIM, PAGE = 8, 128, 16
FAR_SLOTS = 2**21 + 4096  # times 8 heads of 128: more than 2^31 elements
FAR_VOCAB = 128256
GIB = 2**30


def places(op):
    """(device, backend): ours on a CUDA device with the memory for it, and the reference on the CPU, small."""
    parameters = [pytest.param("cpu", "reference", id="cpu-reference")]
    for name in ("triton", "cuda"):
        if name not in backends.backend_names(op):
            continue
        reason = backends.unavailable_reason(op, name)
        if not torch.cuda.is_available():
            reason = "no CUDA device"
        elif torch.cuda.get_device_properties(0).total_memory < 20 * GIB:
            reason = "the device has less than 20 GiB"
        marks = [] if reason is None else [pytest.mark.skip(reason=f"{name}: {reason}")]
        parameters.append(pytest.param("cuda", name, id=f"cuda-{name}", marks=marks))
    return parameters


def far(device, large, small):
    return large if device == "cuda" else small


def normal(*shape, device):
    return torch.randn(*shape, device=device).to(torch.bfloat16)


def stretch(num_slots, layout, device):
    """A cache [1, num_slots, heads, head dim] of which only the last 512 slots hold numbers."""
    shape = (1, HEADS, num_slots, HEAD_DIM) if layout == "head by head" else (1, num_slots, HEADS, HEAD_DIM)
    cache = torch.empty(shape, dtype=torch.bfloat16, device=device)
    cache = cache.transpose(1, 2) if layout == "head by head" else cache
    cache[:, -512:] = normal(1, 512, HEADS, HEAD_DIM, device=device)
    return cache


@pytest.mark.parametrize("layout", ["slot by slot", "head by head", "pages"])
@pytest.mark.parametrize(("device", "backend"), places("tree_attention"))
def test_attention(device, backend, layout):
    torch.manual_seed(0)
    num_slots, window = far(device, FAR_SLOTS, 2048), 200
    tree = TokenTree.kary(2, 4)
    caches = [stretch(num_slots, layout, device) for _ in range(2)]
    near = [cache[:, -512:].contiguous() for cache in caches]
    q = normal(1, tree.num_nodes, 4 * HEADS, HEAD_DIM, device=device)
    mask = tree.tensors(device).ancestor_mask
    near_lens = torch.tensor([512 - tree.num_nodes], dtype=torch.int32, device=device)
    options = {"sliding_window": window, "return_lse": True}
    wanted = tree_attention(q, *near, mask, near_lens, backend=backend, **options)
    if layout == "pages":
        pages = [cache.view(-1, PAGE, HEADS, HEAD_DIM) for cache in caches]
        first = num_slots // PAGE - 512 // PAGE
        table = torch.arange(first, num_slots // PAGE, dtype=torch.int32, device=device)[None]
        got = tree_attention(q, *pages, mask, near_lens, block_table=table, backend=backend, **options)
    else:
        lens = near_lens + (num_slots - 512)
        got = tree_attention(q, *caches, mask, lens, backend=backend, **options)
    torch.testing.assert_close(got.out, wanted.out, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(got.lse, wanted.lse, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", ["slot by slot", "head by head"])
@pytest.mark.parametrize(("device", "backend"), places("compact_kv_cache_"))
def test_compaction(device, backend, layout):
    torch.manual_seed(0)
    num_slots = far(device, FAR_SLOTS, 2048)
    cache = stretch(num_slots, layout, device)
    wanted = cache[:, -512:].clone()
    path = torch.tensor([[0, 2, 5, 9, 30]], dtype=torch.int32, device=device)
    wanted[:, 400:405] = wanted[:, 400 + path[0].long()]
    lens = torch.tensor([num_slots - 112], dtype=torch.int32, device=device)
    compact_kv_cache_([cache], path, torch.tensor([5], dtype=torch.int32, device=device), lens, backend=backend)
    assert torch.equal(cache[:, -512:], wanted)
    assert lens.tolist() == [num_slots - 107]


@pytest.fixture(scope="module")
def far_logits():
    """Rows of logits for each device, made once: [17280, vocab] on a CUDA device."""
    made = {}

    def make(device):
        if device not in made:
            generator = torch.Generator(device).manual_seed(0)
            shape = far(device, (270 * 64, FAR_VOCAB), (6 * 64, 211))
            logits = torch.empty(shape, dtype=torch.bfloat16, device=device)
            made[device] = logits.normal_(0.0, 3.0, generator=generator)
        return made[device]

    return make


@pytest.mark.parametrize(("device", "backend"), places("warped_logsumexp"))
def test_warping(far_logits, device, backend):
    logits = far_logits(device)
    for top_p in (None, 0.9):
        got = warped_logsumexp(logits, 0.7, None, top_p, backend=backend)
        wanted = warped_logsumexp(logits[-4:].clone(), 0.7, None, top_p, backend=backend)
        torch.testing.assert_close([column[-4:] for column in got], list(wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("device", "backend"), places("sample_without_replacement"))
def test_sampling(far_logits, device, backend):
    logits = far_logits(device)
    seeds = torch.arange(logits.shape[0], device=device)
    got = sample_without_replacement(logits, 8, 0.7, seeds, 5, backend=backend)
    wanted = sample_without_replacement(logits[-4:].clone(), 8, 0.7, seeds[-4:], 5, backend=backend)
    assert torch.equal(got.tokens[-4:], wanted.tokens)
    torch.testing.assert_close(got.log_normaliser[-4:], wanted.log_normaliser, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("device", "backend"), places("verify_tree"))
def test_verification(far_logits, device, backend):
    """Each request alone decides as it does in the batch."""
    tree = TokenTree.kary(3, 3)
    logits = far_logits(device)
    logits = logits.view(-1, 64, logits.shape[1])[:, : tree.num_nodes]
    tokens = torch.zeros(logits.shape[:2], dtype=torch.int64, device=device)
    for node in range(tree.num_nodes):
        if tree.num_children[node]:
            tokens[:, tree.children(node)] = logits[:, node, :100].topk(tree.num_children[node]).indices
    seeds = torch.arange(logits.shape[0], device=device)
    for top_p in (None, 0.9):
        got = verify_tree(tokens, logits, logits, tree, 0.7, seeds, 9, top_p=top_p, backend=backend)
        for request in (0, -2, -1):
            part = slice(request, request + 1 or None)
            alone = (tokens[part].clone(), logits[part].clone(), logits[part].clone())
            wanted = verify_tree(*alone, tree, 0.7, seeds[part], 9, top_p=top_p, backend=backend)
            for left, right in zip(got, wanted, strict=True):
                assert torch.equal(left[part], right)
