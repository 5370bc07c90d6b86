"""Realistic calls of each op whose inputs can be refilled in place: for graph capture, repetition and comparison.

`SCENARIOS` has a call for each path through an op that launches other kernels or other variants of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from support.packed_masks import RANDOM, tree_parents

from sequoia_kernels import TokenTree
from sequoia_kernels.ops import (
    CacheTable,
    compact_kv_cache_,
    sample_without_replacement,
    tree_attention,
    verify_tree,
    warped_logsumexp,
)

__all__ = ["SCENARIOS", "Scenario", "on_device", "refill"]

Tensors = dict[str, torch.Tensor]
TREE = TokenTree(tree_parents(RANDOM, 40))
BATCH, VOCAB = 3, 2003


class Scenario(NamedTuple):
    """A call with its inputs.

    Attributes:
        op: whose call it is.
        make: gives the inputs for a seed, on the CPU; the same shapes for every seed, other values.
        bind: takes inputs on a device and a backend's name and returns the call, which returns what it wrote.
    """

    op: str
    make: Callable[[int], Tensors]
    bind: Callable[[Tensors, str], Callable[[], list[torch.Tensor]]]


def on_device(tensors: Tensors, device: torch.device | str) -> Tensors:
    """Copies on a device."""
    return {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}


def refill(tensors: Tensors, values: Tensors) -> None:
    """Overwrite inputs in place."""
    for name, tensor in tensors.items():
        tensor.copy_(values[name])


def _streams(seed: int, num_rows: int) -> Tensors:
    return {
        "temperature": torch.tensor([0.0, 0.6, 1.0])[torch.arange(num_rows) % 3],
        "seeds": torch.arange(num_rows) * 7 - seed,
        "offsets": torch.arange(num_rows) + 2**33 * seed,
    }


def _attention_inputs(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    return {
        "q": normal(BATCH, TREE.num_nodes, 8, 64),
        "k_cache": normal(BATCH, 700, 2, 64),
        "v_cache": normal(BATCH, 700, 2, 64),
        "tree_mask": TREE.ancestor_mask(),
        "cache_lens": torch.tensor([(131 * seed) % 600, 600, 17], dtype=torch.int32),
    }


def _attention(inputs: Tensors, backend: str) -> Callable[[], list[torch.Tensor]]:
    return lambda: [tree_attention(*inputs.values(), backend=backend).out]


def _paged_inputs(seed: int) -> Tensors:
    """Plain decoding, one node a request, on pages that lie about in any order."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    return {
        "q": normal(BATCH, 1, 8, 64),
        "k_cache": normal(BATCH * 44, 16, 2, 64),
        "v_cache": normal(BATCH * 44, 16, 2, 64),
        "tree_mask": torch.ones(1, 1, dtype=torch.int32),
        "cache_lens": torch.tensor([(131 * seed) % 600, 600, 0], dtype=torch.int32),
        "sinks": torch.randn(8, generator=generator),
        "block_table": torch.randperm(BATCH * 44, generator=generator).view(BATCH, 44).to(torch.int32),
    }


def _paged_attention(inputs: Tensors, backend: str) -> Callable[[], list[torch.Tensor]]:
    *tensors, sinks, block_table = inputs.values()
    options: dict[str, Any] = {"sinks": sinks, "block_table": block_table, "sliding_window": 100, "return_lse": True}
    return lambda: list(tree_attention(*tensors, **options, backend=backend))


def _float8_inputs(seed: int) -> Tensors:
    inputs = _attention_inputs(seed)
    for name in ("k_cache", "v_cache"):
        inputs[name] = inputs[name].to(torch.float8_e4m3fn)
    return {**inputs, "k_scale": torch.tensor([0.5, 2.0]), "v_scale": torch.tensor([1.5, 0.25])}


def _float8_attention(inputs: Tensors, backend: str) -> Callable[[], list[torch.Tensor]]:
    *tensors, k_scale, v_scale = inputs.values()
    return lambda: [tree_attention(*tensors, k_scale=k_scale, v_scale=v_scale, backend=backend).out]


