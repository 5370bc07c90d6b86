"""The target's part of a step on the CPU, on memory that is known beforehand; see csrc/host/tree_commit.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sequoia_kernels.drafts import DecodingState, TokenBuffers, TreeLayout
from sequoia_kernels.host_module import host as _host
from sequoia_kernels.models import TreeCache, TreeModel
from sequoia_kernels.ops import CacheTable, VerifiedPath, compact_kv_cache_, verify_tree
from sequoia_kernels.ops.backends import runs_own
from sequoia_kernels.ops.host_calls import ELEMENT_TYPES, VERIFICATION_RULES, address

__all__ = ["HostStep"]


class HostStep:
    """Scores, verifies and commits one tree in its buffers, on what the state holds then.

    Args:
        target: the target.
        cache: its cache.
        state: the batch's state.
        layout: the tree.
        buffers: its tokens and the draft's logits.
        caches: all caches, by the lengths that count their rows.
        rule: verification rule, one that `serves` knows.

    Attributes:
        path: what `verify` decides; overwritten by the next step.
        emitted: tokens, nodes and their number, as `commit` leaves them; overwritten by the next step.
        scored: memory of logits, and what of it takes this tree's; for whoever runs `forward`.
        hidden_states: what of them a draft wants, by number, as `forward` leaves them. [B, N, width] float32 each.
    """

    def __init__(
        self, target: TreeModel, cache: TreeCache, state: DecodingState, layout: TreeLayout, buffers: TokenBuffers,
        caches: Sequence[tuple[Sequence[CacheTable], torch.Tensor]], rule: str,
    ) -> None:  # fmt: skip
        cache.require_rows("HostStep")
        tokens, draft_logits = buffers.tokens, buffers.draft_logits
        topology = layout.topology
        batch_size, num_nodes = tokens.shape
        if not isinstance(topology, tuple):
            topology = topology.tensors(tokens.device)
        levels = topology.num_levels
        self.path = VerifiedPath(  # of a request that was never active: the root alone
            torch.zeros(batch_size, levels, dtype=torch.int32), torch.ones(batch_size, dtype=torch.int32),
            torch.zeros(batch_size, dtype=torch.int64),
        )  # fmt: skip
        emitted = torch.empty(batch_size, levels, dtype=torch.int64)
        num_emitted = torch.empty(batch_size, dtype=torch.int32)
        self.emitted = emitted, self.path.nodes, num_emitted
        self.forward = target.bind(tokens, cache, state.cache_lens, layout.target_step, active=state.active)
        self.scored = (torch.empty(0), torch.empty(0))
        self.hidden_states: dict[int, torch.Tensor] = {}
        self._held = state, buffers, topology, caches
        self._shape = (batch_size, num_nodes, target.vocab_size)
        numbers: dict[str, Any] = {
            "batch_size": batch_size,
            "num_nodes": num_nodes,
            "num_levels": levels,
            "vocab": target.vocab_size,
            "draft_vocab": target.vocab_size if draft_logits is None else draft_logits.shape[2],
            "max_branching": topology.max_branching,
            "topology_stride": num_nodes if topology.first_child.dim() == 2 else 0,
            "draft_type": ELEMENT_TYPES[target.logits_dtype if draft_logits is None else draft_logits.dtype],
            "rule_code": VERIFICATION_RULES[rule],
            "caches": [
                (table.entries.data_ptr(), len(table), lens.data_ptr(), table.num_slots)
                for tables, lens in caches
                for table in tables
            ],
        }
        tensors = {
            "tokens": tokens,
            "draft_logits": draft_logits,
            "target_to_draft": None if buffers.vocabulary is None else buffers.vocabulary.target_to_draft,
            "certain": buffers.certain,
            "first_child": topology.first_child,
            "num_children": topology.num_children,
            "temperature": state.temperature,
            "seeds": state.seeds,
            "offsets": state.offsets,
            "top_k": state.top_k,
            "top_p": state.top_p,
            "active": state.active,
            "last_tokens": state.last_tokens,
            "root_tokens": state.root_tokens,
            "nodes": self.path.nodes,
            "num_accepted": self.path.num_accepted,
            "next_token": self.path.next_token,
            "emitted": emitted,
            "num_emitted": num_emitted,
        }
        assert all(tensor is None or tensor.is_contiguous() for tensor in tensors.values())
        self._commit = _host.TreeCommit(numbers | {name: address(tensor) for name, tensor in tensors.items()})

    @staticmethod
    def serves(backend: str, rule: str) -> bool:
        """Tell whether the ops that are gone past here would run in C++ on the CPU."""
        ops = (verify_tree, compact_kv_cache_)
        return rule in VERIFICATION_RULES and all(runs_own(op.__name__, backend, "cpu", "host") for op in ops)

    def verify(self, logits: torch.Tensor) -> VerifiedPath | None:
        """Decide the paths of active requests.

        None, and they are of no use, where a value or the logits' layout is not what it can be.

        Args:
            logits: the target's. [B, N, vocab].
        """
        code = ELEMENT_TYPES.get(logits.dtype)
        if code is None or logits.shape != self._shape or logits.stride(2) != 1 or not logits.is_cpu:
            return None
        verified = self._commit.verify(logits.data_ptr(), code, logits.stride(0), logits.stride(1))
        return self.path if verified else None

    def commit(self) -> bool:
        """Commit `path`: see `DecodingStep.commit_path`. False, and nothing is written, where a cache is too short."""
        return bool(self._commit.commit())
