"""What is timed: forwards and ops on inputs shaped like those of a decoding step. Builders only; nothing runs here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch

from sequoia_kernels.models import TreeCache, TreeModel, TreeStep
from sequoia_kernels.ops import CacheTable, compact_kv_cache_, sample_without_replacement, verify_tree
from sequoia_kernels.ops.backends import runs_own
from sequoia_kernels.ops.compact_kv_cache_ import host as moves_on_host
from sequoia_kernels.ops.compact_kv_cache_.op import CompactInputs
from sequoia_kernels.ops.sample_without_replacement import host as draws_on_host
from sequoia_kernels.ops.sample_without_replacement.op import SampleInputs
from sequoia_kernels.ops.verify_tree import host as paths_on_host
from sequoia_kernels.ops.verify_tree.op import VerifyTreeInputs
from sequoia_kernels.planner import optimal_tree
from sequoia_kernels.tree import DEFAULT_RULE, TYPICAL_ACCEPTANCE, TokenTree

__all__ = [
    "compact_call", "draft_step", "draft_tree_rows", "draw_and_verify_calls", "forward_call", "op_key", "sample_call",
    "target_step", "typical_tree", "verify_call",
]  # fmt: skip

Call = Callable[[], object]
Key = tuple[str, tuple[tuple[str, Any], ...]]  # an op and its sizes, by name

SAMPLE_COUNTS = (1, 2, 4, 8, 16, 32)
COMPACT_LEVELS = (1, 2, 4, 8, 16, 32)
TEMPERATURES = (0.0, 1.0)  # greedy and sampled: the ops take different ways


def op_key(op: str, **parameters: float | str) -> Key:
    """Name a timed call of an op by its sizes."""
    return op, tuple(parameters.items())


@cache
def typical_tree(num_nodes: int) -> TokenTree:
    """Give the tree of `num_nodes` that is timed: the optimal one for a typical acceptance vector."""
    return optimal_tree(TYPICAL_ACCEPTANCE, num_nodes)


def target_step(num_nodes: int, device: torch.device) -> TreeStep:
    """Give a target forward's rows: all nodes of a tree."""
    return TreeStep.of(typical_tree(num_nodes).tensors(device))


def draft_step(num_rows: int, device: torch.device) -> TreeStep:
    """Give a draft forward's rows: some nodes of a tree, not side by side, as internal nodes of a level mostly are."""
    if num_rows <= 2:  # the first forward of a step feeds two neighbouring rows, and one row is always a run of its own
        return TreeStep.of(TokenTree.chain(2).tensors(device), range(2 - num_rows, 2))
    return TreeStep.of(typical_tree(2 * num_rows).tensors(device), range(1, 2 * num_rows, 2))


def draft_tree_rows(num_rows: int) -> int:
    """Give the rows behind the committed ones that `draft_step` may write."""
    return 2 if num_rows <= 2 else 2 * num_rows


def forward_call(model: TreeModel, caches: TreeCache, context_len: int, step: TreeStep) -> Call:
    """Build a forward of one step behind `context_len` committed tokens of every request."""
    batch_size = caches.batch_size
    num_rows = step.node_ids.shape[0]
    generator = torch.Generator().manual_seed(num_rows)
    input_ids = torch.randint(model.num_embeddings, (batch_size, num_rows), generator=generator).to(model.device)
    cache_lens = torch.full((batch_size,), context_len, dtype=torch.int32, device=model.device)
    bound = model.bind(input_ids, caches, cache_lens, step)
    if bound is None:
        return lambda: model.forward(input_ids, caches, cache_lens, step)
    logits = torch.empty(bound.shape, dtype=model.logits_dtype)

    def call() -> torch.Tensor:
        if not bound.run(logits):  # as a step of the loop does
            raise ValueError(f"forward_call: caches must have room behind {context_len} tokens")
        return logits

    return call


def draw_and_verify_calls(
    batch_size: int,
    node_counts: Sequence[int],
    draw_rows: Sequence[int],
    sample_counts: Sequence[int],
    vocabs: tuple[int, int],  # of verification and of the draws
    dtypes: tuple[torch.dtype, torch.dtype],  # of the target's and of the draft's logits
    device: torch.device,
) -> Iterator[tuple[Key, Call]]:
    """Build verifications of trees and draws of children, greedy and sampled."""
    for temperature in TEMPERATURES:
        for nodes in node_counts:
            sizes: dict[str, Any] = {"batch_size": batch_size, "nodes": nodes, "vocab": vocabs[0]}
            sizes["temperature"] = temperature
            yield op_key("verify_tree", **sizes), verify_call(**sizes, dtypes=dtypes, device=device)
            if temperature > 0:  # greedily all rules are one
                sizes["rule"] = "traversal"
                yield op_key("verify_tree", **sizes), verify_call(**sizes, dtypes=dtypes, device=device)
        for rows in draw_rows:
            for num_samples in sample_counts:
                if num_samples <= vocabs[1]:
                    sizes = {"rows": rows, "num_samples": num_samples, "vocab": vocabs[1], "temperature": temperature}
                    call = sample_call(**sizes, dtype=dtypes[1], device=device)
                    yield op_key("sample_without_replacement", **sizes), call