def _warping_inputs(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(6, VOCAB, generator=generator)
    return {
        "logits": logits.to(torch.bfloat16),
        "temperature": _streams(seed, 6)["temperature"],
        "top_k": torch.tensor([0, 5, 50, 1, 0, VOCAB], dtype=torch.int32).roll(seed),
        "top_p": torch.tensor([1.0, 0.9, 0.5, 1.0, 0.2, 0.99]).roll(seed),
    }


def _warping(inputs: Tensors, backend: str) -> Callable[[], list[torch.Tensor]]:
    return lambda: list(warped_logsumexp(*inputs.values(), backend=backend))


def _sampling_inputs(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(6, VOCAB, generator=generator)
    logits[4, 3:] = -torch.inf  # fewer tokens than draws
    return {"logits": logits.to(torch.bfloat16), **_streams(seed, 6)}


def _sampling(inputs: Tensors, backend: str) -> Callable[[], list[torch.Tensor]]:
    logits, *streams = inputs.values()
    return lambda: list(sample_without_replacement(logits, 8, *streams, backend=backend))


def _verification_inputs(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, TREE.num_nodes, VOCAB)
    target_logits = 3 * torch.randn(shape, generator=generator)
    draft_logits = target_logits + torch.randn(shape, generator=generator)
    tokens = torch.zeros(shape[:2], dtype=torch.int64)
    for node, count in enumerate(TREE.num_children):
        if count:
            children = TREE.children(node)
            tokens[:, children] = draft_logits[:, node].topk(count).indices
        else:
            draft_logits[:, node] = torch.nan
    streams = _streams(seed, BATCH)
    return {
        "tokens": tokens,
        "target_logits": target_logits.to(torch.bfloat16),
        "draft_logits": draft_logits.to(torch.bfloat16),
        **streams,
        "top_k": torch.tensor([0, 40, 0], dtype=torch.int32).roll(seed),
        "top_p": torch.tensor([1.0, 0.9, 0.8]).roll(seed),
    }


def _verification(inputs: Tensors, backend: str, rule: str = "sequoia") -> Callable[[], list[torch.Tensor]]:
    step = [inputs[name] for name in ("tokens", "target_logits", "draft_logits")]
    streams = [inputs[name] for name in ("temperature", "seeds", "offsets")]
    options: dict[str, Any] = {"rule": rule, "backend": backend, **{name: inputs[name] for name in ("top_k", "top_p")}}
    return lambda: list(verify_tree(*step, TREE, *streams, **options))


def _unwarped_inputs(seed: int) -> Tensors:
    inputs = _verification_inputs(seed)
    return {name: tensor for name, tensor in inputs.items() if name not in ("top_k", "top_p")}


def _unwarped(inputs: Tensors, backend: str) -> Callable[[], list[torch.Tensor]]:
    step, streams = list(inputs.values())[:3], list(inputs.values())[3:]
    return lambda: list(verify_tree(*step, TREE, *streams, backend=backend))


def _partial_inputs(seed: int) -> Tensors:
    """A draft that knows 900 tokens, and children of which every third is certain."""
    inputs = _unwarped_inputs(seed)
    known = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed))[:900]
    inputs["draft_logits"] = inputs["draft_logits"][..., known].contiguous()
    certain = (torch.arange(TREE.num_nodes) + seed) % 3 == 0
    for node, count in enumerate(TREE.num_children):
        if count:
            children = list(TREE.children(node))
            drawn = known[inputs["draft_logits"][:, node].topk(count).indices]
            likely = inputs["target_logits"][:, node].topk(count).indices
            inputs["tokens"][:, children] = torch.where(certain[children], likely, drawn)
    return {**inputs, "draft_to_target": known, "certain": certain}


def _certain_inputs(seed: int) -> Tensors:
    inputs = _partial_inputs(seed)
    del inputs["draft_logits"], inputs["draft_to_target"]
    certain = inputs["certain"].expand(BATCH, -1).clone()
    certain[seed % BATCH] = True
    return {**inputs, "certain": certain}


def _partial(inputs: Tensors, backend: str, rule: str) -> Callable[[], list[torch.Tensor]]:
    given = {"draft_logits": None, **inputs, "tree": TREE, "rule": rule, "backend": backend}
    return lambda: list(verify_tree(**given))


