"""A tree grown on the CPU, all levels in one call: by a native draft, or on rows that a draft has scored beforehand.

See csrc/host/tree_growth.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sequoia_kernels.drafts import unlikely
from sequoia_kernels.drafts.clock import StageClock
from sequoia_kernels.drafts.levels import DraftLevel, TokenBuffers, TreeLayout
from sequoia_kernels.drafts.shaping import LevelShape
from sequoia_kernels.drafts.state import DecodingState
from sequoia_kernels.drafts.vocabulary import TokenPairing
from sequoia_kernels.host_module import host as _host
from sequoia_kernels.models import BoundForward, TreeCache, TreeModel, bind_linear
from sequoia_kernels.ops import sample_without_replacement
from sequoia_kernels.ops.backends import runs_own
from sequoia_kernels.ops.host_calls import ELEMENT_TYPES, address

__all__ = ["ConfidenceHead", "HostGrowth", "MarkovHead"]


@dataclass(frozen=True)
class MarkovHead:
    """A Markov head of rank r on the CPU: what a node's own token adds to the row of its depth. See markov_level.h.

    Weights are of the rows' dtype; what changes from step to step is float32.

    Attributes:
        table: numbers of each token. [tokens, r].
        weight: multiplies these, or what becomes of them, to logits. [vocab, r].
        mixing: of a head that reads slots, what it does to [state; numbers] or to the numbers. [r, r] or [3r, 2r].
        slots: what it gives for each slot of the block, written before every run. [B, block_size, at least r or 3r].
        states: of a head that hands states on, of each node behind that of the root. [B, N + 1, r].
        first_slot: the slot of the first level's row.
    """

    table: torch.Tensor
    weight: torch.Tensor
    mixing: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    states: torch.Tensor | None = None
    first_slot: int = 0

    @property
    def weights(self) -> list[torch.Tensor]:
        """What it multiplies with."""
        return [part for part in (self.table, self.weight, self.mixing) if part is not None]


@dataclass(frozen=True)
class ConfidenceHead:
    """A confidence head on the CPU: how likely a child of a node is accepted. See foretold_level.h.

    Attributes:
        slots: what it gives for each slot of the block, written before every run. [B, block_size] float32.
        first_slot: as in `MarkovHead`.
        table: numbers of each token that it reads beside, of the rows' dtype. [tokens, r]. None where it reads none.
        weight: multiplies these. [r] float32.
    """

    slots: torch.Tensor
    first_slot: int
    table: torch.Tensor | None = None
    weight: torch.Tensor | None = None


class HostGrowth:
    """Grows one tree in its buffers, on what the state holds then, for the requests that are active.

    Args:
        prepared: the C++ object.
        bound: the forward of one of its levels, which knows where the weights lie; None where every level knows.
        held: what its addresses lie in.
    """

    def __init__(self, prepared: Any, bound: BoundForward | None, held: list[Any]) -> None:
        self._prepared, self._bound, self._held = prepared, bound, held

    @classmethod
    def bind(
        cls, model: TreeModel, cache: TreeCache, state: DecodingState, layout: TreeLayout, buffers: TokenBuffers,
        backend: str, pairing: TokenPairing | None = None, feeds_last: bool = True,
    ) -> HostGrowth | None:  # fmt: skip
        """Prepare growing a tree; None where the draft's forwards or draws run elsewhere.

        `feeds_last`: whether the first forward feeds the last committed token before the root.
        """
        if not _keeps_on_host(buffers, model.logits_dtype, backend):
            return None
        if (buffers.vocabulary is None) != (pairing is None):
            return None
        batch_size = buffers.tokens.shape[0]
        first_lens = torch.zeros_like(state.draft_lens)
        last_row = torch.ones(batch_size, dtype=torch.int64)  # of the last committed token and the root, the root's
        held: list[Any] = [state, layout, buffers, first_lens]
        levels = []
        bound = None
        for index, level in enumerate(layout.levels):
            width = level.nodes.shape[0]
            with_last = index == 0 and feeds_last
            fed = torch.zeros(batch_size, 2 if with_last else width, dtype=torch.int64)
            if with_last:
                bound = model.bind(fed, cache, first_lens, layout.root_step, last_row=last_row, active=state.active)
            else:
                bound = model.bind(fed, cache, state.draft_lens, level.step, active=state.active)
            if bound is None:
                return None
            held += bound, fed
            levels.append(_fields(level, fed, bound.prepared) | {"before_root": with_last})
        if bound is None:
            return None
        maps: tuple[Any, ...] = (None,) * 3
        if pairing is not None:
            maps = pairing.own_ids, pairing.vocabulary.draft_to_target, pairing.fed_ids
            held.extend(maps)
        prepared = _prepared(state, layout, buffers, levels, model.vocab_size, first_lens, maps)
        return cls(prepared, bound, held)

    @classmethod
    def of_block(
        cls, rows: torch.Tensor, head: MarkovHead | None, state: DecodingState, layout: TreeLayout,
        buffers: TokenBuffers, backend: str, confidence: ConfidenceHead | None = None,
    ) -> HostGrowth | None:  # fmt: skip
        """Prepare growing a tree on rows that lie there already, one for each level; None where draws run elsewhere.

        Args:
            rows: logits, which every run reads anew. [B, levels, vocab], contiguous.
            head: adds to the row of a node's depth what the node's own token says; None without one.
            state: the batch's state.
            layout: the tree.
            buffers: of the tree.
            backend: backend of the ops.
            confidence: foretells what is accepted, where the buffers ask for it.
        """
        if buffers.foretold is not None and confidence is None:
            return None
        batch_size, _, vocab = rows.shape
        if not _keeps_on_host(buffers, rows.dtype, backend):
            return None
        if head is not None and any(weight.dtype != rows.dtype for weight in head.weights):
            return None
        adds_row = batch_size > 1  # a product has one bias, and reads its weight once for all requests
        held: list[Any] = [state, layout, buffers, rows, head, confidence]
        levels = []
        for depth, level in enumerate(layout.levels):
            row = rows[:, depth]
            fed = torch.zeros(batch_size, level.nodes.shape[0], dtype=torch.int64)
            fields = _fields(level, fed, None, buffers.foretold) | {"row": row.data_ptr()}
            fields["row_stride"] = rows.stride(0) * rows.element_size()
            if head is not None:
                table, tokens = head.table, fed.view(-1)
                if head.mixing is not None:
                    fields["markov"], table, memory = _markov_fields(head, layout, depth, fed)
                    tokens = torch.arange(fed.numel())
                    held += memory
                fields["adds_row"] = adds_row
                fields["forward"], parts = bind_linear(
                    head.weight, tokens, table.shape[0], has_bias=not adds_row, rows_dtype=table.dtype,
                    out_dtype=torch.float32 if adds_row else None,
                )  # fmt: skip
                addresses = torch.tensor([table.data_ptr(), head.weight.data_ptr(), row.data_ptr()])
                fields["weights"] = addresses.data_ptr()
                held += fields["forward"], parts, addresses
            if buffers.foretold is not None and confidence is not None:
                fields["foretold"], memory = _foretold_fields(confidence, buffers.foretold, depth)
                held += memory
            held.append(fed)
            levels.append(fields)
        ids = None if buffers.vocabulary is None else buffers.vocabulary.draft_to_target
        first_lens = torch.zeros_like(state.draft_lens)
        held += first_lens, ids
        return cls(_prepared(state, layout, buffers, levels, vocab, first_lens, (None, ids, None)), None, held)

    def score_level(self, index: int) -> bool:
        """Do what a run does for one level before its draws; what a level is timed by. False as `run`."""
        weights = 0 if self._bound is None else self._bound.weights()
        return bool(self._prepared.score_level(index, weights, torch.get_num_threads()))

    def run(self, clock: StageClock) -> bool:
        """Grow the tree; False, and the tree is of no use, where a value is out of range."""
        weights = 0 if self._bound is None else self._bound.weights()
        grown = bool(self._prepared.run(weights, torch.get_num_threads(), unlikely.BEHIND))
        if clock.enabled:
            clock.seconds["draft"] += self._prepared.forward_seconds
            clock.seconds["sample"] += self._prepared.draw_seconds
        return grown


def _keeps_on_host(buffers: TokenBuffers, dtype: torch.dtype, backend: str) -> bool:
    """Tell whether logits of a dtype go to these buffers as they are, and draws from them run in C++."""
    kept = buffers.draft_logits
    on_host = kept is not None and kept.dtype == dtype and buffers.tokens.is_cpu
    return on_host and runs_own(sample_without_replacement.__name__, backend, "cpu", "host")


def _prepared(
    state: DecodingState, layout: TreeLayout, buffers: TokenBuffers, levels: list[dict[str, Any]], drafted: int,
    first_lens: torch.Tensor, maps: tuple[torch.Tensor | None, ...],
) -> Any:  # fmt: skip
    """Give the C++ object. maps: the draft's ids of the tokens in common, the target's, what the draft is fed."""
    kept = buffers.draft_logits
    assert kept is not None  # whoever keeps rows on the host has them
    tensors = {
        "tokens": buffers.tokens,
        "draft_logits": kept,
        "proposed": buffers.proposed,
        "last_tokens": state.last_tokens,
        "root_tokens": state.root_tokens,
        "active": state.active,
        "draft_lens": state.draft_lens,
        "first_lens": first_lens,
        "temperature": state.temperature,
        "top_p": state.top_p,
        "seeds": state.seeds,
        "offsets": state.offsets,
        **dict(zip(("own_ids", "target_ids", "fed_ids"), maps, strict=True)),
    }
    numbers = {
        "batch_size": buffers.tokens.shape[0],
        "num_nodes": layout.num_nodes,
        "vocab": kept.shape[2],
        "levels": levels,
        "num_fed": 0 if maps[2] is None else len(maps[2]),
        "drafted": drafted,
        "logits_type": ELEMENT_TYPES[kept.dtype],
    }
    return _host.TreeGrowth(numbers | {name: address(tensor) for name, tensor in tensors.items()})


def _fields(level: DraftLevel, fed: torch.Tensor, forward: Any, foretold: torch.Tensor | None = None) -> dict[str, Any]:
    return {
        "forward": forward,
        "weights": 0,
        "row": 0,
        "row_stride": 0,
        "adds_row": False,
        "markov": None,
        "foretold": None,
        "before_root": False,
        "fed": fed.data_ptr(),
        "nodes": level.nodes.data_ptr(),
        "width": level.nodes.shape[0],
        "adjacent": level.step.first_node is not None,
        "num_samples": level.num_samples,
        "first_child": level.first_child,
        "num_children": level.num_children,
        "drawn": level.drawn.data_ptr(),
        "drawn_per_request": level.drawn.dim() == 2,
        "num_with_proposal": level.num_with_proposal,
        "shape": None if level.shape is None else _shape_fields(level.shape, foretold),
    }


def _markov_fields(
    head: MarkovHead, layout: TreeLayout, depth: int, fed: torch.Tensor
) -> tuple[dict[str, Any], torch.Tensor, list[Any]]:
    """Describe what a head that reads slots does for a level; with what its weight multiplies, and what must live."""
    assert head.mixing is not None and head.slots is not None  # who reads slots has both
    rank, count = head.table.shape[1], fed.numel()
    outputs, inputs = head.mixing.shape
    topology = layout.topology.tensors(fed.device) if not isinstance(layout.topology, tuple) else layout.topology
    parents = topology.parents
    rows, mixed, given = (torch.zeros(count, width) for width in (inputs, outputs, rank))
    forward, parts = bind_linear(
        head.mixing, torch.arange(count), count, has_bias=False, rows_dtype=torch.float32, out_dtype=torch.float32
    )
    addresses = torch.tensor([rows.data_ptr(), head.mixing.data_ptr()])
    slot = head.slots[:, head.first_slot + depth]
    assert parents.dtype == torch.int32 and parents.is_contiguous() and slot.stride(1) == 1
    fields = {
        "rank": rank,
        "hands_states": head.states is not None,
        "table": head.table.data_ptr(),
        "type": ELEMENT_TYPES[head.table.dtype],
        "num_tokens": head.table.shape[0],
        "mixing": forward,
        "mixing_weights": addresses.data_ptr(),
        "inputs": rows.data_ptr(),
        "mixed": mixed.data_ptr(),
        "outputs": given.data_ptr(),
        "slot": slot.data_ptr(),
        "slot_stride": slot.stride(0),
        "states": address(head.states),
        "parents": parents.data_ptr(),
        "parents_stride": parents.shape[1] if parents.dim() == 2 else 0,
    }
    return fields, given, [rows, mixed, given, forward, parts, addresses, parents]


def _foretold_fields(head: ConfidenceHead, foretold: torch.Tensor, depth: int) -> tuple[dict[str, Any], list[Any]]:
    """Describe what a confidence head does for a level; with what must live as long."""
    slot = head.slots[:, head.first_slot + depth]
    row = None if head.table is None else torch.zeros(head.table.shape[1])
    fields = {
        "rank": 0 if row is None else row.shape[0],
        "table": address(head.table),
        "type": 0 if head.table is None else ELEMENT_TYPES[head.table.dtype],
        "num_tokens": 0 if head.table is None else head.table.shape[0],
        "weight": address(head.weight),
        "embedded": address(row),
        "slot": slot.data_ptr(),
        "slot_stride": slot.stride(0),
        "out": foretold.data_ptr(),
    }
    return fields, [row]


def _shape_fields(shape: LevelShape, foretold: torch.Tensor | None) -> dict[str, int]:
    topology, shared = shape.topology, shape.shared
    tensors = {
        "parents": topology.parents,
        "ranks": topology.ranks,
        "first_child": topology.first_child,
        "num_children": topology.num_children,
        "ancestor_mask": topology.ancestor_mask,
        "reach": shared.reach,
        "drawn": shared.drawn,
        "undrawn": shared.undrawn,
        "edges": shared.edges,
        "own_mask": shape.own_mask,
        "foretold": foretold if shape.goes_by_foretold else None,
    }
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors.values())
    return {
        "num_nodes": shared.reach.shape[1],
        "num_words": topology.ancestor_mask.shape[-1],
        "max_children": shape.max_children,
        "num_ranks": len(shared.drawn),
        "num_edges": len(shared.edges),
        "first": shape.first,
        **{name: address(tensor) for name, tensor in tensors.items()},
    }