def sample_call(
    rows: int, num_samples: int, vocab: int, temperature: float, dtype: torch.dtype, device: torch.device
) -> Call:
    """Build a draw of `num_samples` children for each of `rows` nodes."""
    logits = _logits((rows, vocab), dtype, device)
    temperatures, seeds, offsets = _streams(rows, temperature, device)
    if not _in_place(sample_without_replacement, device):
        return lambda: sample_without_replacement(logits, num_samples, temperatures, seeds, offsets)
    drawn = sample_without_replacement(logits, num_samples, temperatures, seeds, offsets)
    inputs = SampleInputs(logits, num_samples, temperatures, seeds, offsets)
    return _returning(drawn, partial(draws_on_host.bind(inputs, drawn), True))


def verify_call(
    batch_size: int,
    nodes: int,
    vocab: int,
    temperature: float,
    dtypes: tuple[torch.dtype, torch.dtype],  # of the target's and of the draft's logits
    device: torch.device,
    rule: str = DEFAULT_RULE,
) -> Call:
    """Build a verification of a tree whose draft resembles its target; children are the draft's likeliest tokens.

    On a CPU, where it depends on the coins which nodes cost anything, every call has other ones.
    """
    tree = typical_tree(nodes)
    shape = (batch_size, nodes, vocab)
    common = _logits(shape, torch.float32, device)
    target_logits = common.to(dtypes[0])
    draft_logits = (common + 0.5 * _logits(shape, torch.float32, device, seed=1)).to(dtypes[1])
    topology = tree.tensors(device)
    tokens = torch.zeros(batch_size, nodes, dtype=torch.int64, device=device)
    if nodes > 1:
        likeliest = draft_logits.topk(min(max(tree.num_children), vocab), dim=-1).indices  # [B, N, branching]
        ranks = topology.ranks[1:].clamp(max=likeliest.shape[2] - 1).to(torch.int64)
        tokens[:, 1:] = likeliest[:, topology.parents[1:].to(torch.int64), ranks]
    temperatures, seeds, offsets = _streams(batch_size, temperature, device)
    draft_or_none = draft_logits if nodes > 1 else None
    if not _in_place(verify_tree, device):
        return lambda: verify_tree(tokens, target_logits, draft_or_none, tree, temperatures, seeds, offsets, rule=rule)
    path = verify_tree(tokens, target_logits, draft_or_none, tree, temperatures, seeds, offsets)
    inputs = VerifyTreeInputs(
        tokens, target_logits, draft_or_none, topology.first_child, topology.num_children, topology.num_levels,
        topology.max_branching, temperatures, seeds, offsets, None, None, rule,
    )  # fmt: skip
    verify, streams = paths_on_host.bind(inputs, path), offsets.numpy()

    def work() -> None:
        streams[:] += nodes
        verify(True)

    return _returning(path, work)


def compact_call(tensors: Sequence[torch.Tensor], context_len: int, num_levels: int, num_tree_rows: int) -> Call:
    """Build a compaction of these caches that accepts one node of every level, spread over the tree's rows.

    It advances its lengths, so each call first sets them back: that copy of a few bytes is timed with it.
    """
    batch_size, device = tensors[0].shape[0], tensors[0].device
    tables = CacheTable.by_device(tensors)
    nodes = [level * (num_tree_rows - 1) // max(num_levels - 1, 1) for level in range(num_levels)]
    accepted_nodes = torch.tensor(nodes, dtype=torch.int32, device=device).repeat(batch_size, 1)
    num_accepted = torch.full((batch_size,), num_levels, dtype=torch.int32, device=device)
    committed = torch.full((batch_size,), context_len, dtype=torch.int32, device=device)
    cache_lens = committed.clone()
    moves: list[Call] = [lambda: compact_kv_cache_(tables, accepted_nodes, num_accepted, cache_lens)]
    if _in_place(compact_kv_cache_, device):
        moves = [
            moves_on_host.bind(
                CompactInputs(
                    list(table.caches), accepted_nodes, num_accepted, cache_lens, None, table.entries,
                    table.max_row_bytes, table.num_slots, table is tables[-1],
                )
            )
            for table in tables
        ]  # fmt: skip

    def call() -> None:
        cache_lens.copy_(committed)
        for move in moves:
            move()

    return call


def _in_place(op: Callable[..., object], device: torch.device) -> bool:
    """Tell whether the loop goes past an op, straight to what runs it on the CPU."""
    return device.type == "cpu" and runs_own(op.__name__, "auto", "cpu", "host")


def _returning(result: object, work: Call) -> Call:
    def call() -> object:
        work()
        return result

    return call


def _logits(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return (3 * torch.randn(shape, generator=generator, device=device)).to(dtype)


def _streams(num_rows: int, temperature: float, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Temperature, seed and offset of each row."""
    return (
        torch.full((num_rows,), temperature, dtype=torch.float32, device=device),
        torch.arange(num_rows, dtype=torch.int64, device=device),
        torch.zeros(num_rows, dtype=torch.int64, device=device),
    )
