"""Small calls of every op that make its kernels do what they do: splits, pages, merges, several blocks and requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from support.few_rows_forwards import Sizes, forward_of, is_same
from support.packed_masks import RANDOM, pack_tree, tree_parents
from support.ptx.cuda_launches import native_few_rows
from support.ptx.emulator import Emulator
from support.ptx.triton_launches import emulated
from support.shaped_trees import steep_confidence

from sequoia_kernels import TokenTree
from sequoia_kernels.drafts import TreeLayout
from sequoia_kernels.drafts.unlikely import set_back_unlikely
from sequoia_kernels.models.fused import few_rows
from sequoia_kernels.ops import (
    compact_kv_cache_,
    sample_without_replacement,
    tree_attention,
    verify_tree,
    warped_logsumexp,
)  # fmt: skip
from sequoia_kernels.tree import ShapedTree, Topology

__all__ = ["CALLS", "Call", "FewRowsForward", "attention_call", "collecting_call", "compaction_call"]


class Call(NamedTuple):
    """One call of an op, or of what a draft does beside them."""

    op: str
    make: Callable[[str], tuple[torch.Tensor, ...]]
    """makes it with a backend, always from the same inputs, and gives its results"""
    tolerance: float
    """largest error of a float against the reference"""

    def is_right(self, emulator: Emulator, capability: int) -> bool:
        """Make the call in an emulator and compare it with the reference."""
        with emulated(emulator, capability):
            return self.agrees(self.make("triton"))

    def agrees(self, results: tuple[torch.Tensor, ...]) -> bool:
        """Whether results are those of the reference."""
        for result, expected in zip(results, self.make("reference"), strict=True):
            if not expected.is_floating_point():
                if not torch.equal(result, expected):
                    return False
            elif not torch.allclose(result.double(), expected.double(), rtol=0, atol=self.tolerance):
                return False
        return True


class FewRowsForward(NamedTuple):
    """A forward of few rows in one launch, of random weights."""

    sizes: Sizes
    dtype: torch.dtype = torch.bfloat16
    num_blocks: int = 3
    shared_bytes: int = 163 << 10

    def is_right(self, emulator: Emulator, capability: int) -> bool:
        """Make the launch in an emulator and compare it with its specification."""
        given, counters = forward_of(self.sizes, self.dtype), torch.zeros(2, dtype=torch.int32)
        expected, call = given.expected(), given.call(counters)
        for empty in (call.kept[_WORK_SPACE], call.logits):
            emulator.watch_empty(empty)
        emulator.reachable = [*given.tensors(), *zip(_KEPT, call.kept, strict=True)]
        with native_few_rows(emulator, capability, num_blocks=self.num_blocks, shared_bytes=self.shared_bytes):
            few_rows.launch(call)
        return is_same(given, call, expected) and counters.tolist() == [0, 0]


_KEPT = (
    "embedding", "final_norm", "head", "table", "tokens", "cache_lens", "depths", "node_ids", "tree_mask", "stream",
    "projected", "attended", "inner", "logits", "counters",
)  # fmt: skip
_WORK_SPACE = _KEPT.index("stream")


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def attention_call(
    dtype: torch.dtype, num_nodes: int, head_dim: int, cache_lens: list[int], num_slots: int, heads: tuple[int, int]
) -> Call:
    """tree_attention; its numbers of rows decide between matrix instructions of warps and of warp groups."""
    generator, batch_size = _generator(), len(cache_lens)
    mask = pack_tree(tree_parents(RANDOM, num_nodes))
    q = torch.randn(batch_size, num_nodes, heads[0], head_dim, generator=generator).to(dtype)
    k, v = (torch.randn(batch_size, num_slots, heads[1], head_dim, generator=generator).to(dtype) for _ in range(2))
    lens = torch.tensor(cache_lens, dtype=torch.int32)

    def make(backend: str) -> tuple[torch.Tensor, ...]:
        floats = (x.double() if backend == "reference" else x for x in (q, k, v))
        return tuple(tree_attention(*floats, mask, lens, return_lse=True, backend=backend))

    return Call("tree_attention", make, 0.02 if dtype != torch.float32 else 0.002)


def _warping_call() -> Call:
    logits = torch.randn(2, 500, generator=_generator())
    return Call(
        "warped_logsumexp", lambda backend: tuple(warped_logsumexp(logits, 0.8, 40, 0.9, backend=backend)), 1e-5
    )


def collecting_call(top_k: int, top_p: float) -> Call:
    """A cut among the logits of several chunks that programs collect, in the order in which they come."""
    logits = torch.randn(2, 2000, generator=_generator()) * 3

    def make(backend: str) -> tuple[torch.Tensor, ...]:
        return tuple(warped_logsumexp(logits, 0.8, top_k, top_p, backend=backend))

    return Call("warped_logsumexp", make, 1e-5)


def _sampling_call() -> Call:
    logits = torch.randn(2, 300, generator=_generator())

    def make(backend: str) -> tuple[torch.Tensor, ...]:
        return tuple(sample_without_replacement(logits, 5, 0.7, 3, 1, backend=backend))

    return Call("sample_without_replacement", make, 1e-5)


def _verification_call(temperature: float, rule: str, vocab: int = 150, **cuts: float) -> Call:
    generator = _generator()
    tree = TokenTree([-1, 0, 0, 0, 1, 1, 4])
    target = torch.randn(2, tree.num_nodes, vocab, generator=generator) * 1.5
    draft = torch.randn(2, tree.num_nodes, vocab, generator=generator) * 1.5
    tokens = torch.stack([torch.randperm(vocab, generator=generator)[: tree.num_nodes] for _ in range(2)])

    def make(backend: str) -> tuple[torch.Tensor, ...]:
        return tuple(verify_tree(tokens, target, draft, tree, temperature, 5, 0, rule=rule, backend=backend, **cuts))

    return Call("verify_tree", make, 0.0)


def _setting_back_call() -> Call:
    """Rows of two chunks, of a request that is cut and of two that are not."""
    logits = (torch.randn(3, 2, 2200, generator=_generator()) * 3).to(torch.bfloat16)
    settings = torch.tensor([0.7, 0.0, 0.8]), torch.tensor([0.8, 0.8, 1.0])
    return Call("set_back_unlikely", lambda backend: (set_back_unlikely(logits, *settings, backend),), 0.0)


def _shaping_call() -> Call:
    """Two requests, one of them greedy, whose trees have two words of masks; draws that have run out."""
    tree, vocab, generator = ShapedTree((1, 4, 9, 21, 3), steep_confidence(4)), 4200, _generator()
    rows = [(torch.randn(2, width, vocab, generator=generator) * 3).half() for width in tree.widths[:-1]]
    tokens = torch.randint(-1, vocab, (2, tree.num_nodes), generator=generator)
    temperature = torch.tensor([0.0, 0.8])

    def make(backend: str) -> tuple[torch.Tensor, ...]:
        layout = TreeLayout.build(tree, "cpu", 2)
        results = []
        for level, logits in zip(layout.levels, rows, strict=True):
            assert level.shape is not None
            level.shape.give_out(logits, temperature, backend)
            level.shape.note_draws(logits, temperature, tokens, backend)
            results += [level.drawn, level.shape.shared.reach.clone()]
            results += [] if level.shape.own_mask is None else [level.shape.own_mask]
        assert isinstance(layout.topology, Topology)
        return (*layout.topology[:-2], *results)

    return Call("shaping", make, 1e-6)


def compaction_call() -> Call:
    """Three caches of two requests, one path with gaps and one without."""
    generator = _generator()
    caches = [torch.randn(2, 40, 2, 24, generator=generator) for _ in range(3)]
    nodes = torch.tensor([[0, 2, 5, 6], [0, 1, -1, -1]], dtype=torch.int32)
    accepted = torch.tensor([4, 2], dtype=torch.int32)
    lens = torch.tensor([11, 20], dtype=torch.int32)

    def make(backend: str) -> tuple[torch.Tensor, ...]:
        moved, advanced = [cache.clone() for cache in caches], lens.clone()
        compact_kv_cache_(moved, nodes, accepted, advanced, backend=backend)
        return (*moved, advanced)

    return Call("compact_kv_cache_", make, 0.0)


CALLS: dict[str, Callable[[], Call]] = {
    "attention of few rows, bfloat16": lambda: attention_call(torch.bfloat16, 9, 64, [95, 31], 140, (3, 1)),
    "attention of many rows, bfloat16": lambda: attention_call(torch.bfloat16, 40, 64, [90], 150, (4, 1)),
    "attention, float32": lambda: attention_call(torch.float32, 5, 32, [40], 60, (2, 1)),
    "warped normaliser": _warping_call,
    "cuts among what programs collect": lambda: collecting_call(3, 0.9),
    "sampling": _sampling_call,
    "verification, greedy": lambda: _verification_call(0.0, "sequoia"),
    "verification, sequoia": lambda: _verification_call(0.8, "sequoia"),
    "verification, traversal": lambda: _verification_call(0.8, "traversal"),
    "verification, cuts": lambda: _verification_call(0.8, "sequoia", 700, top_k=2, top_p=0.9),
    "compaction": compaction_call,
    "unlikely tokens set back": _setting_back_call,
    "children given out": _shaping_call,
}
"""name -> the call"""
