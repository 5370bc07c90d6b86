"""One realistic call of each op whose inputs can be refilled in place: for graph capture, repetition and comparison."""

from __future__ import annotations

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
        make: gives the inputs for a seed, on the CPU; the same shapes for every seed, other values.
        bind: takes inputs on a device and a backend's name and returns the call, which returns what it wrote.
    """

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


def _verification(inputs: Tensors, backend: str) -> Callable[[], list[torch.Tensor]]:
    step = [inputs[name] for name in ("tokens", "target_logits", "draft_logits")]
    streams = [inputs[name] for name in ("temperature", "seeds", "offsets")]
    warps: dict[str, Any] = {name: inputs[name] for name in ("top_k", "top_p")}
    return lambda: list(verify_tree(*step, TREE, *streams, **warps, backend=backend))


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


SCENARIOS = {
    "tree_attention": Scenario(_attention_inputs, _attention),
    "warped_logsumexp": Scenario(_warping_inputs, _warping),
    "sample_without_replacement": Scenario(_sampling_inputs, _sampling),
    "verify_tree": Scenario(_verification_inputs, _verification),
    "compact_kv_cache_": Scenario(_compaction_inputs, _compaction),
}