def _single_inputs(seed: int) -> Tensors:
    inputs = _unwarped_inputs(seed)
    del inputs["draft_logits"]
    return {**inputs, "tokens": inputs["tokens"][:, :1], "target_logits": inputs["target_logits"][:, :1]}


def _single(inputs: Tensors, backend: str) -> Callable[[], list[torch.Tensor]]:
    tokens, target_logits, *streams = inputs.values()
    tree = TokenTree.single()  # one object, whose tensors are copied to the device once
    return lambda: list(verify_tree(tokens, target_logits, None, tree, *streams, backend=backend))


def _compaction_inputs(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    caches = {f"cache {layer}": torch.randn(BATCH, 90, 2, 16, generator=generator) for layer in range(4)}
    return {
        **{name: cache.to(torch.bfloat16) for name, cache in caches.items()},
        "accepted_nodes": torch.tensor([[0, 2, 5, 9], [0, 1, 30, 31], [3, 4, 5, 6]], dtype=torch.int32),
        "num_accepted": torch.tensor([4, 3, 1], dtype=torch.int32).roll(seed),
        "cache_lens": torch.tensor([10 * seed, 40, 0], dtype=torch.int32),
    }


def _compaction(inputs: Tensors, backend: str) -> Callable[[], list[torch.Tensor]]:
    *caches, accepted_nodes, num_accepted, cache_lens = inputs.values()
    table = CacheTable(caches)

    def call() -> list[torch.Tensor]:
        compact_kv_cache_(table, accepted_nodes, num_accepted, cache_lens, backend=backend)
        return [*caches, cache_lens]

    return call


def _paged_compaction_inputs(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    inputs = _compaction_inputs(seed)
    for layer in range(4):
        inputs[f"cache {layer}"] = inputs[f"cache {layer}"].view(BATCH * 9, 10, 2, 16)
    block_table = torch.randperm(BATCH * 9, generator=generator).view(BATCH, 9).to(torch.int32)
    return {"block_table": block_table, **inputs}


def _paged_compaction(inputs: Tensors, backend: str) -> Callable[[], list[torch.Tensor]]:
    block_table, *caches, accepted_nodes, num_accepted, cache_lens = inputs.values()
    table = CacheTable(caches, paged=True)

    def call() -> list[torch.Tensor]:
        path = (accepted_nodes, num_accepted, cache_lens)
        compact_kv_cache_(table, *path, block_table=block_table, backend=backend)
        return [*caches, cache_lens]

    return call


SCENARIOS = {
    "tree_attention": Scenario("tree_attention", _attention_inputs, _attention),
    "tree_attention, one node, paged": Scenario("tree_attention", _paged_inputs, _paged_attention),
    "tree_attention, float8": Scenario("tree_attention", _float8_inputs, _float8_attention),
    "warped_logsumexp": Scenario("warped_logsumexp", _warping_inputs, _warping),
    "sample_without_replacement": Scenario("sample_without_replacement", _sampling_inputs, _sampling),
    "verify_tree": Scenario("verify_tree", _verification_inputs, _verification),
    "verify_tree, traversal": Scenario(
        "verify_tree", _verification_inputs, functools.partial(_verification, rule="traversal")
    ),
    "verify_tree, unwarped": Scenario("verify_tree", _unwarped_inputs, _unwarped),
    "verify_tree, one node": Scenario("verify_tree", _single_inputs, _single),
    "verify_tree, map and certain children": Scenario(
        "verify_tree", _partial_inputs, functools.partial(_partial, rule="sequoia")
    ),
    "verify_tree, traversal, map and certain children": Scenario(
        "verify_tree", _partial_inputs, functools.partial(_partial, rule="traversal")
    ),
    "verify_tree, certain children alone": Scenario(
        "verify_tree", _certain_inputs, functools.partial(_partial, rule="sequoia")
    ),
    "verify_tree, traversal, certain children alone": Scenario(
        "verify_tree", _certain_inputs, functools.partial(_partial, rule="traversal")
    ),
    "compact_kv_cache_": Scenario("compact_kv_cache_", _compaction_inputs, _compaction),
    "compact_kv_cache_, paged": Scenario("compact_kv_cache_", _paged_compaction_inputs, _paged_compaction),
}
